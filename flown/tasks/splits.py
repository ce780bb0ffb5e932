"""Images as tensors in three disjoint parts: train, validation, test.

Only the final measurement uses the test part: selection, thresholds and early stopping use the
validation part, which is carved from the training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.base.run import digest
from flown.base.text import name_of

Pixels: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, c, H, W) and labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> Split:
        return Split(self.images[rows], self.labels[rows])


class Parts(NamedTuple):
    """A data set as it is published: class names, and validation and test parts where it has them."""

    classes: tuple[str, ...]
    train: Split
    val: Split | None = None
    test: Split | None = None


@dataclass(frozen=True)
class ImageData:
    """A classification task's images: `labels` index into `classes`."""

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split

    @property
    def identity(self) -> dict[str, Any]:
        """What says whether two runs saw the same images: counts, and a digest of them all.

        The test part, which no training may look at, is left out.
        """
        parts = {"train": self.train, "val": self.val}
        return {
            **{name: len(part) for name, part in parts.items()},
            "digest": digest(*(x for part in parts.values() for x in (part.images, part.labels))),
        }


@dataclass(frozen=True)
class ManyClass:
    """Images of many classes, the classes themselves split: for few-shot work and pretraining."""

    name: str
    classes: tuple[str, ...]
    images: Tensor  # uint8 (N, c, H, W)
    labels: Tensor  # int64 (N,)
    class_split: dict[str, Tensor]  # "train" | "val" | "test" -> class numbers

    @property
    def identity(self) -> dict[str, Any]:
        """Counts and a fingerprint, by which a run knows its data again."""
        return {"images": len(self.images), "digest": digest(self.images, self.labels)}


def three_way(
    name: str,
    classes: tuple[str, ...],
    train: Split,
    test: Split | None,
    val: Split | None = None,
    *,
    seed: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
) -> ImageData:
    """Splits a data set, stratified by class; the same seed gives the same parts.

    Given test and validation parts stay as published. Training images that are byte for byte equal to
    a test or validation image are dropped, so that the three parts share no image.

    Args:
        test: the published test part, or None to carve one from `train` too.
        val: the published validation part, or None to carve one from `train`.
        val_fraction: share of the images outside the test part.
        test_fraction: share of all images, where no test part is given.

    Raises:
        FlownError: a class has too few images to be in every part, train and test differ in
            shape, or a fraction is not between 0 and 1.
    """
    for key, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 < value < 1:
            raise FlownError(f"{name}: {key} must lie between 0 and 1, got {value:g}")
    generator = torch.Generator().manual_seed(seed)
    if test is None:
        _require(3, train, classes, name)
        train, test = _carve(train, len(classes), test_fraction, generator)
    for what, part in (("test", test), ("validate", val)):
        if part is not None and (not len(part) or part.images.shape[1:] != train.images.shape[1:]):
            shapes = (
                f"{tuple(train.images.shape)} to train on and {tuple(part.images.shape)} to {what}"
            )
            raise FlownError(f"{name}: images {shapes}; expected both parts, of the same shape")
    train = train[~_among(train.images, test.images)]
    if val is None:
        _require(2, train, classes, name)
        train, val = _carve(train, len(classes), val_fraction, generator)
    train = train[~_among(train.images, val.images)]
    _require(1, train, classes, name)
    return ImageData(name_of(name), classes, train, val, test)


def _require(count: int, split: Split, classes: tuple[str, ...], name: str) -> None:
    counts = torch.bincount(split.labels, minlength=len(classes)).tolist()
    for label, available in zip(classes, counts, strict=True):
        if available < count:
            raise FlownError(
                f"{name}: too few images of class '{label}': {available} that no other part "
                f"holds, {count} or more are needed"
            )


def _carve(
    split: Split, classes: int, fraction: float, generator: torch.Generator
) -> tuple[Split, Split]:
    """Two parts, the second a stratified share; both have at least one image of each class."""
    chosen = torch.zeros(len(split), dtype=torch.bool)
    for label in range(classes):
        rows = (split.labels == label).nonzero().flatten()
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        chosen[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return split[~chosen], split[chosen]


def _among(images: Tensor, others: Tensor) -> Tensor:
    """True for every image that is, byte for byte, one of `others`."""
    known = {image.tobytes() for image in others.numpy()}
    return torch.tensor([image.tobytes() in known for image in images.numpy()], dtype=torch.bool)
