"""Where Table 3's networks begin: generated, freshly initialised, or taken from a zoo."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from flown.baselines import nearest, random_init
from flown.data import ImageData, draw_support
from flown.evaluate import evaluate
from flown.model import Flown
from flown.weights import WeightBatch
from flown.zoo import Zoo

INITS = ("recipe-init", "default-init", "kaiming")


class Starts(NamedTuple):
    """n networks a method, and the task that was recognised.

    All have the recognised task's activation and preprocessing, but `best-lookup`: checkpoints of
    its own task. `votes` of n support sets chose the task.
    """

    batches: dict[str, WeightBatch]
    task: str
    votes: int


def generated(model: Flown, images: ImageData, n: int, steps: int,
              seed: int) -> tuple[WeightBatch, int]:  # fmt: skip
    """n networks, each from a support set of its own, for the task that most of these look like.

    Also returns how many they were.
    """
    draw, classes = torch.Generator().manual_seed(seed + 20_011), len(images.classes)
    shots = model.config.context.shots
    supports = [draw_support(images.train, classes, shots, draw) for _ in range(n)]
    votes = Counter(
        model.recognise(model.context(some.images, some.labels, seed + i))
        for i, some in enumerate(supports)
    )
    task, count = votes.most_common(1)[0]
    batches = [model.generate(some.images, some.labels, 1, seed + i, steps=steps, task=task)
               for i, some in enumerate(supports)]  # fmt: skip
    joined = torch.cat([batch.vectors for batch in batches]).cpu()
    return WeightBatch(batches[0].layout, joined, batches[0].provenance), count


def starts(model: Flown, zoo: Zoo, images: ImageData, n: int, steps: int, seed: int) -> Starts:
    """All methods' networks for one data set.

    Args:
        zoo: the checkpoints the model was fitted on and may be looked up: training ones, one epoch
            or several.
    """
    flown, votes = generated(model, images, n, steps, seed)
    task = flown.layout.task.name
    train = zoo.batch(task)
    init = zoo.about["recipes"][task]["init"]

    def fresh(rule: str) -> WeightBatch:
        return random_init(train, n, torch.Generator().manual_seed(seed), rule)

    mean = train.vectors.mean(dim=0, keepdim=True).repeat(n, 1)
    return Starts({
        "flown": flown,
        "recipe-init": fresh(init),
        "default-init": fresh("default"),
        "kaiming": fresh("kaiming-uniform"),
        "checkpoint": nearest(train, n, torch.Generator().manual_seed(seed)),
        "zoo-mean": WeightBatch(train.layout, mean),
        "best-lookup": best_lookup(zoo, images, n),
    }, task, votes)  # fmt: skip


def best_lookup(zoo: Zoo, images: ImageData, n: int) -> WeightBatch:
    """Of the task whose best checkpoint is best on validation images, the n best checkpoints."""
    found = {}
    for task in zoo.tasks:
        batch = zoo.batch(task)
        accuracies = evaluate(batch, images.val.images, images.val.labels)
        best = accuracies.argsort(descending=True, stable=True)[:n]
        found[task] = float(accuracies[best[0]]), batch[best]
    return max(found.values(), key=lambda pair: pair[0])[1]
