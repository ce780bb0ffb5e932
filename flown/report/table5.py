"""Table 5: methods by data sets and protocols, on a terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from flown.base.provenance import Row
from flown.base.terminal import Table, print_table, say
from flown.report.page import write_page
from flown.report.tables import NONE


def accuracies(rows: list[Row], protocol: str) -> Table:
    """Mean and half of the 95 % interval over tasks, the paper's figure in brackets."""
    return _beside(rows, protocol, "accuracy")


def differences(rows: list[Row], protocol: str) -> Table:
    """Points between two methods on the same tasks, and half of their 95 % interval."""
    return _beside(rows, protocol, "difference")


def _beside(rows: list[Row], protocol: str, metric: str) -> Table:
    """Methods by data sets."""
    measured = [
        row
        for row in rows
        if row["interval"] is not None and (row["protocol"], row["metric"]) == (protocol, metric)
    ]
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
    sign = "+" if row["metric"] == "difference" else ""
    return f"{row['value']:{sign}.1f} ± {row['interval']:.1f}{paper}"


def _tables(rows: list[Row]) -> dict[str, Table]:
    return {
        "Inductive: from one image a class": accuracies(rows, "inductive"),
        "Transductive: all queries of a task are seen as well": accuracies(rows, "transductive"),
        "Inductive, differences on the same tasks": differences(rows, "inductive"),
        "Transductive, differences on the same tasks": differences(rows, "transductive"),
    }


def print_table5(rows: list[Row], console: Console) -> None:
    """Prints accuracies by protocol, then what lies between methods."""
    say(console, "5-way 1-shot accuracy, % of queries, 95 % intervals over tasks")
    for title, table in _tables(rows).items():
        print_table(console, title, table)


def write_table5(path: Path | str, title: str, rows: list[Row], about: Mapping[str, Any]) -> None:
    """Writes all tables, all other figures and the provenance.

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
        tables=_tables(rows),
        others=(["data", "method", "metric", "value"], others),
        about=about,
    )
