"""The study of unknown classes as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flown.base.provenance import Row
from flown.base.terminal import Table, print_table
from flown.report.page import write_page


def detection(rows: Sequence[Row]) -> Table:
    """A line a row and method: means over tasks with half of their 95 % intervals, percent."""
    body = [
        [
            row["row"],
            row["method"],
            *(
                f"{row[name]:.1f} ± {row[f'{name}_interval']:.1f}"
                for name in ("detected", "false_alarms", "auroc")
            ),
        ]
        for row in rows
    ]
    return ["classes", "method", "detected", "false alarms", "area under ROC"], body


def print_unknown(rows: Sequence[Row], console: Console) -> None:
    """The table on the terminal."""
    print_table(console, "Images of classes outside the support set, %", detection(rows))


def write_unknown(path: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Writes the page.

    Raises:
        FlownError: the file cannot be written.
    """
    write_page(
        path, "unknown.html", "Images of none of the classes", table_=detection(rows), about=about
    )
