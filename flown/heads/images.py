"""Images as people have them: arrays, tensors, PIL images, paths."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.tasks import as_bytes, read_image, stack
from flown.tasks.pictures import from_pil

_WANTED = "an array, a tensor, or a list of arrays, PIL images or paths"


def as_images(images: Any) -> Tensor:
    """Images as uint8 (N, c, H, W).

    Args:
        images: uint8 or floats in [0, 1], (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W); rows
            (N, S * S) of square grey images; or a list of arrays, PIL images or paths, of any sizes.

    Raises:
        FlownError: anything else, no image, or a file that cannot be read.
    """
    if not isinstance(images, Tensor | np.ndarray | str | bytes | Path) and isinstance(
        images, Iterable
    ):
        images = list(images)
        if not images:
            raise FlownError("images: none were given")
        return stack([_one(image, place) for place, image in enumerate(images)])
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUS":
        return as_images(images.tolist())
    if not isinstance(images, Tensor | np.ndarray):
        raise FlownError(f"images: expected {_WANTED}, got {type(images).__name__}")
    if isinstance(images, np.ndarray):
        images = np.ascontiguousarray(images)  # PyTorch reads no array backwards
    found = torch.as_tensor(images)
    if not len(found):
        raise FlownError("images: none were given")
    if found.ndim == 2:
        found = _square(found)
    if found.ndim == 4 and found.shape[1] not in (1, 3) and found.shape[3] in (1, 3):
        found = found.permute(0, 3, 1, 2)
    if found.dtype == torch.float64:
        found = found.float()
    return as_bytes(found, "images").contiguous()


def _square(rows: Tensor) -> Tensor:
    side = round(rows.shape[1] ** 0.5)
    if side * side != rows.shape[1]:
        raise FlownError(
            f"images: rows of {rows.shape[1]} pixels are no square images; give (N, H, W)"
        )
    return rows.view(-1, side, side)


def _one(image: Any, place: int) -> Tensor:
    """One image of a list, (c, H, W)."""
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if hasattr(image, "convert"):  # PIL, which need not be imported for this question
        return from_pil(image, Path(f"image {place}"))
    if isinstance(image, Tensor | np.ndarray) and image.ndim in (2, 3):
        return as_images(image[None])[0]
    raise FlownError(f"images: number {place} is {type(image).__name__}; expected {_WANTED}")
