"""A classifier as scikit-learn's users expect it: fit a few images, predict others."""

from __future__ import annotations

from typing import Any, Optional, Union

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from flown.anytask.model import AnyTask
from flown.base.errors import FlownError
from flown.generator.model import Flown
from flown.heads import unknown as distance
from flown.heads.images import as_images
from flown.measure.evaluate import probabilities
from flown.tasks import Support


class ImageClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Classifies images after a few of each class: networks written for these, which vote.

    Nothing is trained: `fit` generates `n` networks, in less than a second. Images may be arrays, tensors,
    or lists of PIL images or paths (`flown.heads.images.as_images`), labels anything that sorts.

    Args:
        generator: an any-task generator: a model that ships, a folder, or an `AnyTask`.
        n: how many networks vote.
        net: which network is written; by default the generator's first.
        unknown: the part of images of the classes that may be called unknown; with it, `predict`
            answers "unknown", or -1 where classes are numbers, for images of no class.
        seed: all randomness follows from it.
        device: where networks are generated and run.

    Attributes:
        classes_: the labels, sorted. networks_: the `WeightBatch`.
        limit_: the distance beyond which an image is unknown; None without `unknown`.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> images, labels = load_digits(return_X_y=True)
        >>> classifier = ImageClassifier(n=2, net="cnn-small").fit(images[:100] / 16, labels[:100])
        >>> bool(classifier.score(images[100:300] / 16, labels[100:300]) > 0.8)
        True
    """

    def __init__(
        self,
        generator: Union[str, AnyTask] = "flown-any",
        n: int = 20,
        net: Optional[str] = None,
        unknown: Optional[float] = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.generator = generator
        self.n = n
        self.net = net
        self.unknown = unknown
        self.seed = seed
        self.device = device

    def fit(self, images: Any, labels: Any) -> ImageClassifier:
        """Generates the networks.

        Raises:
            FlownError: images or labels that cannot be used, fewer than two classes, or more than
                the generator writes for; with `unknown`, no class of two images.
        """
        pixels, labels = as_images(images), np.asarray(labels)
        if labels.shape != (len(pixels),):
            raise FlownError(f"fit: {len(pixels)} images and labels of shape {labels.shape}")
        self.classes_, places = np.unique(labels, return_inverse=True)
        if self.unknown is not None and self._unknown_label in self.classes_.tolist():
            raise FlownError(
                f"unknown: a class is called {self._unknown_label!r}, the answer for images of no class"
            )
        model = self._model()
        support = Support(pixels, torch.from_numpy(places.astype(np.int64)))
        names = [str(name) for name in self.classes_.tolist()]
        self.networks_ = model.generate(*support, self.n, self.seed, self.net, classes=names)
        self.limit_: Optional[float] = None
        if self.unknown is not None:

            def score(seen: Support, images: Tensor) -> Tensor:
                networks = model.generate(*seen, self.n, self.seed, self.net)
                return distance.of_networks(networks, seen, images)

            self.limit_ = distance.limit(distance.left_out(support, score), self.unknown)
        self._seen = support
        return self

    def predict(self, images: Any) -> np.ndarray[Any, Any]:
        """The likeliest class of each image, (N,); or the answer for images of no class."""
        pixels = self._pixels(images)
        answers: np.ndarray[Any, Any] = self.classes_[self.predict_proba(pixels).argmax(axis=1)]
        if self.limit_ is None:
            return answers
        return np.where(self.novelty(pixels) > 1, np.asarray(self._unknown_label), answers)

    def predict_proba(self, images: Any) -> np.ndarray[Any, Any]:
        """Probabilities (N, C) of the classes, the mean over all networks."""
        voted = probabilities(self.networks_, self._pixels(images))
        found: np.ndarray[Any, Any] = voted.cpu().double().numpy()
        found /= found.sum(axis=1, keepdims=True)
        return found

    def novelty(self, images: Any) -> np.ndarray[Any, Any]:
        """Distances (N,) from the nearest class, in units of the limit: above 1 is unknown.

        Raises:
            FlownError: fitted without `unknown`.
        """
        pixels = self._pixels(images)
        if self.limit_ is None:
            raise FlownError("novelty: fitted without `unknown`; pass unknown=0.05")
        found = distance.of_networks(self.networks_, self._seen, pixels)
        beyond: np.ndarray[Any, Any] = found.cpu().double().numpy() / self.limit_
        return beyond

    def _pixels(self, images: Any) -> Tensor:
        check_is_fitted(self)
        return as_images(images)

    def _model(self) -> AnyTask:
        model = self.generator
        if isinstance(model, str):
            found = Flown.from_pretrained(model)
            if not isinstance(found, AnyTask):
                raise FlownError(f"{model}: generates networks for the tasks of its training alone")
            model = found
        return model.to(self.device)

    @property
    def _unknown_label(self) -> Union[str, int]:
        return -1 if self.classes_.dtype.kind in "biuf" else "unknown"
