"""The report card's tables as plain rows, for the terminal and for HTML alike."""

from __future__ import annotations

from torch import Tensor

from flown.card import Card, Measured
from flown.report.style import LABELS

Table = tuple[list[str], list[list[str]]]


def methods(card: Card) -> Table:
    """Per task and method: accuracy over all networks, the chosen few, novelty, diversity."""
    head = ["task", "networks", "n", "mean ± std", "median", "min – max",
            f"top {card.top} (by validation)", "L2 ratio", "max IoU", "IoU among"]  # fmt: skip
    body = []
    for name, task in card.tasks.items():
        for method, m in task.methods.items():
            body.append([name, LABELS[method], str(len(m.test)), _mean(m.test),
                         f"{float(m.test.median()):.1f}",
                         f"{float(m.test.min()):.1f} – {float(m.test.max()):.1f}",
                         _top(m, card.top, method), _figure(m.ratio), _figure(m.iou),
                         "" if m.diversity is None else f"{m.diversity:.2f}"])  # fmt: skip
    return head, body


def confusion(card: Card) -> Table:
    """Mean accuracy of networks generated for the row's task on the column's images."""
    body = [
        [name, *("–" if v is None else f"{v:.1f}" for v in row),
         "" if card.tasks[name].shuffled is None else f"{card.tasks[name].shuffled:.1f}"]
        for name, row in zip(card.tasks, card.confusion, strict=True)
    ]  # fmt: skip
    return ["generated for", *(f"on {name}" for name in card.tasks), "other task's context"], body


def sampling(card: Card) -> Table:
    """What a sample costs."""
    body = [
        [name, str(card.n), card.solver, str(card.steps), str(task.nfe), f"{task.seconds:.2f}"]
        for name, task in card.tasks.items()
    ]
    return ["task", "networks", "solver", "steps", "NFE", "seconds, all networks"], body


def _mean(values: Tensor) -> str:
    return f"{float(values.mean()):.1f} ± {float(values.std()) if len(values) > 1 else 0:.1f}"


def _top(m: Measured, k: int, method: str) -> str:
    if len(m.test) <= k or method.startswith("reconstruction"):
        return ""
    return f"{float(m.top(k).mean()):.1f}"


def _figure(values: Tensor | None) -> str:
    return "" if values is None else f"{float(values.mean()):.2f}"
