"""What the choices in `labelling` rest on: every kind of head on tasks of a set's validation classes.

python -m flown.heads.validate mini_imagenet
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from flown.context.backbones import features
from flown.heads import calibrate
from flown.heads.classifiers import accuracy, apply_heads
from flown.heads.features import load_backbone
from flown.heads.incontext import in_context
from flown.heads.labelling import BACKBONE, LINEAR, context_backbone
from flown.heads.tasks import Tasks, check_disjoint, draw_tasks
from flown.tasks import ManyClass, load_many


class Validated(NamedTuple):
    """Percent of queries with half its 95 % interval over tasks, and what suits the confidences."""

    head: str
    shots: int
    accuracy: float
    half: float
    temperature: float  # the likeliest
    error: float  # expected calibration error at that temperature, percent


def validate(
    many: ManyClass, count: int = 600, ways: int = 5, queries: int = 15, seed: int = 0
) -> list[Validated]:
    """Every kind of head on the features it is for, with 1 and with 5 images a class.

    Raises:
        FlownError: too few validation classes, images in one, or a class in two parts.
    """
    check_disjoint(many.class_split)
    context, caml = context_backbone()
    found = []
    for shots in (1, 5):
        size = (ways, shots, queries, count, seed)
        tasks = _tasks(many, load_backbone(BACKBONE), size)
        tasks = tasks._replace(
            support=F.normalize(tasks.support, dim=2), query=F.normalize(tasks.query, dim=2)
        )
        labels = tasks.labels.expand(count, -1)
        for name, kind in LINEAR.items():
            logits = apply_heads(kind.heads(tasks.support, labels, ways), tasks.query)
            found.append(_measured(name, logits, tasks))
        tasks = _tasks(many, context, size)
        found.append(_measured("caml", in_context(tasks, caml), tasks))
    return found


def _tasks(many: ManyClass, backbone: nn.Module, size: tuple[int, int, int, int, int]) -> Tasks:
    classes = many.class_split["val"]
    rows = torch.isin(many.labels, classes)
    return draw_tasks(features(backbone, many.images[rows]), many.labels[rows], classes, *size)


def _measured(head: str, logits: torch.Tensor, tasks: Tasks) -> Validated:
    right = accuracy(logits, tasks)
    flat, targets = logits.flatten(0, 1), tasks.targets.repeat(len(logits))
    tau = calibrate.temperature(flat, targets)
    error = calibrate.calibration_error((flat / tau).softmax(dim=1), targets)
    half = 1.96 * float(right.std()) / len(right) ** 0.5
    return Validated(head, tasks.shots, float(right.mean()), half, tau, error)


if __name__ == "__main__":
    for row in validate(load_many(sys.argv[1])):
        print(
            f"{row.head:10} {row.shots}-shot  {row.accuracy:.1f} ± {row.half:.1f} %  "
            f"temperature {row.temperature:.3g}  calibration error {row.error:.1f} %"
        )
