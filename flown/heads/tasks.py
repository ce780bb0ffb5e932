"""Many n-way k-shot tasks at once, over a frozen backbone's features.

Axes: T tasks, W ways (classes a task), K shots and Q queries a class, F features.

    support (T, W K, F), query (T, W Q, F),   label of row i: i // K and i // Q

A task's classes are random ones of a part of all classes; the parts (meta-train, validation, test)
share none. Support and queries of a task share no image.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.context.backbones import features as features_of
from flown.tasks import load_folder

_BLOCK = 64  # tasks drawn from one generator: the first tasks are the same however many follow


class Tasks(NamedTuple):
    """T tasks of one size, rows sorted by class; `classes` (T, W) are the original class numbers."""

    support: Tensor
    query: Tensor
    ways: int
    shots: int
    queries: int
    classes: Tensor

    @property
    def labels(self) -> Tensor:
        """Of the support rows of every task, (W K,)."""
        return torch.arange(self.ways, device=self.support.device).repeat_interleave(self.shots)

    @property
    def targets(self) -> Tensor:
        """Of the query rows of every task, (W Q,)."""
        return torch.arange(self.ways, device=self.query.device).repeat_interleave(self.queries)

    def part(self, rows: slice | Tensor) -> Tasks:
        """Some of the tasks."""
        return self._replace(
            support=self.support[rows], query=self.query[rows], classes=self.classes[rows]
        )

    def first_shots(self, shots: int) -> Tasks:
        """The same tasks with the first `shots` support images of each class alone."""
        first = self.support.unflatten(1, (self.ways, self.shots))[:, :, :shots]
        return self._replace(support=first.flatten(1, 2), shots=shots)


def draw_tasks(
    features: Tensor,
    labels: Tensor,
    classes: Tensor,
    ways: int,
    shots: int,
    queries: int,
    count: int,
    seed: int = 0,
) -> Tasks:
    """`count` random tasks; the same seed gives the same ones, and the first the same for any count.

    Args:
        features: (N, ...): features, or anything else with a row an image; labels (N,).
        classes: the class numbers to choose from, as in `ManyClass.class_split`.

    Raises:
        FlownError: fewer classes than ways, or a class with too few images.
    """
    if min(ways, shots, queries, count) < 1:
        raise FlownError(f"tasks need {ways=}, {shots=}, {queries=} and {count=} of 1 or more")
    if ways > len(classes):
        raise FlownError(f"{ways} ways asked for, there are {len(classes)} classes")
    if len(labels) != len(features):
        raise FlownError(f"tasks: {len(features)} rows of features, {len(labels)} labels")
    rows, have = _rows(labels, classes, shots + queries)
    drawn = [
        _block(rows, have, ways, shots + queries, seed * 1_000_003 + start)
        for start in range(0, count, _BLOCK)
    ]
    which = torch.cat([block[0] for block in drawn])[:count]
    images = torch.cat([block[1] for block in drawn])[:count]  # (T, W, K + Q)
    support, query = (part.flatten(1) for part in images.split([shots, queries], dim=2))
    return Tasks(features[support], features[query], ways, shots, queries, classes[which])


def _rows(labels: Tensor, classes: Tensor, needed: int) -> tuple[Tensor, Tensor]:
    """Each class's rows, (C, most) with rubbish behind them, and how many there are, (C,)."""
    order = labels.argsort(stable=True)
    known = labels[order]
    first = torch.searchsorted(known, classes)
    have = torch.searchsorted(known, classes, right=True) - first
    if (have < needed).any():
        c, few = int(classes[have.argmin()]), int(have.min())
        raise FlownError(f"class {c} has {few} images, {needed} are needed")
    places = first[:, None] + torch.arange(int(have.max()))
    return order[places.clamp_max(len(order) - 1)], have


def _block(rows: Tensor, have: Tensor, ways: int, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Places in the list of classes (_BLOCK, W) and rows of images (_BLOCK, W, each)."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.rand(_BLOCK, len(rows), generator=generator).topk(ways).indices
    keys = torch.rand(_BLOCK, ways, rows.shape[1], generator=generator)
    keys[torch.arange(rows.shape[1]) >= have[which][..., None]] = -1  # rubbish is never chosen
    return which, rows[which].gather(2, keys.topk(each).indices)


def check_disjoint(class_split: Mapping[str, Tensor]) -> None:
    """Raises FlownError when two parts (`train`, `val`, `test`) share a class."""
    for one, other in combinations(class_split, 2):
        if shared := sorted(set(class_split[one].tolist()) & set(class_split[other].tolist())):
            raise FlownError(
                f"class {shared[0]} is in both '{one}' and '{other}'; what is measured on classes "
                "that were learnt from is no few-shot accuracy"
            )


def folder_tasks(
    path: Path, backbone: nn.Module, ways: int, shots: int, queries: int, count: int, seed: int = 0
) -> tuple[Tasks, tuple[str, ...]]:
    """Tasks over a folder with one sub-folder of images a class, and the classes' names.

    Args:
        backbone: from uint8 images (N, c, H, W) to features (N, F).

    Raises:
        FlownError: as `flown.tasks.load_folder` and `draw_tasks`.
    """
    images, names = load_folder(path)
    rows = features_of(backbone, images.images)
    classes = torch.arange(len(names))
    return draw_tasks(rows, images.labels, classes, ways, shots, queries, count, seed), names
