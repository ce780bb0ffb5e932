"""The training data of a zoo's networks: one pool of images, and a label map for each network.

    network i sees images x[rows_i] under labels y_i

All networks of a data set share rows and labels; with `Recipe.tasks` each has its random task's.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.nets.architecture import Architecture
from flown.tasks import ClassPool, ImageData, ManyClass, Task
from flown.zoo.train.recipes import Recipe


class Labelled(NamedTuple):
    """Places (K,) in a pool of images, and their labels (K,)."""

    rows: Tensor
    labels: Tensor


class Lessons(Protocol):
    """Images to train on and to validate on.

    `train` and `val` are pools (N, c, H, W) once `prepare` has run; `count` images make an epoch; `seen`
    are uint8 images on which BatchNorm is calibrated, None where networks see different ones.
    """

    classes: int
    channels: int
    count: int
    train: Tensor
    val: Tensor
    seen: Tensor | None

    def task(self, model: int) -> Task:
        """The task of a model."""

    def lesson(self, model: int, part: str) -> Labelled:
        """A model's rows of the pool `train` or `val`."""

    def prepare(self, architecture: Architecture | None) -> None:
        """Makes the pools, preprocessed once for all steps, or uint8 without an architecture."""


class _Pools:
    """Two pools, made when they are needed: the task alone needs no image."""

    train: Tensor
    val: Tensor

    def images(self, part: str) -> Tensor:
        """The uint8 images of the pool `train` or `val`, (N, c, H, W)."""
        raise NotImplementedError

    def prepare(self, architecture: Architecture | None) -> None:
        pools = [self.images("train"), self.images("val")]
        if architecture is not None:
            pools = [architecture.preprocess(images).contiguous() for images in pools]
        self.train, self.val = pools


class DataSet(_Pools):
    """All networks see one data set's images, up to `recipe.max_train_images` of them."""

    def __init__(self, recipe: Recipe, images: ImageData) -> None:
        self.data = images
        self.seen: Tensor | None = images.train.images[: recipe.max_train_images]
        self.classes, self.channels = len(images.classes), images.train.images.shape[1]
        self.count = len(self.seen)
        self._task = Task(id=recipe.dataset, dataset=recipe.dataset, classes=images.classes)

    def task(self, model: int) -> Task:
        return self._task

    def lesson(self, model: int, part: str) -> Labelled:
        data = self.data
        labels = data.train.labels[: self.count] if part == "train" else data.val.labels
        return Labelled(torch.arange(len(labels)), labels)

    def images(self, part: str) -> Tensor:
        return self.data.train.images[: self.count] if part == "train" else self.data.val.images


class RandomTasks(_Pools):
    """Every `recipe.per_task` networks see a random task over a many-class set.

    Raises:
        FlownError: a class without images to train on or to validate on.
    """

    seen: Tensor | None = None

    def __init__(self, recipe: Recipe, source: ManyClass, seed: int) -> None:
        assert recipe.tasks is not None
        self.recipe, self.source, self.seed, self.draw = recipe, source, seed, recipe.tasks
        members = sorted(source.class_split[self.draw.part].tolist())
        everything = Task(
            id=source.name,
            dataset=source.name,
            classes=tuple(source.classes[m] for m in members),
            members=tuple(members),
        ).images(source)
        self._numbers = {member: place for place, member in enumerate(members)}
        self._parts = parts = {"train": everything.train, "val": everything.val}
        self._pools = {
            name: ClassPool(split.labels, range(len(members))) for name, split in parts.items()
        }
        self._sizes = {name: len(split) for name, split in parts.items()}
        self._each = {
            name: min(len(rows) for rows in pool.rows) for name, pool in self._pools.items()
        }
        self.classes, self.channels = self.draw.ways, source.images.shape[1]
        self.count = self.draw.ways * self._each["train"]

    def images(self, part: str) -> Tensor:
        upright = self._parts[part].images
        return torch.cat([upright.rot90(r // 90, (2, 3)) for r in self.draw.rotations])

    def task(self, model: int) -> Task:
        return self.draw.task(self.source, model // self.recipe.per_task, self.seed)

    def lesson(self, model: int, part: str) -> Labelled:
        task, each = self.task(model), self._each[part]
        assert task.members is not None
        pool = self._pools[part]
        rows = torch.cat([pool.rows[self._numbers[member]][:each] for member in task.members])
        turn = self.draw.rotations.index(task.rotation)
        labels = torch.arange(self.draw.ways).repeat_interleave(each)
        return Labelled(rows + turn * self._sizes[part], labels)


def lessons(recipe: Recipe, images: ImageData | ManyClass, seed: int) -> Lessons:
    """The training data of a recipe's networks.

    Raises:
        FlownError: images of the wrong kind: random tasks need a set of many classes.
    """
    if recipe.tasks is None:
        if isinstance(images, ManyClass):
            raise FlownError(
                f"{recipe.name}: '{images.name}' is a set of many classes; name `tasks` to draw from it"
            )
        return DataSet(recipe, images)
    if not isinstance(images, ManyClass):
        raise FlownError(
            f"{recipe.name}: tasks are drawn from a set of many classes, '{images.name}' is none"
        )
    return RandomTasks(recipe, images, seed)
