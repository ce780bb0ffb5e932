"""Networks trained further: accuracies by epoch as tables, learning curves, one HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flown.base.provenance import Row
from flown.base.terminal import Table, print_table
from flown.measure.finetune import Point
from flown.report.page import write_page
from flown.report.style import legend, panels, style_of
from flown.report.tables import NONE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = Mapping[str, Mapping[str, list[Point]]]  # data set -> method -> points
LEAD = "lead-over-best-init"  # points of accuracy, generated networks over the best initialisation
AHEAD = "ahead-of-flown"  # points of accuracy, over pairs of networks from the same support set
GAP = "gap-to-zoo"  # generated networks minus the zoo's checkpoints
ANY = "flown-any"  # the generator that needs no zoo, and the method of its networks
THROUGH = ("flown-trajectory", "flown-trajectory-stopped")  # at its last epoch, at a chosen epoch
_TICKS = (0, 1, 2, 5, 10, 25, 50, 100)
# The targets: points that may lie under the zoo, epochs with a lead, and with one of flown-any.
_NEAR, _SOON, _LATE = 3, 5, 25


def curves(of: Curves) -> Figure:
    """Validation accuracy by epoch: a line a method, its mean, and a band of one deviation."""
    page, axes = panels(len(of), 5.4, 3.3, room=0.7)
    for axis, (name, methods) in zip(axes, of.items(), strict=True):
        for method, points in methods.items():
            style, generated = style_of(method), method == "flown"
            epochs = [p.epoch for p in points]
            mean = [float(p.val.mean()) for p in points]
            std = [float(p.val.std(correction=min(1, len(p.val) - 1))) for p in points]
            axis.plot(
                epochs,
                mean,
                color=style.colour,
                lw=2.2 if generated else 1.3,
                label=style.label,
                marker=style.mark,
                ms=4,
                markevery=_marks(epochs),
                zorder=3 if generated else 2,
            )
            low, high = ([m + side * s for m, s in zip(mean, std, strict=True)] for side in (-1, 1))
            axis.fill_between(epochs, low, high, color=style.colour, alpha=0.14, lw=0)
        # Linear over the first epoch, logarithmic beyond: most of the change comes early.
        axis.set_xscale("symlog", linthresh=1)
        last = max(p.epoch for points in methods.values() for p in points)
        ticks = sorted({last, *(t for t in _TICKS if t <= last)})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.set_xticks([], minor=True)
        axis.set_title(name, fontsize=11, loc="left")
        axis.set_xlabel("epoch")
        axis.set_ylabel("validation accuracy, %")
        axis.grid(alpha=0.25)
    legend(page, axes, 4 if len(axes) > 1 else 3)
    return page


def _marks(epochs: list[int]) -> list[int]:
    return [i for i, epoch in enumerate(epochs) if epoch in (*_TICKS, epochs[-1])]


def accuracy_table(rows: list[Row], dataset: str) -> Table:
    """Methods by epochs, mean and deviation on test images, the paper's figure in brackets."""
    measured = [r for r in rows if r["dataset"] == dataset and r["metric"] == "accuracy"]
    epochs = sorted({r["epoch"] for r in measured})
    found = {(r["method"], r["epoch"]): r for r in measured}
    body = [
        [style_of(method).label, *(_cell(found.get((method, epoch))) for epoch in epochs)]
        for method in dict.fromkeys(r["method"] for r in measured)
    ]
    return ["networks", *(f"epoch {epoch}" for epoch in epochs)], body


def _cell(row: Row | None) -> str:
    if row is None:
        return NONE
    std = "" if row["std"] is None else f" ± {row['std']:.1f}"
    paper = "" if row["paper"] is None else f" ({row['paper']:.1f})"
    return f"{row['value']:.1f}{std}{paper}"


def bars(rows: list[Row]) -> Table:
    """The targets, and whether they were reached; leads are over the best initialisation."""
    trained = {r["dataset"] for r in rows if r["metric"] == GAP}
    body = []
    for row in rows:
        value, epoch, known = row["value"], row["epoch"], row["dataset"] in trained
        if row["metric"] == GAP:
            bar, held = f"gap to the zoo, -{_NEAR} or more", value >= -_NEAR
        elif row["metric"] == LEAD and _counts(row["method"], epoch, known):
            label, over = style_of(row["method"]).label, style_of(row["over"]).label
            bar, held = f"{label} ahead of {over}", value > 0
        else:
            continue
        body.append(
            [
                row["dataset"] + ("" if known else " (unseen)"),
                str(epoch),
                bar,
                f"{value:+.1f}",
                "held" if held else "missed",
            ]
        )
    return ["data", "epoch", "bar", "points", ""], body


def _counts(method: str, epoch: int, known: bool) -> bool:
    """Whether a lead at that epoch was aimed at; `known`: on a zoo's own data set."""
    if method == "flown":
        return epoch <= _SOON if known else epoch == 1
    return epoch <= _LATE


def through(rows: list[Row]) -> Table:
    """The lead of the flow through several epochs over the flow to the last, ± the standard error.

    The i-th networks of both methods come from one support set and see the same images in the same
    order, so the error is that of the mean difference.
    """
    found = {(r["dataset"], r["method"], r["epoch"]): r for r in rows if r["metric"] == AHEAD}
    epochs = sorted({epoch for *_, epoch in found})
    body = []
    for name in dict.fromkeys(r["dataset"] for r in rows):
        for method in THROUGH:
            leads = [found[name, method, epoch] for epoch in epochs]
            stop = f"{leads[0]['until']:g}"
            body.append([name, style_of(method).label, stop, *map(_ahead, leads)])
    return ["data", "networks", "stop", *(f"epoch {epoch}" for epoch in epochs)], body


def _ahead(row: Row) -> str:
    error = "" if row["std"] is None else f" ± {row['std'] / row['n'] ** 0.5:.1f}"
    return f"{row['value']:+.1f}{error}"


def print_table3(rows: list[Row], console: Console) -> None:
    """Prints the table of every data set, then the targets."""
    for name in dict.fromkeys(row["dataset"] for row in rows):
        title = f"{name}: test accuracy, %, by epochs of fine-tuning"
        print_table(console, title, accuracy_table(rows, name), style_of("flown").label)
    title = "A flow through several epochs: points ahead of the other"
    print_table(console, title, through(rows))
    print_table(console, "Generated networks against their targets", bars(rows))


def write_table3(
    path: Path | str, scale: str, rows: list[Row], of: Curves, about: Mapping[str, Any]
) -> None:
    """Writes tables, learning curves and provenance.

    Raises:
        FlownError: the file cannot be written.
    """
    write_page(
        path,
        "finetuning.html",
        f"Table 3 at the {scale} scale",
        bars=bars(rows),
        curves=curves(of),
        through=through(rows),
        accuracies=[(name, _about(rows, name), accuracy_table(rows, name)) for name in of],
        about=about,
    )


def _about(rows: list[Row], dataset: str) -> str:
    row = next(r for r in rows if r["dataset"] == dataset and r["method"] == "flown")
    text = (
        f"Percent of {row['test_images']} test images, mean ± standard deviation of {row['n']} "
        f"networks a method; {row['train_images']} training images, batches of "
        f"{row['batch_size']}, learning rate {row['learning_rate']:g}. Networks are of the layout that "
        f"suits {row['votes']} support sets, that of the zoo of {row['layout_of']}, with its activation "
        f"and preprocessing; those of {style_of(ANY).label} have tanh and the units of their "
        "support set. The best lookup was "
        f"{_lookup(rows, dataset)}'s."
    )
    stop = next(r for r in rows if r["dataset"] == dataset and r["method"] == THROUGH[1])
    text += f" The stop chosen is epoch {stop['until']:g} ({stop['selection']})."
    if any(r["paper"] is not None for r in rows if r["dataset"] == dataset):
        text += " In brackets: the paper's figure."
    return text + (f" {row['note']}." if row["note"] else "")


def _lookup(rows: list[Row], dataset: str) -> str:
    return next(
        str(r["networks_of"])
        for r in rows
        if r["dataset"] == dataset and r["method"] == "best-lookup"
    )
