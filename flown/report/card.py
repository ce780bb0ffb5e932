"""The report card on a terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from flown.base.terminal import print_table
from flown.generator.card import SUPPORTS, Card
from flown.generator.heldout import HeldOutCard
from flown.report import plots, tables
from flown.report.page import Section, write_page
from flown.report.style import style_of
from flown.training import History

_NOTES = """\
top {top}: chosen on validation images, measured on test images.
L2 ratio: distance to the nearest training network, 0 for a copy, 1 for a held-out network.
max IoU: errors in common with a training network. IoU among: with the others of the row.
"""


_HELD_OUT = """\
Mean over tasks of all networks' accuracy, with half of its 95 % interval; differences are of pairs.
lookup: networks of the training task whose support sets are most alike.
"""


def print_card(card: Card | HeldOutCard, console: Console | None = None) -> None:
    """Prints every table of the card: one a task, then contexts and sampling."""
    console = console or Console()
    generated = style_of("flown").label
    if isinstance(card, HeldOutCard):
        title = f"{len(card.tasks)} tasks that no training saw, {card.shots} images a class"
        print_table(console, title, tables.held_out(card), generated)
        console.print(_HELD_OUT, style="dim", highlight=False)
        return
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
    card: Card | HeldOutCard,
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
    shared = {"lead": lead, "section": section, "card": card, "about": about}
    losses = plots.losses(histories)
    if isinstance(card, HeldOutCard):
        drawn = {"accuracies": plots.held_out(card), "losses": losses}
        content = tables.held_out(card)
        write_page(path, "heldout.html", title, table=content, figures=drawn, **shared)
        return
    figures = {
        "accuracies": plots.accuracies(card),
        "confusion": plots.confusion(card),
        "novelty": plots.novelty(card),
        "trajectory": plots.trajectory(card),
        "latents": plots.latents(card),
        "losses": losses,
    }
    write_page(
        path,
        "card.html",
        title,
        supports=SUPPORTS,
        summary=tables.summary(card),
        confusion=tables.confusion(card),
        sampling=tables.sampling(card),
        detail={name: tables.methods(card, name) for name in card.tasks},
        figures=figures,
        **shared,
    )
