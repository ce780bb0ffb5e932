"""Networks generated at the epochs of a flow's path: a table, a figure, a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flown.base.provenance import Row
from flown.base.terminal import Table
from flown.report.page import write_page
from flown.report.style import TASK_COLOURS, Style, legend, panels, style_of
from flown.report.tables import NONE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = "gap-to-zoo"  # mean distance of accuracies from the zoo's, in points, over all epochs
_STYLES = {
    "flown": Style("last epoch alone, linear", "#8C8C8C", "o"),
    "piecewise": Style("through the epochs, piecewise", TASK_COLOURS[0], "v"),
    "spline": Style("through the epochs, spline", TASK_COLOURS[2], "^"),
    "metric": Style("through the epochs, metric", TASK_COLOURS[3], "D"),
}


def _name(further: int) -> str:
    return f"Trained {further} epoch{'s' * (further > 1)} more" if further else "As generated"


def _style_of(method: str) -> Style:
    return _STYLES.get(method) or style_of(method)


def table(rows: Sequence[Row], further: int) -> Table:
    """Accuracy at each epoch after `further` epochs of training; at 0 with the mean distance."""
    here = [r for r in rows if r["metric"] == "accuracy" and r["epoch"] == further]
    epochs = sorted({r["until"] for r in here})
    found = {(r["method"], r["until"]): r for r in here}
    gaps = {r["method"]: r["value"] for r in rows if r["metric"] == GAP}
    body = []
    for method in dict.fromkeys(r["method"] for r in here):
        line = [_style_of(method).label]
        for epoch in epochs:
            row = found[method, epoch]
            spread = (
                "" if row["std"] is None else f" ± {row['std']:.1f}"
            )  # a single network has no deviation
            line.append(f"{row['value']:.1f}{spread}")
        if not further:
            line.append(f"{gaps[method]:.1f}" if method in gaps else NONE)
        body.append(line)
    head = ["networks", *(f"epoch {e:g}" for e in epochs)]
    return head + ([] if further else ["mean distance from the zoo"]), body


def curves(rows: Sequence[Row]) -> Figure:
    """A panel for each number of further epochs: accuracy by the epoch at which a flow stopped."""
    found = [r for r in rows if r["metric"] == "accuracy"]
    steps = sorted({r["epoch"] for r in found})
    page, axes = panels(len(steps), 5.4, 3.5, room=0.8)
    for axis, further in zip(axes, steps, strict=True):
        for method in dict.fromkeys(r["method"] for r in found):
            shown = [r for r in found if r["method"] == method and r["epoch"] == further]
            style = _style_of(method)
            axis.errorbar(
                [r["until"] for r in shown],
                [r["value"] for r in shown],
                [r["std"] or 0.0 for r in shown],
                color=style.colour,
                marker=style.mark,
                ms=4,
                lw=1.5,
                elinewidth=0.6,
                label=style.label,
            )
        axis.set_title(_name(further), fontsize=11, loc="left")
        axis.set_xlabel("epoch of the zoo at which generation stopped")
        axis.set_ylabel("test accuracy, %")
        axis.grid(alpha=0.25)
    legend(page, axes, 3)
    return page


def write_trajectory(path: Path, title: str, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Writes figure, tables and provenance into one file that needs nothing else.

    Raises:
        FlownError: the file cannot be written.
    """
    further = sorted({r["epoch"] for r in rows if r["metric"] == "accuracy"})
    tables = [(_name(epochs), table(rows, epochs)) for epochs in further]
    write_page(path, "trajectory.html", title, curves=curves(rows), tables=tables, about=about)
