"""The starts of Table 3: networks generated, freshly initialised, or taken from a zoo."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from flown.generator.model import Flown
from flown.measure.baselines import nearest, random_init
from flown.measure.evaluate import evaluate
from flown.report.finetuning import ANY
from flown.tasks import ImageData, Support, draw_support
from flown.weights.batch import WeightBatch
from flown.zoo import Zoo

INITS = ("recipe-init", "default-init", "kaiming")


class Starts(NamedTuple):
    """n networks for each method.

    All have the layout that suits most support sets, `votes` of n; only `best-lookup` has that of
    its checkpoints. `stops` are the trajectory's networks at each of its epochs; those of the last
    epoch are also a method. `written` are those of `ANY`, of the same architecture with tanh, each
    for itself: its preprocessing is of its own support set.
    """

    batches: dict[str, WeightBatch]
    stops: dict[float, WeightBatch]
    written: list[WeightBatch]
    task: str
    votes: int


def asked_layout(model: Flown, supports: list[Support], seed: int) -> tuple[int, int]:
    """The layout that suits most support sets, and their number."""
    votes = Counter(
        model.asked_layout(support.images, support.labels, seed + i)
        for i, support in enumerate(supports)
    )
    return votes.most_common(1)[0]


def generated(
    model: Flown,
    supports: list[Support],
    layout: int,
    steps: int,
    seed: int,
    until: float | None = None,
) -> WeightBatch:
    """A network from each support set, all of one layout."""
    batches = [
        model.generate(
            support.images, support.labels, 1, seed + i, steps=steps, layout=layout, until=until
        )
        for i, support in enumerate(supports)
    ]
    joined = torch.cat([batch.vectors for batch in batches]).cpu()
    return WeightBatch(batches[0].layout, joined, batches[0].provenance, task=batches[0].task)


def starts(
    model: Flown, trajectory: Flown, zoo: Zoo, images: ImageData, n: int, steps: int, seed: int
) -> Starts:
    """The networks of all methods for one data set; each generated one has its own support set.

    Args:
        trajectory: a model whose flow leads through several epochs.
        zoo: the training checkpoints that the model was fitted on, which lookup may return; one
            epoch or several.
    """
    draw, classes = torch.Generator().manual_seed(seed + 20_011), len(images.classes)
    shots = model.config.context.shots
    supports = [draw_support(images.train, classes, shots, draw) for _ in range(n)]
    layout, votes = asked_layout(model, supports, seed)
    wanted = model.space.joint.layouts[layout]
    task = next(name for name in zoo.tasks if zoo.layout(name) == wanted)
    train = zoo.batch(task)
    init = zoo.recipe(task)["init"]
    stops = {
        epoch: generated(trajectory, supports, layout, steps, seed, epoch)
        for epoch in trajectory.epochs
    }

    net = wanted.architecture.net
    writer = Flown.from_pretrained(ANY).to(model.device)
    written = [
        writer.generate(x.images, x.labels, 1, seed + i, net, classes=images.classes).to("cpu")
        for i, x in enumerate(supports)
    ]

    def fresh(rule: str) -> WeightBatch:
        return random_init(train, n, torch.Generator().manual_seed(seed), rule)

    mean = train.vectors.mean(dim=0, keepdim=True).repeat(n, 1)
    return Starts(
        {
            "flown": generated(model, supports, layout, steps, seed),
            "flown-trajectory": stops[trajectory.epochs[-1]],
            "recipe-init": fresh(init),
            "default-init": fresh("default"),
            "kaiming": fresh("kaiming-uniform"),
            "checkpoint": nearest(train, n, torch.Generator().manual_seed(seed)),
            "zoo-mean": WeightBatch(train.layout, mean),
            "best-lookup": best_lookup(zoo, images, n),
        },
        stops,
        written,
        task,
        votes,
    )


def best_lookup(zoo: Zoo, images: ImageData, n: int) -> WeightBatch:
    """The n best checkpoints of the task whose best checkpoint leads on validation images."""
    found = {}
    for task in zoo.tasks:
        batch = zoo.batch(task)
        accuracies = evaluate(batch, images.val.images, images.val.labels)
        best = accuracies.argsort(descending=True, stable=True)[:n]
        found[task] = float(accuracies[best[0]]), batch[best]
    return max(found.values(), key=lambda pair: pair[0])[1]
