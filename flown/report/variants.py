"""Variants of the any-task generator as tables and curves: ways to train it, tasks, sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from flown.base.provenance import Row
from flown.base.terminal import Table, print_table
from flown.report.page import write_page
from flown.report.style import TASK_COLOURS, figure, legend
from flown.report.tables import NONE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Row]
BASE = "base networks alone"
FIRST = "end-point"  # the way that the others are compared with, on unlimited tasks
_MARKS = "os^Dv"


def by_way(rows: Rows) -> dict[str, Rows]:
    """The records of each way, the usual in all else; those of base networks first."""
    of_ways = [r for r in rows if r["method"] in (BASE, r.get("way"))]
    return _grouped(of_ways, lambda r: str(r["method"]))


def by_count(rows: Rows) -> dict[str, Rows]:
    """The records of each number of training tasks, growing."""
    limited = sorted((r for r in rows if r.get("count")), key=lambda r: int(r["count"]))
    without_end = [r for r in rows if r["method"] == FIRST]
    return _grouped(
        [*limited, *without_end], lambda r: f"{r['count']:,}" if r["count"] else "no end"
    )


def by_size(rows: Rows) -> dict[str, Rows]:
    """The records of each trunk, growing."""
    of_trunks = [r for r in rows if r.get("way") == FIRST and not r["count"]]
    of_trunks.sort(key=lambda r: int(r["parameters"]))
    return _grouped(of_trunks, lambda r: f"width {r['width']}, depth {r['depth']}")


def _grouped(rows: Rows, name: Callable[[Row], str]) -> dict[str, Rows]:
    return {key: [r for r in rows if name(r) == key] for key in dict.fromkeys(map(name, rows))}


def accuracies(groups: Mapping[str, Rows]) -> Table:
    """Mean over tasks with half of its 95 % interval, and seconds of training."""
    head, body = _table(groups, lambda r: f"{r['accuracy']:.1f}{_half(r['interval'])}")
    times = [_seconds(rows) for rows in groups.values()]
    return head, [*body, ["training, s", "", *times]]


def ahead(groups: Mapping[str, Rows]) -> Table:
    """Points ahead of the first way, mean over the same tasks."""
    return _table(groups, lambda r: f"{r['ahead']:+.1f}{_half(r['ahead_interval'])}")


def overlaps(groups: Mapping[str, Rows]) -> Table:
    """IoU of errors among the samples of a task."""
    return _table(groups, lambda r: f"{r['overlap']:.2f}" if "overlap" in r else NONE)


def votes(groups: Mapping[str, Rows]) -> Table:
    """Points by which the vote of a task's samples is ahead of one of them."""
    return _table(groups, lambda r: f"{r['vote'] - r['accuracy']:+.1f}" if "vote" in r else NONE)


def _table(groups: Mapping[str, Rows], cell: Callable[[Row], str]) -> Table:
    """A line a row and network, a column a group."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for name, rows in groups.items():
        for r in rows:
            lines.setdefault((r["row"], r["net"]), {})[name] = cell(r)
    body = [[*key, *(cells.get(name, NONE) for name in groups)] for key, cells in lines.items()]
    return ["tasks of", "network", *groups], body


def _half(interval: float | None) -> str:
    return "" if interval is None else f" ± {interval:.1f}"


def _seconds(rows: Rows) -> str:
    return f"{rows[0]['seconds']:.0f}" if "seconds" in rows[0] else NONE


def curves(rows: Rows, groups: Mapping[str, Rows], label: str) -> Figure:
    """A panel a network, a line a kind of task: accuracy by group, the base networks' dotted."""
    nets = list(dict.fromkeys(r["net"] for r in rows))
    page, axes = figure(1, len(nets), 4.8 * len(nets), 4.2)
    for axis, net in zip(axes, nets, strict=True):
        kinds = dict.fromkeys(r["row"] for r in rows if r["net"] == net)
        for kind, colour, mark in zip(kinds, TASK_COLOURS, _MARKS, strict=False):
            here = [
                next(r for r in group if (r["net"], r["row"]) == (net, kind))
                for group in groups.values()
            ]
            axis.errorbar(
                range(len(here)),
                [r["accuracy"] for r in here],
                [r["interval"] or 0.0 for r in here],
                color=colour,
                marker=mark,
                ms=4,
                lw=1.5,
                elinewidth=0.6,
                label=kind,
            )
            base = next(r for r in rows if (r["method"], r["net"], r["row"]) == (BASE, net, kind))
            axis.axhline(base["accuracy"], color=colour, lw=1, ls=":")
        axis.set_xticks(range(len(groups)), [name.replace(", ", "\n") for name in groups])
        axis.set_title(net, fontsize=11, loc="left")
        axis.set_xlabel(label)
        axis.set_ylabel("accuracy, %")
        axis.grid(alpha=0.25)
    legend(page, axes, 2)
    return page


def print_variants(rows: Rows, console: Console) -> None:
    """Prints the accuracies of ways, numbers of tasks and sizes."""
    for title, groups in (
        ("Ways to train, accuracy in %", by_way(rows)),
        ("Numbers of training tasks, accuracy in %", by_count(rows)),
        ("Sizes of the trunk, accuracy in %", by_size(rows)),
    ):
        print_table(console, title, accuracies(groups))


def write_variants(path: Path | str, rows: Rows, about: Mapping[str, Any]) -> None:
    """Writes the study as one page.

    Raises:
        FlownError: the file cannot be written.
    """
    ways, counts, sizes = by_way(rows), by_count(rows), by_size(rows)
    write_page(
        path,
        "variants.html",
        "Ways to train the any-task generator",
        ways=accuracies(ways),
        ahead=ahead(ways),
        overlaps=overlaps(ways),
        votes=votes(ways),
        counts=accuracies(counts),
        counts_curve=curves(rows, counts, "training tasks"),
        sizes=accuracies(sizes),
        sizes_curve=curves(rows, sizes, "trunk"),
        about=about,
    )
