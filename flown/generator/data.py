"""The training data of a generator: a zoo's networks in one scaled vector space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.context.tokens import Images
from flown.tasks import ImageData, Task, TaskTable
from flown.weights.batch import WeightBatch
from flown.weights.layout import JointLayout
from flown.weights.scale import NetworkScale
from flown.zoo import Zoo
from flown.zoo.networks import Networks


@dataclass
class TrainingSet:
    """A zoo's training networks and its held-out networks, each scaled by its own statistics.

    `frozen`: the tensors that the networks of each layout share, where only a subset is generated.
    """

    joint: JointLayout
    tasks: TaskTable
    scale: NetworkScale
    train: Networks
    held_out: Networks
    frozen: tuple[dict[str, Tensor], ...]

    @classmethod
    def of(cls, zoo: Zoo, epochs: Sequence[int]) -> TrainingSet:
        """The checkpoints of the given epochs; without any, of all epochs.

        Raises:
            FlownError: a task has no training network among these checkpoints.
        """
        chosen = zoo.select(epochs=epochs or None)
        learnt = {row.task for row in chosen.rows if row.split == "train"}
        held_out = {row.task for row in chosen.rows} - learnt
        if missing := [task for task in zoo.tasks if task not in learnt | held_out]:
            raise FlownError(f"{zoo.path}: task '{missing[0]}' has no network in epochs {epochs}")
        if lone := [task for task in held_out if zoo.tasks[task].split == "train"]:
            raise FlownError(
                f"{zoo.path}: task '{lone[0]}' has no training network in epochs {epochs}; of a "
                "lone network the last checkpoints are held out: epochs [] takes all"
            )
        parts = [
            [i for i, row in enumerate(chosen.rows) if (row.split == "train") == train]
            for train in (True, False)
        ]
        train, others = (Networks(chosen, chosen.joint, part) for part in parts)
        train.scale.fit(train.blocks())
        others.scale = train.scale
        frozen = tuple(
            WeightBatch(x, torch.empty(0, x.size), frozen=chosen.frozen_of(i)).bare().frozen
            for i, x in enumerate(chosen.layouts)
        )
        return cls(chosen.joint, chosen.tasks, train.scale, train, others, frozen)

    def orders(self, layouts: Tensor, generator: torch.Generator) -> Tensor:
        """A random order of each network's outputs, (n, C); outputs that it lacks come last."""
        counts = [layout.architecture.outputs for layout in self.joint.layouts]
        count = torch.tensor(counts, device=layouts.device)[layouts, None]
        shape = (len(layouts), self.joint.outputs)
        draws = torch.rand(shape, generator=generator, device=generator.device).to(layouts.device)
        places = torch.arange(self.joint.outputs, device=layouts.device)
        return torch.where(places < count, draws, places + 1.0).argsort(dim=1)


def task_images(task: Task, images: Images) -> ImageData:
    """The images of a task.

    Raises:
        FlownError: its data set is not among `images`, or as `Task.images`.
    """
    if task.dataset not in images:
        raise FlownError(f"task '{task.id}': the images of data set '{task.dataset}' are not given")
    return task.images(images[task.dataset])
