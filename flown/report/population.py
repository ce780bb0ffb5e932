"""A zoo's population on a terminal and as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape as escape_markup
from rich.table import Table
from rich.text import Text

from flown.base.printable import Console
from flown.report import html, population_plots, tables, terminal
from flown.report.style import encode
from flown.zoo import Zoo
from flown.zoo.inspect.population import Population, Spread, TaskPopulation, groups
from flown.zoo.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNKNOWN = "unknown"
_LISTED = 5  # duplicates and broken networks that are named one by one
Lines = list[tuple[str, str]]

_CSS = """
table.facts td { border: 0; text-align: left; white-space: normal; padding: .12rem 1rem .12rem .3rem; }
table.facts td:first-child { color: #444; white-space: nowrap; vertical-align: top; }
table.facts { margin: .5rem 0 1.4rem; }
"""


def zoo_table(zoo: Zoo) -> Table:
    """The networks of each task, split and epoch with their mean accuracies, from the index."""
    table = Table("task", "net", "weights", "split", "epoch", "networks", "train %", "validation %")
    for task in zoo.tasks:
        layout = zoo.layout(task)
        for group in groups(zoo, task):
            means = (UNKNOWN if x is None else f"{x.mean:.1f}" for x in (group.train, group.val))
            table.add_row(
                task,
                layout.net,
                str(layout.size),
                group.split,
                str(group.epoch),
                str(group.networks),
                *means,
            )
    return table


def accuracy_rows(zoo: Zoo, task: str) -> tuple[list[str], list[list[str]]]:
    """Head and body of a task's table: a row per split and epoch, from the index."""
    head = ["split, epoch", "networks", "train %", "min – max", "validation %", "min – max"]
    body = [
        [
            f"{group.split}, {group.epoch:g}",
            str(group.networks),
            *_accuracy(group.train),
            *_accuracy(group.val),
        ]
        for group in groups(zoo, task)
    ]
    return head, body


def facts(task: TaskPopulation) -> Lines:
    """What was measured, a name and a text each."""
    d, m = task.distances, task.norm.n if task.norm else 0
    return [
        ("apart", f"{_figure(Spread.of(d.pairs.tolist()))}, L2 of two among {m} training networks"),
        (
            "nearest",
            f"{_figure(Spread.of(d.nearest.tolist()))} from a training network to another, "
            f"{_figure(Spread.of(d.held_out.tolist()))} from a held-out one",
        ),
        ("norm", _figure(task.norm)),
        ("NaN or Inf", _broken(task)),
        ("duplicates", _duplicates(task)),
        ("dead units", _dead(task)),
        (
            "on disk",
            f"{_bytes(task.size)} in {_count(task.shards, 'shard')}, "
            f"{_count(task.checkpoints, 'checkpoint')} of {task.weights:,} weights",
        ),
    ]


def named(task: TaskPopulation) -> Lines:
    """The networks to look at one by one: those that hold NaN or Inf, and duplicates."""
    lines = [("NaN or Inf", _name(row)) for row in task.broken[:_LISTED]]
    lines += [
        ("the same", " = ".join(map(_name, rows[:_LISTED])) + _more(rows))
        for rows in task.duplicates[:_LISTED]
    ]
    for what, found in (("NaN or Inf", task.broken), ("the same", task.duplicates)):
        if more := _more(found):
            lines.append((what, more.strip()))
    return lines


def print_accuracies(zoo: Zoo, console: Console) -> None:
    """A table per task by split and epoch, from the index alone: no weight is read."""
    for name in zoo.tasks:
        layout = zoo.layout(name)
        title = escape_markup(f"{name}: {layout.net}, {layout.size:,} weights")
        terminal.print_table(console, title, accuracy_rows(zoo, name))


def print_population(population: Population, console: Console) -> None:
    """What was measured on each task's networks, and which of them to look at."""
    for task in population.tasks:
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, text in facts(task):
            table.add_row(Text(name), Text(text))
        for name, text in named(task):
            table.add_row("", Text(f"{name}: {text}"))
        console.print(Text(task.task, style="bold"))
        console.print(table, highlight=False)
        console.print()


def write_population(path: Path | str, zoo: Zoo, population: Population) -> None:
    """Writes tables and figures into one HTML file that needs nothing else.

    Raises:
        FlownError: the file cannot be written.
    """
    title = f"Population of {zoo.path.resolve().name}"
    count = _count(len(zoo), "checkpoint")
    looked = sum(task.looked for task in population.tasks)
    parts = [
        html.note(
            f"{count} of {_count(len(zoo.tasks), 'task')} in {zoo.path}; the weights of {looked:,} "
            "were looked at."
        ),
    ]
    parts.append("<h2>In numbers</h2>")
    for task in population.tasks:
        parts.append(f"<h3>{escape(task.task)}: {escape(task.net)}</h3>")
        parts.append(html.table_html(*accuracy_rows(zoo, task.task)))
        parts.append(_list(facts(task) + named(task)))
    parts += _sections(zoo, population)
    html.write_page(path, title, parts, css=_CSS)


def _sections(zoo: Zoo, population: Population) -> Iterator[str]:
    drawn: list[tuple[str, Figure | None, str, str]] = [
        (
            "Accuracy by epoch",
            population_plots.accuracies(zoo, population),
            "Validation accuracy: a faint line (or, of one epoch, a dot) is a network, the bold line "
            "is the mean of its split.",
            "No validation accuracy is known.",
        ),
        (
            "Accuracy, network by network",
            population_plots.spreads(zoo, population),
            "Share of each split's networks by validation accuracy of their last checkpoint: splits "
            "by seed should look alike.",
            "No validation accuracy is known.",
        ),
        (
            "Distances",
            population_plots.distances(population),
            "Between the last checkpoints of sampled networks. Held-out networks should lie as far "
            "from the training networks as these lie from each other; a distance of 0 is a copy.",
            "Needs two training networks.",
        ),
        (
            "Directions",
            population_plots.plane(population),
            "Weights in the two directions in which they differ most, a mark a checkpoint; lines "
            "join the epochs of a network to its last, the large mark. Ringed: held-out networks.",
            "Needs three checkpoints that differ.",
        ),
    ]
    for name, page, caption, instead in drawn:
        yield html.figure(name, page, caption) if page else _missing(name, instead)
    yield "<h2>Weights</h2>" + html.note(
        "Each tensor's weights over the sampled training networks, up to four deviations from "
        "the mean, with mean ± standard deviation."
    )
    for task in population.tasks:
        histograms = population_plots.weights(task)
        yield f"<h3>{escape(task.task)}</h3>" + (
            f'<img alt="weights of {escape(task.task)}" '
            f'src="data:image/png;base64,{encode(histograms)}">'
            if histograms
            else html.note("No network to look at.")
        )
    yield _dead_section(population)


def _dead_section(population: Population) -> str:
    caption = (
        "Units that are the same for every image tell nothing: percent of a hidden layer's, "
        "the mean over sampled training networks."
    )
    page = population_plots.dead(population)
    if page is None and any(task.dead is not None for task in population.tasks):
        caption += " There is none."
    if unseen := [f"{t.task}: {t.dead_note}" for t in population.tasks if t.dead is None]:
        caption += f" Unknown for {'; '.join(unseen)}."
    return html.figure("Dead units", page, caption) if page else _missing("Dead units", caption)


def _missing(name: str, why: str) -> str:
    return f"<h2>{escape(name)}</h2>" + html.note(why)


def _list(lines: Lines) -> str:
    rows = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in lines)
    return f'<table class="facts">{rows}</table>'


def _accuracy(spread: Spread | None) -> tuple[str, str]:
    if spread is None:
        return UNKNOWN, tables.NONE
    std = "" if spread.std is None else f" ± {spread.std:.1f}"
    return f"{spread.mean:.1f}{std}", f"{spread.low:.1f} – {spread.high:.1f}"


def _figure(spread: Spread | None) -> str:
    if spread is None:
        return UNKNOWN
    return f"{spread.mean:.4g}" + ("" if spread.std is None else f" ± {spread.std:.2g}")


def _broken(task: TaskPopulation) -> str:
    of = f"{task.looked:,} of {task.checkpoints:,} checkpoints read"
    return f"{of}, {len(task.broken):,} hold NaN or Inf" if task.broken else f"{of}, all finite"


def _duplicates(task: TaskPopulation) -> str:
    if not task.duplicates:
        return f"none among {task.checkpoints:,} checkpoints"
    text = (
        f"{sum(map(len, task.duplicates)):,} checkpoints in "
        f"{_count(len(task.duplicates), 'group')} of equal weights"
    )
    if across := sum(len({row.split for row in rows}) > 1 for rows in task.duplicates):
        text += f"; {_count(across, 'group')} in training and held-out at once"
    return text


def _dead(task: TaskPopulation) -> str:
    if task.dead is None:
        return f"{UNKNOWN} ({task.dead_note})"
    layers = ", ".join(f"{x.name}: {x.dead:.1f} %" for x in task.dead) or "no hidden layer"
    return f"{layers} ({task.dead_note})"


def _name(row: Row) -> str:
    return f"model {row.model} (seed {row.seed}, epoch {row.epoch:g}, {row.split})"


def _more(found: Sequence[object]) -> str:
    return f" and {len(found) - _LISTED:,} more" if len(found) > _LISTED else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
