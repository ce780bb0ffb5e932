"""The study of few steps as tables: accuracy and diversity by flow and number of evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flown.base.provenance import Row
from flown.base.terminal import Table, print_table
from flown.report.page import write_page

_TITLES = {
    "accuracy": "Test accuracy, %",
    "validation accuracy": "Validation accuracy, %",
    "diversity-iou": "IoU of errors among the networks of a data set",
}


def by_flow(rows: Sequence[Row], metric: str = "accuracy") -> Table:
    """A line a flow and solver, a column a data set: means over networks."""
    chosen = [row for row in rows if row["metric"] == metric]
    datasets = list(dict.fromkeys(row["dataset"] for row in chosen))
    digits = 2 if metric == "diversity-iou" else 1
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in chosen:
        solver = f"{row['solver']}, {row['steps']} step{'s' * (row['steps'] > 1)}"
        line = cells.setdefault((row["flow"], solver, str(row["nfe"])), {})
        line[row["dataset"]] = f"{row['value']:.{digits}f}"
    body = [[*key, *(line[name] for name in datasets)] for key, line in cells.items()]
    return ["flow", "solver", "evaluations", *datasets], body


def print_steps(rows: Sequence[Row], console: Console) -> None:
    """The table of test accuracies on the terminal."""
    print_table(console, _TITLES["accuracy"], by_flow(rows))


def write_steps(path: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Writes the page.

    Raises:
        FlownError: the file cannot be written.
    """
    tables = {title: by_flow(rows, metric) for metric, title in _TITLES.items()}
    write_page(path, "steps.html", "Few steps", tables=tables, about=about)
