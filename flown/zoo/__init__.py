"""Zoos: populations of trained networks, on disk."""

from flown.zoo.align.align import align_zoo
from flown.zoo.imports.checkpoints import (
    Skipped,
    from_checkpoints,
    from_matrix,
    from_modelzoos,
)
from flown.zoo.store import Zoo
from flown.zoo.train.recipes import RECIPES, Recipe, recipe
from flown.zoo.train.train import train_zoo

__all__ = [
    "RECIPES",
    "Recipe",
    "Skipped",
    "Zoo",
    "align_zoo",
    "from_checkpoints",
    "from_matrix",
    "from_modelzoos",
    "recipe",
    "train_zoo",
]
