"""The measurements behind the settings in `labelling`: each kind of head on validation classes of a set.

python -m flown.heads.validate mini_imagenet
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flown.anytask.model import AnyTask
from flown.context.backbones import features
from flown.heads import calibrate
from flown.heads.classifiers import accuracy, apply_heads
from flown.heads.features import load_backbone
from flown.heads.incontext import in_context
from flown.heads.labelling import BACKBONE, LINEAR, context_backbone
from flown.heads.written import NETWORKS, generator
from flown.measure.evaluate import probabilities
from flown.measure.interval import interval
from flown.tasks import ClassPool, Episodes, ManyClass, check_disjoint, load_many

_WRITTEN = 200  # tasks for which networks are written, which takes longer than a head


class Validated(NamedTuple):
    """Accuracy in percent of queries, with half its 95 % interval over tasks, and calibration."""

    head: str
    shots: int
    accuracy: float
    half: float
    temperature: float  # the most likely
    error: float  # expected calibration error at that temperature, percent


def validate(
    many: ManyClass, count: int = 600, ways: int = 5, queries: int = 15, seed: int = 0
) -> list[Validated]:
    """Each kind of head on its features, with 1 and with 5 images a class.

    Raises:
        FlownError: too few validation classes, images in one, or a class in two parts.
    """
    check_disjoint(many.class_split)
    backbone = load_backbone(BACKBONE)
    context, caml = context_backbone()
    model = generator()
    rows = torch.isin(many.labels, many.class_split["val"])
    images, pool = many.images[rows], ClassPool(many.labels[rows], many.class_split["val"])
    found = []
    for shots in (1, 5):
        drawn = pool.draw(ways, shots, queries, torch.Generator().manual_seed(seed), count)
        tasks = drawn.gather(features(backbone, images))
        tasks = tasks._replace(
            support=F.normalize(tasks.support, dim=2), query=F.normalize(tasks.query, dim=2)
        )
        for name, kind in LINEAR.items():
            logits = apply_heads(kind.heads(tasks.support, tasks.labels, ways), tasks.query)
            found.append(_measured(name, logits, tasks))
        tasks = drawn.gather(features(context, images))
        found.append(_measured("caml", in_context(tasks, caml), tasks))
        first = slice(_WRITTEN)
        written = _written(model, images, drawn.part(first))
        found.append(_measured("written", written, tasks.part(first)))
    return found


def _written(model: AnyTask, images: Tensor, drawn: Episodes) -> Tensor:
    """Log probabilities (T, N, W) by the vote of networks that are written for each task."""
    found = []
    for support, labels, query in zip(drawn.support, drawn.labels, drawn.query, strict=True):
        networks = model.generate(images[support], labels, NETWORKS)
        found.append(probabilities(networks, images[query]).log())
    return torch.stack(found)


def _measured(head: str, logits: Tensor, tasks: Episodes) -> Validated:
    right = accuracy(logits, tasks)
    flat, targets = logits.flatten(0, 1), tasks.targets.flatten()
    tau = calibrate.temperature(flat, targets)
    error = calibrate.calibration_error((flat / tau).softmax(dim=1), targets)
    mean, half, _ = interval(right)
    return Validated(head, tasks.shots, mean, half or 0.0, tau, error)


if __name__ == "__main__":
    for row in validate(load_many(sys.argv[1])):
        print(
            f"{row.head:10} {row.shots}-shot  {row.accuracy:.1f} ± {row.half:.1f} %  "
            f"temperature {row.temperature:.3g}  calibration error {row.error:.1f} %"
        )
