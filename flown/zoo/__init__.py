"""Zoos: populations of trained networks, on disk."""

from flown.zoo.align import align_zoo
from flown.zoo.imports import Skipped, from_checkpoints, from_modelzoos
from flown.zoo.recipes import RECIPES, Recipe, recipe
from flown.zoo.store import Zoo
from flown.zoo.train import train

__all__ = [
    "RECIPES",
    "Recipe",
    "Skipped",
    "Zoo",
    "align_zoo",
    "from_checkpoints",
    "from_modelzoos",
    "recipe",
    "train",
]
