"""A user's pictures: a folder with a sub-folder of a few images a class, and a folder to label.

Pictures keep their size and shape, with the longer side at most 512 pixels; the backbone resizes them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.context.backbones import features
from flown.tasks import Pictures, image_files, read_images, read_pictures
from flown.tasks.folder import SUFFIXES

_LARGEST = 512


def picture_features(backbone: nn.Module, pictures: Pictures) -> Tensor:
    """A backbone's features (N, F) of pictures; those of one size go through it together."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(pictures.images):
        sizes.setdefault(tuple(image.shape), []).append(i)
    parts = [
        features(backbone, torch.stack([pictures.images[i] for i in rows]))
        for rows in sizes.values()
    ]
    order = torch.tensor([i for rows in sizes.values() for i in rows])
    return torch.cat(parts)[order.argsort()]


def read_support(
    folder: Path, shots: int | None = None, seed: int = 0
) -> tuple[Pictures, tuple[str, ...]]:
    """The labelled images and the classes; arguments and errors as for `flown.tasks.read_pictures`."""
    return read_pictures(folder, shots, seed, _LARGEST)


def read_queries(folder: Path, support: Path, classes: Sequence[str]) -> tuple[Pictures, list[str]]:
    """The images to label, and warnings of files that are left out.

    Images in a sub-folder named after a class have that class as their label, which only the figures
    on the page use.

    Raises:
        FlownError: no folder, one within the other, no readable image.
    """
    if not folder.is_dir():
        raise FlownError(f"{folder}: no such folder")
    asked, labelled = folder.resolve(), support.resolve()
    if asked == labelled or labelled in asked.parents or asked in labelled.parents:
        raise FlownError(
            f"{folder}: lies in {support} or around it, where every sub-folder is a "
            "class; keep the images to label apart from those with a label"
        )
    known = {name: label for label, name in enumerate(classes)}
    subs = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = [(file, -1) for file in image_files(folder)]
    found += [(file, known.get(sub.name, -1)) for sub in subs for file in image_files(sub)]
    warnings = [
        f"{sub}: no class of that name; its images count as unlabelled"
        for sub in subs
        if sub.name not in known and image_files(sub)
    ]
    files, images, labels = [], [], []
    for (file, label), image in zip(
        found, read_images([file for file, _ in found], _LARGEST), strict=True
    ):
        if isinstance(image, FlownError):
            warnings.append(f"{image}; left out")
            continue
        files.append(file)
        images.append(image)
        labels.append(label)
    if not files:
        fault = f"none of {len(found)} images can be read" if found else "no image"
        raise FlownError(f"{folder}: {fault} ({', '.join(SUFFIXES)})")
    return Pictures(tuple(files), tuple(images), torch.tensor(labels)), warnings


def duplicates(support: Pictures, queries: Pictures | None) -> list[str]:
    """Warnings of images in the support of two classes, or both in the support and the queries."""
    first: dict[str, int] = {}
    warnings = []
    for i, image in enumerate(support.images):
        j = first.setdefault(_hash(image), i)
        if support.labels[i] != support.labels[j]:
            warnings.append(
                f"{support.files[i]}: the same image as {support.files[j]}, "
                "which is of another class"
            )
    if queries is None:
        return warnings
    for file, image in zip(queries.files, queries.images, strict=True):
        if (found := first.get(_hash(image))) is not None:
            warnings.append(
                f"{file}: the same image as {support.files[found]}; "
                "its label is no measure of accuracy"
            )
    return warnings


def _hash(image: Tensor) -> str:
    colour = image.expand(3, -1, -1).contiguous()
    return hashlib.sha256(f"{colour.shape}".encode() + colour.numpy().tobytes()).hexdigest()
