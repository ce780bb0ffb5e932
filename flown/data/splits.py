"""Images as tensors in three disjoint parts: train, validation, test.

The test part is for the final measurement alone: selection, thresholds and early stopping use the
validation part, which is carved from the training images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flown.errors import FlownError


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, c, H, W) and labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> Split:
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class ImageData:
    """A classification task's images: `labels` index into `classes`."""

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split


def three_way(name: str, classes: tuple[str, ...], train: Split, test: Split | None, *,
              seed: int = 0, val_fraction: float = 0.1, test_fraction: float = 0.2) -> ImageData:  # fmt: skip
    """Splits a data set, stratified by class and the same for the same seed.

    A given test part stays as published. Images of it that stand in the training part too (to the
    byte) are dropped there, and likewise validation images from the rest, so that the three parts
    share no image.

    Raises:
        FlownError: a class has too few images to be in every part.
    """
    generator = torch.Generator().manual_seed(seed)
    if test is None:
        rest, held = _carve(train, test_fraction, generator, name)
        train, test = train[rest], train[held]
    train = train[~_among(train.images, test.images)]
    rest, held = _carve(train, val_fraction, generator, name)
    train, val = train[rest], train[held]
    train = train[~_among(train.images, val.images)]
    missing = set(range(len(classes))) - set(train.labels.tolist())
    if missing:
        raise FlownError(f"{name}: class '{classes[min(missing)]}' has no training image")
    return ImageData(name, classes, train, val, test)


def _carve(split: Split, fraction: float, generator: torch.Generator,
           name: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Row numbers of the rest and of a stratified share, each class giving at least one image."""
    held = []
    for label in split.labels.unique().tolist():
        rows = (split.labels == label).nonzero().flatten()
        if len(rows) < 2:
            raise FlownError(f"{name}: class {label} has only one image; every split needs one")
        order = torch.randperm(len(rows), generator=generator)
        held.append(rows[order[: max(1, round(fraction * len(rows)))]])
    chosen = torch.zeros(len(split), dtype=torch.bool)
    chosen[torch.cat(held)] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def _among(images: Tensor, others: Tensor) -> Tensor:
    """True for every image that is, byte for byte, one of `others`."""
    if images.shape[1:] != others.shape[1:]:
        return torch.zeros(len(images), dtype=torch.bool)

    def keys(x: Tensor) -> np.ndarray:
        flat = np.ascontiguousarray(x.flatten(1).numpy())
        return flat.view(np.dtype((np.void, flat.shape[1]))).ravel()

    known = {key.tobytes() for key in keys(others)}
    return torch.tensor([key.tobytes() in known for key in keys(images)])
