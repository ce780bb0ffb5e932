"""A zoo's population on a terminal and as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from flown.base.terminal import Table, print_facts, print_table, say
from flown.report import population_plots, tables
from flown.report.page import write_page
from flown.zoo import Zoo
from flown.zoo.inspect.population import Population, Spread, TaskPopulation, groups
from flown.zoo.rows import Row

UNKNOWN = "unknown"
_LISTED = 5  # duplicates and broken networks that are listed
Lines = list[tuple[str, str]]


def zoo_table(zoo: Zoo) -> Table:
    """The networks of each task, split and epoch with their mean accuracies, from the index."""
    head = ["task", "net", "weights", "split", "epoch", "networks", "train %", "validation %"]
    body = []
    for task in zoo.tasks:
        layout = zoo.layout(task)
        for group in groups(zoo, task):
            means = (UNKNOWN if x is None else f"{x.mean:.1f}" for x in (group.train, group.val))
            size, epoch, count = str(layout.size), str(group.epoch), str(group.networks)
            body.append([task, layout.net, size, group.split, epoch, count, *means])
    return head, body


def accuracy_rows(zoo: Zoo, task: str) -> Table:
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
    """The measurements, a name and a text each."""
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
        if remainder := _more(found):
            lines.append((what, remainder.strip()))
    if task.distances.are_neighbours:
        lines.append(("held out", "far nearer to training networks than these to each other"))
    return lines


def print_accuracies(zoo: Zoo, console: Console) -> None:
    """A table per task by split and epoch, from the index alone: no weight is read."""
    for name in zoo.tasks:
        layout = zoo.layout(name)
        title = f"{name}: {layout.net}, {layout.size:,} weights"
        print_table(console, title, accuracy_rows(zoo, name))


def print_population(population: Population, console: Console) -> None:
    """Prints the measurements of each task, and which networks to look at."""
    for task in population.tasks:
        say(console, task.task, "bold")
        lines = [*facts(task), *(("", f"{name}: {text}") for name, text in named(task))]
        print_facts(console, lines)


def write_population(path: Path | str, zoo: Zoo, population: Population) -> None:
    """Writes tables and figures into one HTML file that needs nothing else.

    Raises:
        FlownError: the file cannot be written.
    """
    looked = sum(task.looked for task in population.tasks)
    write_page(
        path,
        "population.html",
        f"Population of {zoo.path.resolve().name}",
        lead=f"{_count(len(zoo), 'checkpoint')} of {_count(len(zoo.tasks), 'task')} in {zoo.path}; "
        f"the weights of {looked:,} were read.",
        tasks=[
            {
                "name": task.task,
                "net": task.net,
                "accuracies": accuracy_rows(zoo, task.task),
                "facts": facts(task) + named(task),
                "histograms": population_plots.weights(task),
            }
            for task in population.tasks
        ],
        figures={
            "accuracies": population_plots.accuracies(zoo, population),
            "spreads": population_plots.spreads(zoo, population),
            "distances": population_plots.distances(population),
            "plane": population_plots.plane(population),
            "dead": population_plots.dead(population),
        },
        dead_note=_dead_note(population),
    )


def _dead_note(population: Population) -> str:
    text = (
        "Units with the same value for every image carry no information: percent of a hidden "
        "layer's units, the mean over sampled training networks."
    )
    counted = [layer for task in population.tasks for layer in task.dead or ()]
    if counted and not any(layer.dead for layer in counted):
        text += " There are none."
    if unseen := [f"{t.task}: {t.dead_note}" for t in population.tasks if t.dead is None]:
        text += f" Unknown for {'; '.join(unseen)}."
    return text


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
