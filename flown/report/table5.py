"""Table 5 as a table of methods by data sets, with the bars it was to reach, on a terminal and a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flown.base.printable import Console
from flown.base.provenance import Row
from flown.report import html, terminal
from flown.report.tables import NONE, Table

_UNDER = 5  # points that generated heads may lie under the linear probe


def accuracies(rows: list[Row]) -> Table:
    """Mean and half of the 95 % interval over tasks, the paper's figure in brackets."""
    own = [row for row in rows if row["interval"] is not None]
    sets = list(dict.fromkeys(row["dataset"] for row in own))
    found = {(row["method"], row["selection"], row["dataset"]): row for row in own}
    body = []
    for method, selection in dict.fromkeys((row["method"], row["selection"]) for row in own):
        cells = [_cell(found.get((method, selection, name))) for name in sets]
        body.append([method if selection == "all" else f"{method}, {selection}", *cells])
    return ["method", *sets], body


def _cell(row: Row | None) -> str:
    if row is None:
        return NONE
    paper = "" if row["paper"] is None else f" ({row['paper']:.1f})"
    return f"{row['value']:.1f} ± {row['interval']:.1f}{paper}"


def bars(rows: list[Row]) -> Table:
    """What was to be reached on each set, and whether it was, in points."""
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
    """Prints accuracies, then the bars."""
    terminal.print_table(
        console, "5-way 1-shot accuracy, % of queries, 95 % intervals over tasks", accuracies(rows)
    )
    terminal.print_table(console, "Generated heads against what was to be reached", bars(rows))


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
    parts = [
        html.note(_LEAD),
        html.table_html(*accuracies(rows)),
        "<h2>What was to be reached</h2>",
        html.table_html(*bars(rows)),
        "<h2>Other figures</h2>",
        html.table_html(["data", "method", "metric", "value"], others),
    ]
    html.write_page(path, title, parts, about)


_LEAD = (
    "Accuracy on the queries of 5-way 1-shot tasks, mean and 95 % interval over tasks; every method sees "
    "the same tasks. Generated heads: the mean over all samples of a task, the three with the least "
    "loss on the support, and the three that do best on the queries themselves, which is the paper's "
    "protocol and nothing a user could do. '+5': after five steps of AdamW on the support. "
    "In brackets: the paper's figure, on its own backbone and full data. D2NWG is a diffusion on the same "
    "latent with the same network and as many steps of training: d2nwg predicts the noise, as published, "
    "d2nwg-v what does not magnify a network's error where there is much noise."
)
