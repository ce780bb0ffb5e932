"""flown: flow matching on neural-network weights.

zoo = flown.Zoo.open("zoos/mnist")
model = flown.Flown.fit(zoo, out="runs/r1")
batch = model.generate(images, labels, n=50)
accuracies = flown.evaluate(batch, test_images, test_labels)
flown.ImageClassifier().fit(images, labels).predict(others)
"""

from typing import TYPE_CHECKING, Any

from flown.base.errors import FlownError
from flown.base.trust import allow as trust
from flown.generator.config import FlownConfig
from flown.generator.model import Flown
from flown.measure.evaluate import evaluate
from flown.tasks import load as load_data
from flown.tasks.task import Task
from flown.version import __version__ as __version__
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout
from flown.zoo import Recipe, Zoo, recipe
from flown.zoo.train.train import train_zoo

if TYPE_CHECKING:
    from flown.heads.estimator import ImageClassifier as ImageClassifier

__all__ = [
    "Flown",
    "FlownConfig",
    "FlownError",
    "ImageClassifier",
    "Recipe",
    "Task",
    "WeightBatch",
    "WeightLayout",
    "Zoo",
    "evaluate",
    "load_data",
    "recipe",
    "train_zoo",
    "trust",
]


def __getattr__(name: str) -> Any:
    """The estimator is loaded when it is asked for: scikit-learn takes a second."""
    if name == "ImageClassifier":
        from flown.heads.estimator import ImageClassifier

        return ImageClassifier
    raise AttributeError(f"module 'flown' has no attribute '{name}'")
