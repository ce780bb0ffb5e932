"""The report card's tables as plain rows, for the terminal and for HTML alike.

Accuracies have one decimal, ratios and IoU two. A figure that could not be measured is a dash.
"""

from __future__ import annotations

from torch import Tensor

from flown.base.terminal import Table
from flown.generator.card import Card
from flown.generator.heldout import HeldOutCard
from flown.measure.interval import Interval
from flown.measure.reference import Measured
from flown.report.plots import ordered
from flown.report.style import style_of

NONE = "–"


def summary(card: Card) -> Table:
    """Mean and deviation of all networks: a row per method, a column per task."""
    methods = list(dict.fromkeys(m for task in card.tasks.values() for m in ordered(task.methods)))
    body = [
        [
            style_of(m).label,
            *(_mean(t.methods[m].test) if m in t.methods else NONE for t in card.tasks.values()),
        ]
        for m in methods
    ]
    return ["networks", *card.tasks], body


def methods(card: Card, task: str) -> Table:
    """One task's methods: accuracy over all networks, the chosen few, novelty, diversity."""
    head = [
        "networks",
        "n",
        "mean ± std",
        "median",
        "min – max",
        f"top {card.top}",
        "L2 ratio",
        "max IoU",
        "IoU among",
    ]
    body = []
    for method in ordered(card.tasks[task].methods):
        m = card.tasks[task].methods[method]
        body.append(
            [
                style_of(method).label,
                str(len(m.test)),
                _mean(m.test),
                f"{float(m.test.quantile(0.5)):.1f}",
                f"{float(m.test.min()):.1f} – {float(m.test.max()):.1f}",
                _top(m, card.top, method),
                _figure(m.ratio),
                _figure(m.iou),
                NONE if m.diversity is None else f"{m.diversity:.2f}",
            ]
        )
    return head, body


def confusion(card: Card) -> Table:
    """Mean accuracy of networks generated for the row's task on the column's images."""
    body = []
    for (name, task), row in zip(card.tasks.items(), card.confusion, strict=True):
        cells = [NONE if v is None else f"{v:.1f}" for v in row]
        shuffled = NONE if task.shuffled is None else _mean(task.shuffled)
        body.append([name, *cells, shuffled])
    return ["generated for", *(f"on {name}" for name in card.tasks), "others' context"], body


def sampling(card: Card) -> Table:
    """The cost of samples, and how often the lookup named the support set's task."""
    body = [
        [
            name,
            str(card.n),
            card.solver,
            str(card.steps),
            str(task.nfe),
            f"{task.seconds:.1f}",
            NONE if task.recognised is None else f"{task.recognised:.0f} %",
        ]
        for name, task in card.tasks.items()
    ]
    return ["task", "networks", "solver", "steps", "NFE", "seconds", "recognised"], body


def held_out(card: HeldOutCard) -> Table:
    """Mean accuracy over tasks and what generated networks are ahead by, with their intervals."""
    body = []
    for method in ordered(card.accuracies):
        mean, ahead = card.mean(method), card.ahead(method)
        behind = NONE if method == "flown" else _interval(ahead, "+.1f")
        body.append([style_of(method).label, _interval(mean, ".1f"), behind, str(mean.tasks)])
    return ["networks", "accuracy, %", "generated minus it", "tasks"], body


def _interval(found: Interval, form: str) -> str:
    half = "" if found.half is None else f" ± {found.half:.1f}"
    return f"{found.mean:{form}}{half}"


def _mean(values: Tensor) -> str:
    spread = f" ± {float(values.std()):.1f}" if len(values) > 1 else ""
    return f"{float(values.mean()):.1f}{spread}"


def _top(m: Measured, k: int, method: str) -> str:
    if len(m.test) <= k or method.startswith("reconstruction"):
        return NONE
    return f"{float(m.top(k).mean()):.1f}"


def _figure(values: Tensor | None) -> str:
    return NONE if values is None else f"{float(values.mean()):.2f}"
