"""One self-contained HTML file: tables, figures, provenance; nothing is fetched, nothing runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flown.base.files import write_text
from flown.base.printable import printable
from flown.generator.card import SUPPORTS, Card
from flown.report import plots, tables
from flown.report.style import encode, look
from flown.training import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto;
       max-width: 74rem; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin-bottom: .4rem; } h2 { font-size: 1.25rem; margin-top: 2.6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p.note, figcaption { max-width: 50rem; color: #444; margin: .3rem 0 .8rem; }
.wide { overflow-x: auto; } figure { margin: 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .8rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #999; } td { border-bottom: 1px solid #e6e6e6; }
th:first-child, td:first-child { text-align: left; padding-left: .3rem; }
tr.own td { font-weight: 600; background: #fdf1ea; }
img { max-width: 100%; height: auto; }
pre { font-size: .8rem; overflow-x: auto; background: #f6f6f6; padding: 1rem; }
"""


def write_report(
    path: Path | str,
    title: str,
    card: Card,
    histories: Mapping[str, History],
    about: Mapping[str, Any],
    lead: str = "",
    extra: str = "",
) -> None:
    """Writes the report.

    Args:
        histories: loss curves by name.
        about: provenance, shown in full at the end.
        lead: a sentence or two under the title; `extra`: HTML put before the tables.

    Raises:
        FlownError: the file cannot be written.
    """
    parts = [note(lead) if lead else "", extra, *_tables(card), *_figures(card, histories)]
    parts += [
        "<h2>In detail</h2>",
        note(
            f"Percent of test images. Top {card.top} networks are chosen on validation images and "
            "measured on test images. L2 ratio: distance to the nearest training network, 0 for a "
            "copy, 1 for a held-out network. Max IoU: share of errors in common with the training "
            "network that is most alike; IoU among: with the row's other networks. Rebuilt: encoded "
            "and decoded again. Lookup: training networks themselves. Gaussian: every weight drawn by "
            "its own mean and deviation."
        ),
    ]
    for name in card.tasks:
        parts.append(f"<h3>{escape(name)}</h3>" + table_html(*tables.methods(card, name)))
    write_page(path, title, parts, about)


def write_page(
    path: Path | str,
    title: str,
    parts: Iterable[str],
    about: Mapping[str, Any] | None = None,
    css: str = "",
) -> None:
    """Writes HTML fragments as one page, whole, under its title; empty ones are left out.

    Args:
        about: provenance, shown in full at the end. css: rules beside those of all pages.

    Raises:
        FlownError: the file cannot be written.
    """
    record = ""
    if about is not None:
        text = json.dumps(about, indent=1, ensure_ascii=False)
        record = f"<h2>Provenance</h2><pre>{escape(text)}</pre>"
    body = "\n".join(part for part in (f"<h1>{escape(title)}</h1>", *parts, record) if part)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_CSS}{css}</style>"
    )
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'
    write_text(path, printable(page))


def _tables(card: Card) -> list[str]:
    origin = f"from {SUPPORTS} support sets of {card.shots} images a class"
    parts = [
        "<h2>Accuracy</h2>",
        note(
            f"Mean ± standard deviation over all networks, none chosen, in percent of test images; "
            f"{card.n} networks a task were generated {origin if card.shots else 'unconditionally'}."
        ),
        table_html(*tables.summary(card)),
    ]
    if card.compares_tasks:
        parts += [
            "<h2>Contexts</h2>",
            note(
                "Networks generated for the row's task, tested on the column's images; in the last "
                "column they were generated for the row's task from other tasks' support sets."
            ),
            table_html(*tables.confusion(card)),
        ]
    parts += [
        "<h2>Sampling</h2>",
        note(
            f"Seconds for all of a task's networks on {card.device}; NFE: evaluations of the velocity "
            "network a sample; recognised: support sets whose task the model told by itself."
        ),
        table_html(*tables.sampling(card)),
    ]
    return parts


def _figures(card: Card, histories: Mapping[str, History]) -> list[str]:
    drawn = [
        (
            "Every network",
            plots.accuracies(card),
            "Each dot is one network on test images, the black bar and the number their mean, the "
            "dotted line the mean of the zoo's training networks.",
        ),
        (
            "Does the context decide?",
            plots.confusion(card),
            "Mean test accuracy, %: where the context decides, the diagonal is dark and the rest "
            "pale; a dash stands where class counts differ.",
        ),
        (
            "New or copied?",
            plots.novelty(card),
            "Right is new, up is accurate: copies of training networks lie at 0, networks trained "
            "from another seed around 1 (dotted); beyond 1 the axis is logarithmic.",
        ),
        (
            "On the way from noise to weights",
            plots.trajectory(card),
            f"Networks decoded along the flow ({card.steps} {card.solver} steps): mean accuracy and, "
            "shaded, standard deviation; dotted: the mean of the zoo's training networks.",
        ),
        (
            "Latents",
            plots.latents(card),
            "The zoo's first two principal directions: samples start at the source and should end "
            "among the task's networks; lines are the paths of some of them.",
        ),
        (
            "Training",
            plots.losses(histories),
            "Losses by step; held-out networks are never trained on, so the gap between the two "
            "curves of rebuilt networks is what the encoder has learnt by heart.",
        ),
    ]
    return [figure(name, page, caption) for name, page, caption in drawn if page is not None]


def table_html(head: list[str], body: list[list[str]]) -> str:
    """A table; the rows of generated networks are set off."""
    own = look("flown").label
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = []
    for line in body:
        row = "".join(f"<td>{escape(cell)}</td>" for cell in line)
        lines.append(f'<tr class="own">{row}</tr>' if line[0] == own else f"<tr>{row}</tr>")
    return f'<div class="wide"><table><tr>{cells}</tr>{"".join(lines)}</table></div>'


def note(text: str) -> str:
    """A paragraph that explains."""
    return f'<p class="note">{escape(text)}</p>'


def figure(name: str, page: Figure, caption: str) -> str:
    """A titled figure with its caption."""
    image = f'<img alt="{escape(name)}" src="data:image/png;base64,{encode(page)}">'
    note = f"<figcaption>{escape(caption)}</figcaption>"
    return f"<h2>{escape(name)}</h2>\n<figure>{note}{image}</figure>"
