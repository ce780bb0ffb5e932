"""Table 5: methods by data sets, with its targets, on a terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from flown.base.provenance import Row
from flown.base.terminal import Table, print_table
from flown.report.page import write_page
from flown.report.tables import NONE

_UNDER = 5  # points that generated heads may lie under the linear probe


def accuracies(rows: list[Row]) -> Table:
    """Mean and half of the 95 % interval over tasks, the paper's figure in brackets."""
    measured = [row for row in rows if row["interval"] is not None]
    sets = list(dict.fromkeys(row["dataset"] for row in measured))
    found = {(row["method"], row["selection"], row["dataset"]): row for row in measured}
    body = []
    for method, selection in dict.fromkeys((row["method"], row["selection"]) for row in measured):
        cells = [_cell(found.get((method, selection, name))) for name in sets]
        body.append([method if selection == "all" else f"{method}, {selection}", *cells])
    return ["method", *sets], body


def _cell(row: Row | None) -> str:
    if row is None:
        return NONE
    paper = "" if row["paper"] is None else f" ({row['paper']:.1f})"
    return f"{row['value']:.1f} ± {row['interval']:.1f}{paper}"


def bars(rows: list[Row]) -> Table:
    """The targets on each set, and whether they were reached, in points."""
    found = {
        (row["dataset"], row["method"]): row["value"]
        for row in rows
        if row["interval"] is not None and row["selection"] == "all"
    }
    compared = (
        ("flown", "d2nwg", 0, "above D2NWG"),
        ("flown", "d2nwg-v", 0, "above D2NWG with v-prediction"),
        ("flown", "linear-probe", -_UNDER, f"at most {_UNDER} under the linear probe"),
        ("flown+5", "linear-probe", 0, "after 5 steps not below the linear probe"),
    )
    body = []
    for name in dict.fromkeys(dataset for dataset, _ in found):
        for method, other, least, bar in compared:
            lead = found[name, method] - found[name, other]
            body.append([name, bar, f"{lead:+.1f}", "held" if lead >= least else "missed"])
    return ["data", "bar", "points", ""], body


def print_table5(rows: list[Row], console: Console) -> None:
    """Prints accuracies, then the targets."""
    title = "5-way 1-shot accuracy, % of queries, 95 % intervals over tasks"
    print_table(console, title, accuracies(rows))
    print_table(console, "Generated heads against their targets", bars(rows))


def write_table5(path: Path | str, title: str, rows: list[Row], about: Mapping[str, Any]) -> None:
    """Writes both tables, all other figures and the provenance.

    Raises:
        FlownError: the file cannot be written.
    """
    others = [
        [row["dataset"], row["method"], row["metric"], f"{row['value']:.3g}"]
        for row in rows
        if row["interval"] is None
    ]
    write_page(
        path,
        "table5.html",
        title,
        accuracies=accuracies(rows),
        bars=bars(rows),
        others=(["data", "method", "metric", "value"], others),
        about=about,
    )
