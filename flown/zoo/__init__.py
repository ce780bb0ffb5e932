"""Zoos: populations of trained networks, on disk."""

from flown.zoo.recipes import RECIPES, Recipe, recipe
from flown.zoo.store import Zoo
from flown.zoo.train import train

__all__ = ["RECIPES", "Recipe", "Zoo", "recipe", "train"]
