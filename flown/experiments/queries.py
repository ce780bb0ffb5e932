"""Networks on the queries of the task they were written for, and figures over tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flown.experiments.unseen import Unseen
from flown.measure.interval import interval
from flown.measure.novelty import mutual_iou
from flown.tasks import Episodes
from flown.weights.batch import WeightBatch


class Judged(NamedTuple):
    """Accuracies (n,) of one task's networks and of their vote, overlap of errors, mean prediction."""

    accuracies: Tensor
    vote: float
    overlap: float
    mean: Tensor  # (Q, C)


def judged(batch: WeightBatch, images: Tensor, targets: Tensor) -> Judged:
    """Networks of one task on its queries (Q, c, H, W), uint8, with targets (Q,)."""
    p = _predicted(batch, images)
    wrong, average = p.argmax(dim=-1) != targets, p.mean(dim=0)
    accuracies = 100 - 100 * wrong.float().mean(dim=1)
    vote = 100 * float((average.argmax(dim=-1) == targets).float().mean())
    return Judged(accuracies, vote, mutual_iou(wrong), average)


def right(batch: WeightBatch, images: Tensor, tasks: Episodes, i: int) -> Tensor:
    """Mean accuracy in percent of networks on the queries of task i."""
    p = _predicted(batch, images[tasks.query[i]])
    return 100 * (p.argmax(dim=-1) == tasks.targets[i]).float().mean()


def record(row: Unseen, method: str, values: Iterable[Any]) -> dict[str, Any]:
    """Mean over tasks with the half-width of its 95 % interval."""
    average, half, tasks = interval(torch.tensor([float(value) for value in values]))
    return {
        "row": row.name,
        "method": method,
        "accuracy": round(average, 2),
        "interval": None if half is None else round(half, 2),
        "tasks": tasks,
    }


def mean(values: Iterable[float]) -> float:
    """Of what is no NaN; 0 of nothing."""
    kept = torch.tensor([value for value in values if value == value])
    return round(float(kept.mean()), 3) if len(kept) else 0.0


def _predicted(batch: WeightBatch, images: Tensor) -> Tensor:
    with torch.no_grad():
        return batch.logits(batch.preprocess(images.to(batch.vectors.device))).softmax(-1).cpu()
