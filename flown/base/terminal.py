"""Prints to a terminal: lines and tables. Text is text: no markup, no control characters."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from flown.base.text import plain

Table = tuple[list[str], list[list[str]]]  # head and body


def say(console: Console, text: str, style: str = "") -> None:
    """Prints a line, which is neither wrapped nor highlighted."""
    console.print(_text(text, style), soft_wrap=True)


def print_table(
    console: Console, title: str, content: Table, bold: str = "", prose: bool = False
) -> None:
    """Prints a table under its title.

    A table that is wider than the terminal goes on below itself, its first column repeated.

    Args:
        bold: the first cell of the line that is set off.
        prose: cells are words and not figures: they are wrapped, and the table stays whole.
    """
    head, body = content
    if title:
        console.print(_text(title, "bold"))
    for columns in [list(range(1, len(head)))] if prose else _split(content, console.width - 2):
        table = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column(_text(head[0]), no_wrap=True)
        for column in columns:
            justify = "left" if prose else "right"
            table.add_column(_text(head[column]), justify=justify, no_wrap=not prose)  # type: ignore[arg-type]
        for line in body:
            cells = (_text(line[column]) for column in (0, *columns))
            table.add_row(*cells, style="bold" if bold and line[0] == bold else None)
        console.print(table)


def print_facts(console: Console, lines: list[tuple[str, str]]) -> None:
    """Prints names and texts in two columns, then an empty line."""
    table = Grid.grid(padding=(0, 2, 0, 0))
    for name, text in lines:
        table.add_row(_text(name), _text(text))
    console.print(table, highlight=False)
    console.print()


def _text(text: str, style: str = "") -> Text:
    return Text(plain(text), style)


def _split(content: Table, room: int) -> list[list[int]]:
    """Columns after the first, in groups that fit beside it."""
    head, body = content
    widths = [max(_text(line[i]).cell_len for line in (head, *body)) + 2 for i in range(len(head))]
    parts: list[list[int]] = [[]]
    for column in range(1, len(head)):
        if parts[-1] and sum(widths[c] for c in (0, *parts[-1], column)) > room:
            parts.append([])
        parts[-1].append(column)
    return parts
