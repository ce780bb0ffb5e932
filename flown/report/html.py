"""One self-contained HTML file: tables, figures, provenance; nothing is fetched, no script runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flown.card import Card
from flown.files import write_text
from flown.report import plots, tables
from flown.report.style import encode
from flown.training import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto;
       max-width: 72rem; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.note { max-width: 48rem; color: #444; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.own td { font-weight: 600; background: #fdf1ea; } tr.first td { border-top: 2px solid #999; }
img { max-width: 100%; height: auto; } pre { font-size: .8rem; overflow-x: auto; background: #f6f6f6;
padding: 1rem; }
"""


def write_report(path: Path | str, title: str, card: Card, histories: Mapping[str, History],
                 about: Mapping[str, Any], lead: str = "", extra: str = "") -> None:  # fmt: skip
    """Writes the report.

    Args:
        histories: loss curves by name.
        about: provenance, shown in full at the end.
        lead: a sentence or two under the title; `extra`: HTML put before the tables.
    """
    figures = [
        ("Accuracy of every network", plots.accuracies(card),
         "Each dot is one network on test images; the black bar is the mean, the dotted line the "
         "mean of the zoo's training networks."),
        ("Does the context decide?", plots.confusion(card),
         "Rows: the support set that conditioned generation. Columns: the images tested on. A good "
         "generator is best on the diagonal of every column."),
        ("New or copied?", plots.novelty(card),
         "Left is close to a training network, 1 (dotted) is as far away as a network trained from "
         "another seed. Up is accurate. Copies sit at the upper left."),
        ("On the way from noise to weights", plots.trajectory(card),
         f"Ten networks a task, decoded along the flow; dotted: the zoo's mean. {card.steps} "
         f"{card.solver} steps."),
        ("Training", plots.losses(dict(histories)),
         "Losses on a logarithmic scale; held-out networks are never trained on, so the gap between "
         "the two reconstruction curves is what the encoder has learnt by heart."),
        ("Latents", plots.latents(card),
         "The zoo's first two principal directions; lines are the paths of ten samples."),
    ]  # fmt: skip
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="note">{escape(lead)}</p>' if lead else "", extra]
    parts += [
        _section("Figures of merit", _table(tables.methods(card)),
                 "Percent of test images. “Top” networks are chosen on validation images and measured "
                 "on test images. L2 ratio and max IoU compare with the zoo's training networks; IoU "
                 "among is the agreement of errors within the row's own networks."),
        _section("Contexts", _table(tables.confusion(card)), ""),
        _section("Sampling", _table(tables.sampling(card)), ""),
    ]  # fmt: skip
    parts += [_section(name, _image(page, name), caption) for name, page, caption in figures if page]
    record = escape(json.dumps(about, indent=1, ensure_ascii=False))
    parts.append(f"<h2>Provenance</h2><pre>{record}</pre>")
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_CSS}</style>'
    body = "\n".join(parts)
    write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n')


def table_html(head: list[str], body: list[list[str]]) -> str:
    """A table; a row whose second cell says "generated" is set off."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines, last = [], None
    for line in body:
        classes = " ".join(
            name for name, on in (("own", line[1] == "generated"), ("first", line[0] != last)) if on
        )
        last = line[0]
        row = "".join(f"<td>{escape(cell)}</td>" for cell in line)
        lines.append(f'<tr class="{classes}">{row}</tr>')
    return f'<div class="wide"><table><tr>{cells}</tr>{"".join(lines)}</table></div>'


def _table(table: tables.Table) -> str:
    return table_html(*table)


def _section(name: str, content: str, caption: str) -> str:
    note = f'<p class="note">{escape(caption)}</p>' if caption else ""
    return f"<h2>{escape(name)}</h2>{note}{content}"


def _image(page: Figure, name: str) -> str:
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{encode(page)}">'
