"""Recipes: how the networks of a zoo are trained, by name and scale.

The `paper` scale is the "Seed" zoos of Schürholt et al. 2022 (2209.14764): one set of
hyper-parameters, many seeds, 50 epochs at batch size 10. `cpu` keeps activation, initialisation,
optimiser, weight decay and preprocessing, and shortens training for two cores: fewer, larger
batches at a higher learning rate. `smoke` only shows that everything runs.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal, Optional, Union

from pydantic import Field

from flown.base.config import Config, Size
from flown.base.errors import FlownError, unknown
from flown.nets.architecture import PerChannel
from flown.tasks import TaskDraw

Scale = Literal["smoke", "cpu", "paper"]
SCALES: tuple[Scale, ...] = ("smoke", "cpu", "paper")


class Recipe(Config):
    """All settings of a zoo except the number of models and the seed.

    `net` is a name, or `package.module:function` for a network of your own, made for images of side
    `size`. `init`: `uniform` draws weights from U(0, 1) as Model Zoos' MNIST family does,
    `kaiming-uniform` is He et al.'s, both with biases 0.01; `default` leaves the values
    that the network's constructor gives (PyTorch's, for this library's networks). `keep` lists the
    epochs whose checkpoints are stored, `keep_steps` optimiser steps. `grey` turns colour images to
    luminance. `shared_order` shows all networks the images in the same order.

    `grid` gives several values to `init`, `learning_rate` or `weight_decay`; networks take its cells
    in turn. With `seeds: random` each has its own seed; with `fixed` all cells share the seeds, so
    networks differ in the cell alone (Model Zoos' hyp-rand and hyp-fix).

    `subset` names the tensors to generate: glob patterns, or `last-2-norms` (p-diff). A base
    network with its default initialisation is then trained as a whole for `base_epochs`, with Adam
    and the recipe's rate, weight decay and batch size. All networks start from it and train the
    subset alone, with everything else frozen in eval mode; the zoo holds the frozen tensors once.

    `tasks` draws a random task over the classes of `dataset`, a set of many classes, for every
    `per_task` networks; the zoo is then split by task.
    """

    name: str
    dataset: str
    net: str = "cnn-small"
    activation: str = "tanh"
    init: Literal["uniform", "kaiming-uniform", "default"] = "default"
    learning_rate: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    batch_size: Size = 10
    epochs: int = Field(default=50, ge=1, le=10_000_000)
    keep: tuple[int, ...] = (50,)
    mean: PerChannel = 0.5
    std: PerChannel = 0.5
    grey: bool = False
    max_train_images: Optional[int] = Field(default=None, ge=1)
    size: Optional[int] = Field(default=None, ge=1, le=4096)
    keep_steps: tuple[int, ...] = ()
    shared_order: bool = False
    grid: dict[Literal["init", "learning_rate", "weight_decay"], tuple[Any, ...]] = Field(
        default={}
    )
    seeds: Literal["random", "fixed"] = "random"
    subset: Union[str, tuple[str, ...], None] = None
    base_epochs: int = 0
    tasks: Optional[TaskDraw] = None
    per_task: int = Field(default=1, ge=1)

    @property
    def kept(self) -> tuple[int, ...]:
        """The epochs that are kept, checked."""
        if not (self.keep or self.keep_steps):
            raise FlownError(f"{self.name}: keep names no epoch, keep_steps no step")
        if self.keep and (min(self.keep) < 1 or max(self.keep) > self.epochs):
            raise FlownError(f"{self.name}: keep {self.keep} is not within epochs 1..{self.epochs}")
        return tuple(sorted(set(self.keep)))

    def kept_steps(self, steps: int) -> tuple[int, ...]:
        """The steps whose weights are kept, for epochs of so many steps.

        Raises:
            FlownError: a step beyond the end, or data for less than a batch.
        """
        if steps < 1:
            raise FlownError(
                f"{self.name}: fewer training images than a batch of {self.batch_size}"
            )
        last = self.epochs * steps
        if self.keep_steps and not 0 < min(self.keep_steps) <= max(self.keep_steps) <= last:
            raise FlownError(f"{self.name}: keep_steps {self.keep_steps}: not within 1..{last}")
        return tuple(sorted({*self.keep_steps, *(epoch * steps for epoch in self.kept)}))

    @property
    def cells(self) -> list[dict[str, Any]]:
        """The grid's combinations; one empty combination without a grid."""
        values = itertools.product(*self.grid.values())
        return [dict(zip(self.grid, cell, strict=True)) for cell in values]

    def cell(self, model: int) -> dict[str, Any] | None:
        """What the grid gives a model; None without a grid."""
        return self.cells[model % len(self.cells)] if self.grid else None

    def variant(self, model: int) -> Recipe:
        """The recipe of one model."""
        return type(self).parse(self.model_dump() | (self.cell(model) or {}), f"{self.name}: grid")

    def repetition(self, model: int) -> int:
        """The part of a model's seed in which models differ."""
        return model // len(self.cells) if self.seeds == "fixed" else model

    def check(self) -> None:
        """Raises FlownError for epochs beyond the training, or a grid with a wrong value."""
        if empty := [key for key, values in self.grid.items() if not values]:
            raise FlownError(f"{self.name}: grid: {empty[0]} has no value")
        if (self.subset is None) != (self.base_epochs < 1) or self.base_epochs < 0:
            raise FlownError(
                f"{self.name}: base_epochs {self.base_epochs} with subset {self.subset}: the base of "
                "a subset needs an epoch, whole networks have no base"
            )
        if self.subset is not None and (self.init != "default" or "init" in self.grid):
            raise FlownError(
                f"{self.name}: networks of a subset start from their base; drop `init`"
            )
        if self.tasks is not None and self.subset is not None:
            raise FlownError(
                f"{self.name}: networks of random tasks have no common base; drop `subset`"
            )
        for model in range(len(self.cells)):
            self.variant(model)
        _ = self.kept


_LAST_FIVE: dict[str, Any] = {"epochs": 50, "keep": (21, 22, 23, 24, 25, 46, 47, 48, 49, 50)}
_MNIST: dict[str, Any] = {"dataset": "mnist", "init": "uniform", "mean": 0.1307, "std": 0.3081}
_FASHION: dict[str, Any] = {"dataset": "fashion_mnist", "init": "uniform"}
_KAIMING: dict[str, Any] = {"init": "kaiming-uniform", "learning_rate": 1e-4}
_CIFAR: dict[str, Any] = _KAIMING | {"activation": "gelu", "weight_decay": 1e-2}
_STL: dict[str, Any] = _KAIMING | {"weight_decay": 1e-3}

# Model Zoos' table of hyper-parameters.
_PAPER: dict[str, dict[str, Any]] = {
    "mnist-small": _MNIST,
    "fashion_mnist-small": _FASHION,
    "kmnist-small": _MNIST | {"dataset": "kmnist"},
    "usps-small": _MNIST | {"dataset": "usps", "weight_decay": 1e-3},
    "svhn-small": {"dataset": "svhn", "init": "uniform", "learning_rate": 3e-3, "grey": True},
    "cifar10-small": _CIFAR | {"dataset": "cifar10"},
    "stl10-small": _STL | {"dataset": "stl10"},
    "natural10-small": _STL | {"dataset": "natural10"},
    "mnist-medium": _MNIST | {"net": "cnn-medium"},
    "cifar10-medium": _CIFAR | {"dataset": "cifar10", "net": "cnn-medium"},
    "cifar100-medium": _CIFAR | {"dataset": "cifar100", "net": "cnn-medium"},
    "stl10-medium": _STL | {"dataset": "stl10", "net": "cnn-medium"},
    "natural10-medium": _STL | {"dataset": "natural10", "net": "cnn-medium"},
}

# The demo's networks are trained for seconds, from PyTorch's default initialisation: about a
# thousand steps each, for any size of the data.
_DEMO: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 32}
_DEMOS: dict[str, dict[str, Any]] = {
    "demo-digits": _DEMO | {"dataset": "digits", "epochs": 20, "keep": (20,)},
    "demo-mnist5k": _DEMO | {"dataset": "mnist5k", "epochs": 8, "keep": (8,)},
    "demo-mnist5k-rot90": _DEMO | {"dataset": "mnist5k-rot90", "epochs": 8, "keep": (8,)},
    "demo-fashion_mnist": _DEMO
    | {"dataset": "fashion_mnist", "epochs": 8, "keep": (8,), "max_train_images": 3600},
}

# p-diff's zoos of the last two norm layers. The paper keeps 200 checkpoints; every fifth step, since
# successive ones hardly differ. From scratch, not from published weights: FLoWN does not say which.
_NORMS: dict[str, dict[str, Any]] = {
    f"{dataset}-{net}-norms": {"dataset": dataset, "net": net}
    for net in ("resnet18", "vit_base", "convnext_tiny")
    for dataset in ("mnist", "cifar10", "cifar100", "stl10", "natural10")
}
# Whole networks of more than 250,000 weights: checkpoints late in one training or few.
_WHOLE: dict[str, dict[str, Any]] = {
    "cifar10-resnet20": {"dataset": "cifar10", "net": "resnet20"},
    "fashion_mnist-resnet20": {"dataset": "fashion_mnist", "net": "resnet20"},
}
# A random ten-way task a network, over Omniglot's training characters in four rotations.
_TASKS: dict[str, dict[str, Any]] = {
    "omniglot-tasks": {
        "dataset": "omniglot_full",
        "tasks": TaskDraw(),
        "learning_rate": 3e-3,
        "batch_size": 20,
        "epochs": 30,
        "keep": (30,),
    }
}
RECIPES = tuple(sorted([*_PAPER, *_DEMOS, *_NORMS, *_WHOLE, *_TASKS]))


def recipe(name: str, scale: str = "cpu") -> Recipe:
    """A recipe by name.

    Raises:
        FlownError: unknown recipe or scale.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if name in _NORMS:
        return _norms(name, scale)
    if name in _WHOLE:
        return _whole(name, scale)
    if name in _TASKS:
        brief = {"epochs": 2, "keep": (2,)} if scale == "smoke" else {}
        return Recipe(name=name, **(_TASKS[name] | brief))
    if name in _DEMOS:
        base = Recipe(name=name, **_DEMOS[name])
    else:
        base = Recipe(name=name, **(_LAST_FIVE | _PAPER[name]))
    if scale == "smoke":
        brief = {"epochs": 2, "keep": (1, 2), "batch_size": 32, "max_train_images": 512}
        return base.model_copy(update=brief | {"learning_rate": 3e-3})
    if scale == "cpu" and name in _PAPER:
        return base.model_copy(update=_for_cpu(base))
    return base


def _for_cpu(base: Recipe) -> dict[str, Any]:
    """Ten epochs at batch size 32 (twenty for the small STL family): the middle and last stand for
    the paper's 25 and 50. U(0, 1) starts far from a good network and allows a higher rate."""
    rate = {"uniform": 1e-2, "kaiming-uniform": 1e-3, "default": 1e-3}[base.init]
    if base.dataset in ("stl10", "natural10"):
        return {"epochs": 20, "keep": (10, 19, 20), "batch_size": 32, "learning_rate": 2 * rate}
    return {"epochs": 10, "keep": (5, 9, 10), "batch_size": 32, "learning_rate": rate}


def _norms(name: str, scale: str) -> Recipe:
    """At smaller scales fewer images and steps, and 32x32 for networks made for 224x224."""
    of = _NORMS[name]
    resnet = of["net"] == "resnet18"
    shared = {
        "name": name,
        "subset": "last-2-norms",
        "keep": (),
        "size": None if resnet else 32,
        "activation": "relu" if resnet else "gelu",
        "learning_rate": 1e-3 if resnet else 1e-4,
    }
    sizes: dict[str, dict[str, Any]] = {
        "smoke": {
            "base_epochs": 1,
            "epochs": 1,
            "keep_steps": (4, 8),
            "batch_size": 16,
            "max_train_images": 128,
        },
        "cpu": {
            "base_epochs": 6,
            "epochs": 4,
            "keep_steps": tuple(range(10, 201, 10)),
            "batch_size": 64,
            "max_train_images": 4000,
        },
        "paper": {
            "base_epochs": 100,
            "epochs": 30,
            "keep_steps": tuple(range(5, 1001, 5)),
            "batch_size": 128,
            "size": None,
        },
    }
    return Recipe(**(of | shared | sizes[scale]))


def _whole(name: str, scale: str) -> Recipe:
    """At smaller scales fewer images, of half the side, and fewer steps."""
    shared = {"name": name, "keep": (), "activation": "relu", "learning_rate": 1e-3}
    sizes: dict[str, dict[str, Any]] = {
        "smoke": {
            "epochs": 1,
            "keep_steps": (5, 6, 7, 8),
            "batch_size": 16,
            "max_train_images": 128,
            "size": 16,
        },
        "cpu": {
            "epochs": 6,
            "keep_steps": tuple(range(306, 373, 6)),
            "batch_size": 64,
            "max_train_images": 4000,
            "size": 16,
        },
        "paper": {"epochs": 100, "keep_steps": tuple(range(30_000, 34_000, 20)), "batch_size": 128},
    }
    return Recipe(**(_WHOLE[name] | shared | sizes[scale]))
