"""The report card on a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from flown.base.printable import Console
from flown.generator.card import Card
from flown.report import tables
from flown.report.style import look

_NOTES = """\
top {top}: chosen on validation images, measured on test images. rebuilt: encoded, decoded again.
L2 ratio: distance to the nearest training network, 0 for a copy, 1 for a held-out network.
max IoU: errors in common with a training network. IoU among: with the others of the row.
"""


def print_card(card: Card, console: Console | None = None) -> None:
    """Prints every table of the card: one a task, then contexts and sampling.

    Where the terminal is narrow a table goes on below itself, its first column repeated.
    """
    console = console or Console()
    for name in card.tasks:
        print_table(
            console, f"{name}: accuracy on test images, %, and novelty", tables.methods(card, name)
        )
    console.print(_NOTES.format(top=card.top), style="dim", highlight=False)
    if card.compares_tasks:
        print_table(
            console,
            "Mean test accuracy, %, by task generated for and images tested on",
            tables.confusion(card),
        )
    shots = f", {card.shots} images a class" if card.shots else ""
    print_table(
        console, f"Sampling on {card.device}, seed {card.seed}{shots}", tables.sampling(card)
    )


def print_table(console: Console, title: str, content: tables.Table) -> None:
    """Prints a titled table; a wide one goes on below itself, its first column repeated."""
    head, body = content
    widths = [max(len(line[i]) for line in (head, *body)) + 2 for i in range(len(head))]
    parts: list[list[int]] = [[]]
    for column in range(1, len(head)):
        if parts[-1] and sum(widths[c] for c in (0, *parts[-1], column)) > console.width - 2:
            parts.append([])
        parts[-1].append(column)
    own = look("flown").label
    for number, columns in enumerate(parts):
        if not number:
            console.print(title, style="bold", highlight=False)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(head[0], no_wrap=True)
        for column in columns:
            table.add_column(head[column], justify="right", no_wrap=True)
        for line in body:
            cells = [line[column] for column in columns]
            table.add_row(line[0], *cells, style="bold" if line[0] == own else None)
        console.print(table)
