"""Support sets: a few labelled images of each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flown.base.errors import FlownError, unknown
from flown.tasks.draw import ClassPool
from flown.tasks.folder import load_folder
from flown.tasks.named import load
from flown.tasks.splits import Split


class Support(NamedTuple):
    """Labelled images uint8 (K, c, H, W) and labels (K,), sorted by class."""

    images: Tensor
    labels: Tensor


def draw_support(
    split: Split,
    classes: int,
    shots: int,
    generator: torch.Generator,
    classes_subset: Sequence[int] | None = None,
) -> Support:
    """`shots` random images of each class.

    Args:
        classes: how many classes the split has.
        classes_subset: draw only from these classes; labels are then places in this list.

    Raises:
        FlownError: no class or shot is asked for, a class has too few images, or does not exist.
    """
    wanted = list(range(classes) if classes_subset is None else classes_subset)
    if bad := [label for label in wanted if not 0 <= label < classes]:
        raise FlownError(f"class {bad[0]} is out of range 0..{classes - 1}")
    chosen = ClassPool(split.labels, wanted).draw_support(shots, generator)
    labels = torch.arange(len(wanted), device=split.labels.device).repeat_interleave(shots)
    return Support(split.images[chosen], labels)


def load_support(
    source: str | Path, shots: int = 5, seed: int = 0, classes: Sequence[str] | None = None
) -> tuple[Support, tuple[str, ...]]:
    """A support set and its class names: all images of a folder, or `shots` images of each class of
    a data set's training part.

    Args:
        classes: names of the classes to take, in the order of their labels; without it, all.

    Raises:
        FlownError: as `load` and `draw_support`, or no class of that name.
    """
    if folder := Path(source).is_dir():
        known, split, *_ = load_folder(Path(source))
    else:
        images = load(source)
        split, known = images.train, images.classes
    names = known if classes is None else tuple(classes)
    if bad := [name for name in names if name not in known]:
        raise unknown(f"class of {source}:", bad[0], known)
    if not names:
        raise FlownError(f"{source}: no class for the support set; name one or more")
    wanted = [known.index(name) for name in names]
    if not folder:
        generator = torch.Generator().manual_seed(seed)
        return draw_support(split, len(known), shots, generator, wanted), names
    rows = [(split.labels == label).nonzero().flatten() for label in wanted]
    labels = [torch.full((len(found),), i) for i, found in enumerate(rows)]
    return Support(split.images[torch.cat(rows)], torch.cat(labels)), names


def check_support(images: Tensor, labels: Tensor, classes: int) -> Support:
    """A user's tensors as a support set of `classes` classes.

    Args:
        images: (K, c, H, W), c 1 or 3, or grey (K, H, W); uint8 or floats in [0, 1].
        labels: (K,) integers, each of 0..classes-1 at least once.

    Raises:
        FlownError: other tensors; the message names shape, value or class.
    """
    for key, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise FlownError(f"support {key}: expected a tensor, got {type(value).__name__}")
    images = as_bytes(images, "support images")
    if min(images.shape[2:]) < 4:
        raise FlownError(f"support images: {tuple(images.shape[2:])} pixels are too few")
    if labels.ndim != 1 or len(labels) != len(images):
        raise FlownError(f"support labels: expected {len(images)}, got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise FlownError(f"support labels: expected integers, got {labels.dtype}")
    bad = labels[(labels < 0) | (labels >= classes)]
    if len(bad):
        raise FlownError(f"support labels: {int(bad[0])} is out of range 0..{classes - 1}")
    counts = torch.bincount(labels.long(), minlength=classes)
    if (counts == 0).any():
        missing = int((counts == 0).nonzero()[0])
        raise FlownError(f"support set: class {missing} of {classes} has no image")
    return Support(images, labels.long())


def as_bytes(images: Tensor, what: str) -> Tensor:
    """Images uint8 (N, c, H, W) of uint8 or floats in [0, 1], (N, 1 or 3, H, W) or grey (N, H, W).

    Raises:
        FlownError: other tensors, or pixels that are no brightness.
    """
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise FlownError(
            f"{what}: expected (N, 1 or 3, H, W) or (N, H, W), got {tuple(images.shape)}"
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise FlownError(f"{what}: expected uint8 or floats, got {images.dtype}")
    if not torch.isfinite(images).all():
        raise FlownError(f"{what}: NaN or Inf pixels")
    if images.numel() and (images.min() < 0 or images.max() > 1):
        low, high = float(images.min()), float(images.max())
        raise FlownError(f"{what}: floats must lie in [0, 1], got [{low:g}, {high:g}]")
    return (images * 255).round().to(torch.uint8)
