"""Class names on both sides: labels follow names, not the order that names happen to stand in.

Folders give classes in alphabetical order, published data sets in their own. Where both sides name
the same classes, labels are renumbered. Names that only count, "0", "1", ..., say nothing, and are
not compared.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.tasks.splits import ImageData, Split
from flown.tasks.support import Support


def places(given: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """For each class of `given` its place in `wanted`, or None where they are not the same names."""
    ours, theirs = _normal(given), _normal(wanted)
    if len(set(theirs)) < len(theirs) or sorted(ours) != sorted(theirs):
        return None
    return [theirs.index(name) for name in ours]


def labels_in(labels: Tensor, given: Sequence[str], wanted: Sequence[str], what: str) -> Tensor:
    """Labels (N,) of classes `given` as labels of the classes `wanted`.

    They stay as they are where one side only counts its classes.

    Args:
        what: whose labels and for which networks, for the message.

    Raises:
        FlownError: other classes, or another number of them.
    """
    if len(given) != len(wanted):
        raise FlownError(f"{what}: {len(given)} classes, the networks have {len(wanted)}")
    if (order := places(given, wanted)) is not None:
        return torch.tensor(order, device=labels.device)[labels]
    missing = [name for name in _normal(wanted) if name not in _normal(given)]
    extra = [name for name in _normal(given) if name not in _normal(wanted)]
    if missing and not (only_counts(given) or only_counts(wanted)):
        raise FlownError(
            f"{what}: classes differ, the networks know '{missing[0]}' where the data has "
            f"'{extra[0]}' ({len(missing)} of {len(wanted)} differ); rename the data's classes if "
            "they are the same, or take networks for these"
        )
    return labels


def in_order(images: ImageData, wanted: Sequence[str], what: str | None) -> ImageData:
    """A data set with its labels in the order of the classes `wanted`.

    Args:
        what: whose classes `wanted` are; with None, data of other classes comes back as it is.

    Raises:
        FlownError: as `labels_in`, unless `what` is None.
    """
    order = places(images.classes, wanted)
    if order is None:
        if what is not None:
            labels_in(images.test.labels[:0], images.classes, wanted, f"{what}: '{images.name}'")
        return images
    if order == list(range(len(order))):
        return images
    table = torch.tensor(order)
    parts = (images.train, images.val, images.test)
    train, val, test = (Split(part.images, table[part.labels]) for part in parts)
    return replace(images, classes=tuple(wanted), train=train, val=val, test=test)


def support_in_order(
    support: Support, names: Sequence[str], known: Iterable[Sequence[str]]
) -> tuple[Support, tuple[str, ...]]:
    """A support set in the order of the first of the `known` tasks' classes that are its own.

    Returns:
        The set, sorted by label, and its class names; both as they came where no task has them.
    """
    for classes in known:
        order = places(names, classes)
        if order is not None:
            labels = torch.tensor(order)[support.labels]
            rows = labels.argsort(stable=True)
            return Support(support.images[rows], labels[rows]), tuple(classes)
    return support, tuple(names)


def _normal(names: Sequence[str]) -> list[str]:
    """Names as they are compared: an accent composed or not is the same accent."""
    return [unicodedata.normalize("NFC", name) for name in names]


def only_counts(names: Sequence[str]) -> bool:
    """Whether names are "0", "1", ... in this order, and so say nothing about the classes."""
    return list(names) == [str(i) for i in range(len(names))]
