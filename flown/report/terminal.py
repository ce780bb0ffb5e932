"""The report card on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from flown.card import Card
from flown.report import tables

_TITLES = {
    tables.methods: "Accuracy on test images, %, and novelty against the zoo's training networks",
    tables.confusion: "Mean test accuracy, %, of networks generated for one task on another's images",
    tables.sampling: "Sampling",
}


def print_card(card: Card, console: Console | None = None) -> None:
    """Prints every table of the card."""
    console = console or Console()
    for make, title in _TITLES.items():
        head, body = make(card)
        table = Table(title=title, title_justify="left", title_style="bold")
        for place, name in enumerate(head):
            table.add_column(name, justify="left" if place < 2 else "right")
        last = None
        for line in body:
            if last is not None and line[0] != last and make is tables.methods:
                table.add_section()
            shown = "" if line[0] == last and make is tables.methods else line[0]
            style = "bold" if line[1] == "generated" else None
            table.add_row(shown, *line[1:], style=style)
            last = line[0]
        console.print(table)
