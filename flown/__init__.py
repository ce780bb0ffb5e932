"""flown: flow matching on neural-network weights.

zoo = flown.Zoo.open("zoos/mnist")
model = flown.Flown.fit(zoo, out="runs/r1")
batch = model.generate(images, labels, n=50)
accuracies = flown.evaluate(batch, test_images, test_labels)
"""

from flown.data import load as load_data
from flown.errors import FlownError
from flown.evaluate import evaluate
from flown.fitting import FlownConfig
from flown.layout import Task, WeightLayout
from flown.model import Flown
from flown.version import __version__ as __version__
from flown.weights import WeightBatch
from flown.zoo import Recipe, Zoo, recipe
from flown.zoo import train as train_zoo

__all__ = [
    "Flown",
    "FlownConfig",
    "FlownError",
    "Recipe",
    "Task",
    "WeightBatch",
    "WeightLayout",
    "Zoo",
    "evaluate",
    "load_data",
    "recipe",
    "train_zoo",
]
