"""The report card on a terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from flown.base.terminal import print_table
from flown.generator.card import SUPPORTS, Card
from flown.report import plots, tables
from flown.report.page import Section, write_page
from flown.report.style import style_of
from flown.training import History

_NOTES = """\
top {top}: chosen on validation images, measured on test images.
L2 ratio: distance to the nearest training network, 0 for a copy, 1 for a held-out network.
max IoU: errors in common with a training network. IoU among: with the others of the row.
"""


def print_card(card: Card, console: Console | None = None) -> None:
    """Prints every table of the card: one a task, then contexts and sampling."""
    console = console or Console()
    generated = style_of("flown").label
    for name in card.tasks:
        title = f"{name}: accuracy on test images, %, and novelty"
        print_table(console, title, tables.methods(card, name), generated)
    console.print(_NOTES.format(top=card.top), style="dim", highlight=False)
    if card.compares_tasks:
        title = "Mean test accuracy, %, by task generated for and images tested on"
        print_table(console, title, tables.confusion(card))
    shots = f", {card.shots} images a class" if card.shots else ""
    title = f"Sampling on {card.device}, seed {card.seed}{shots}"
    print_table(console, title, tables.sampling(card))


def write_report(
    path: Path | str,
    title: str,
    card: Card,
    histories: Mapping[str, History],
    about: Mapping[str, Any],
    lead: str = "",
    section: Section | None = None,
) -> None:
    """Writes the report card as one HTML file.

    Args:
        histories: loss curves by name.
        about: provenance, shown in full at the end.
        lead: a sentence or two under the title.
        section: an experiment's own table, shown before the card's.

    Raises:
        FlownError: the file cannot be written.
    """
    figures = {
        "accuracies": plots.accuracies(card),
        "confusion": plots.confusion(card),
        "novelty": plots.novelty(card),
        "trajectory": plots.trajectory(card),
        "latents": plots.latents(card),
        "losses": plots.losses(histories),
    }
    write_page(
        path,
        "card.html",
        title,
        lead=lead,
        section=section,
        card=card,
        supports=SUPPORTS,
        summary=tables.summary(card),
        confusion=tables.confusion(card),
        sampling=tables.sampling(card),
        detail={name: tables.methods(card, name) for name in card.tasks},
        figures=figures,
        about=about,
    )
