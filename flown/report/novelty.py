"""The novelty study as a table and as one HTML file: accuracy, distance, errors in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flown.base.provenance import Row
from flown.base.terminal import print_table
from flown.report.page import write_page
from flown.report.style import STYLES, TASK_COLOURS, legend, panels, style_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = dict[str, list[float]]  # metric -> a number a network, or one for all
Measured = dict[str, dict[str, dict[str, Points]]]  # by data set, variant and method

HEAD = (
    "networks",
    "n",
    "accuracy, %",
    "agreement, %",
    "L2 ratio",
    "aligned",
    "largest IoU",
    "IoU among",
)
_METRICS = ("accuracy", "agreement", "l2-ratio", "l2-ratio-aligned", "max-iou", "diversity-iou")
_LABELS = {"flown": "samples", "latent-gaussian": "random latents"}


def label(method: str) -> str:
    """The name of a method in the study's tables."""
    return _LABELS.get(method, style_of(method).label)


def table(rows: Sequence[Row], dataset: str) -> list[list[str]]:
    """The body of a data set's table, columns as `HEAD`."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["dataset"] == dataset:
            found.setdefault((row["variant"], row["method"]), {})[row["metric"]] = row
    return [
        [
            f"{variant}: {label(method)}",
            str(metrics["accuracy"]["n"]),
            *(_cell(metrics.get(metric)) for metric in _METRICS),
        ]
        for (variant, method), metrics in found.items()
    ]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["metric"] not in ("accuracy", "agreement"):
        return f"{row['value']:.2f}"
    spread = (
        f" ± {row['std']:.1f}" if row["metric"] == "accuracy" and row["std"] is not None else ""
    )
    return f"{row['value']:.1f}{spread}"


def print_study(rows: Sequence[Row], console: Console) -> None:
    """Prints every data set's table."""
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        title = f"{dataset}: accuracy on test images, and novelty"
        print_table(console, title, (list(HEAD), table(rows, dataset)))


def write_novelty(
    path: Path, title: str, rows: Sequence[Row], measured: Measured, about: Mapping[str, Any]
) -> None:
    """Writes figures, tables and provenance into one file that needs nothing else.

    Raises:
        FlownError: the file cannot be written.
    """
    write_page(
        path,
        "novelty.html",
        title,
        distance=scatter(measured, "l2-ratio"),
        errors=scatter(measured, "max-iou"),
        tables=[(dataset, (list(HEAD), table(rows, dataset))) for dataset in measured],
        about=about,
    )


def scatter(measured: Measured, metric: str) -> Figure:
    """Every sample's accuracy against a measure of novelty, beside the baselines."""
    page, axes = panels(len(measured), 6.2, 4.2, room=1.3)
    fitted = dict.fromkeys(
        name
        for variants in measured.values()
        for name, methods in variants.items()
        if "flown" in methods
    )
    # Seven colours and six marks: no pair repeats for 42 variants.
    styles = dict(
        zip(fitted, zip(cycle(TASK_COLOURS), cycle("o^vDPX"), strict=False), strict=False)
    )
    for axis, (dataset, variants) in zip(axes, measured.items(), strict=True):
        for variant, methods in variants.items():
            if "flown" in methods:
                points = methods["flown"]
                colour, mark = styles[variant]
                axis.scatter(
                    points[metric],
                    points["accuracy"],
                    s=22,
                    alpha=0.65,
                    linewidths=0,
                    color=colour,
                    marker=mark,
                    label=variant,
                    zorder=3,
                )
                continue
            for method in (m for m in STYLES if m in methods and m != "zoo"):
                points, style = methods[method], style_of(method)
                note = ", aligned" if "aligned" in variant else ""
                axis.scatter(
                    points[metric],
                    points["accuracy"],
                    s=10,
                    alpha=0.5,
                    linewidths=0,
                    color=style.colour,
                    marker="s" if note else "D",
                    label=f"{style.label}{note}",
                )
            held_out = methods["zoo-held-out"][metric]
            axis.axvline(sum(held_out) / len(held_out), color="black", lw=0.8, ls=":")
        axis.set_ylim(-2, 102)
        axis.set_xlabel(
            {
                "l2-ratio": "L2 to the nearest training network / held-out networks' own",
                "max-iou": "largest IoU of errors with a training network",
            }[metric]
        )
        axis.set_ylabel("test accuracy, %")
        axis.set_title(dataset, fontsize=11, loc="left")
    legend(page, axes, 3)
    return page
