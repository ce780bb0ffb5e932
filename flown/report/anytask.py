"""The any-task study as tables: generated networks beside what the same images give otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flown.base.terminal import Table, print_table
from flown.report.page import write_page
from flown.report.style import Style, figure, legend
from flown.report.tables import NONE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, Any]]
_GENERATED = "flown-any "
# What is drawn beside each other: methods by how their names begin.
_GROUPS = {
    "nearest centroid of pixels": Style("nearest centroid of pixels", "#333333", "X"),
    "scratch": Style("trained from scratch", "#8C8C8C", "d"),
    "base trained": Style("base network, trained further", "#56B4E9", "^"),
    "base body": Style("base body", "#0072B2", "s"),
    _GENERATED: Style("written", "#D55E00", "o"),
}


def accuracies(rows: Rows) -> Table:
    """Mean accuracy with half of its 95 % interval over tasks: a line a method, a column a row."""
    columns = list(dict.fromkeys(row["row"] for row in rows))
    found = {(row["method"], row["row"]): row for row in rows}
    body = [
        [method, *(_cell(found.get((method, column))) for column in columns)]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    return ["method", *columns], body


def beside(rows: Rows, methods: Mapping[str, str]) -> Table:
    """The same for some methods, by what their columns are called: a line a row."""
    found = {(row["method"], row["row"]): row for row in rows}
    body = [
        [name, *(_cell(found.get((method, name))) for method in methods.values())]
        for name in dict.fromkeys(row["row"] for row in rows)
    ]
    return ["row", *methods], body


def populations(rows: Rows) -> Table:
    """What many networks of a support set are: the vote of all, overlap of errors, calibration.

    Beside the overlap, that of two networks trained on the support set from different seeds.
    """
    trained = {r["row"]: r["overlap"] for r in rows if "overlap" in r and "vote" not in r}
    body = [
        [
            row["row"],
            row["method"].removeprefix(_GENERATED),
            f"{row['accuracy']:.1f}",
            f"{row['vote']:.1f}",
            str(row.get("networks", NONE)),
            f"{row['overlap']:.2f}",
            f"{trained[row['row']]:.2f}" if row["row"] in trained else NONE,
            f"{row['ece']:.1f}",
        ]
        for row in rows
        if "vote" in row
    ]
    return ["row", "network", "one", "vote", "of", "IoU among", "trained ones", "ECE, %"], body


def leads(rows: Rows) -> Table:
    """The best written network and the best control of each row, and the points between them."""
    body = []
    for name in dict.fromkeys(row["row"] for row in rows):
        of_row = [row for row in rows if row["row"] == name]
        written = max((r for r in of_row if _is_written(r)), key=lambda r: r["accuracy"])
        best = max((r for r in of_row if not _is_written(r)), key=lambda r: r["accuracy"])
        body.append(
            [
                name,
                f"{written['method'].removeprefix(_GENERATED)} {written['accuracy']:.1f}",
                f"{best['method']} {best['accuracy']:.1f}",
                f"{written['accuracy'] - best['accuracy']:+.1f}",
            ]
        )
    return ["row", "generated", "best control", "points"], body


def picture(rows: Rows) -> Figure:
    """The best method of every group with its 95 % interval: a line a row of the study."""
    names = list(dict.fromkeys(row["row"] for row in rows))
    page, axes = figure(1, 1, 8.6, 0.8 + 0.34 * len(names))
    for start, style in _GROUPS.items():
        best = {
            row["row"]: row
            for row in sorted(rows, key=lambda row: float(row["accuracy"]))
            if str(row["method"]).startswith(start)
        }
        axes[0].errorbar(
            [row["accuracy"] for row in best.values()],
            [names.index(name) for name in best],
            xerr=[row["interval"] or 0.0 for row in best.values()],
            color=style.colour,
            marker=style.mark,
            ms=6,
            ls="none",
            elinewidth=0.8,
            label=style.label,
        )
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 100)
    axes[0].set_xlabel("accuracy, %")
    axes[0].grid(alpha=0.25)
    legend(page, axes, 3)
    return page


def print_study(rows: Rows, console: Console) -> None:
    """Prints the leads, then everything."""
    for title, table in (
        ("Zero gradient steps on tasks nobody trained on, %", leads(rows)),
        ("Many networks of one support set", populations(rows)),
    ):
        print_table(console, title, table)


def write_study(path: Path | str, rows: Rows, about: Mapping[str, Any]) -> None:
    """Writes the study as one page.

    Raises:
        FlownError: the file cannot be written.
    """
    write_page(
        path,
        "anytask.html",
        "Networks for tasks that nobody trained on",
        picture=picture(rows),
        leads=leads(rows),
        populations=populations(rows),
        accuracies=accuracies(rows),
        about=about,
    )


def _is_written(row: dict[str, Any]) -> bool:
    return str(row["method"]).startswith(_GENERATED)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return NONE
    half = "" if row["interval"] is None else f" ± {row['interval']:.1f}"
    return f"{row['accuracy']:.1f}{half}"
