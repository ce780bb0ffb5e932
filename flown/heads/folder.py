"""A user's own pictures: a folder with a sub-folder of a few images a class, and a folder to label.

Pictures keep their own size and shape, the longer side at most 512 pixels; a backbone makes of them
what it wants.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.context.backbones import features
from flown.tasks import image_files, read_image
from flown.tasks.folder import SUFFIXES

_LARGEST = 512


@dataclass(frozen=True)
class Pictures:
    """Images uint8 (1 or 3, H, W) of any sizes, their files, and labels, -1 where not known."""

    files: tuple[Path, ...]
    images: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.files)

    def features(self, backbone: nn.Module) -> Tensor:
        """(N, F); images of one size go through the backbone together."""
        sizes: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(self.images):
            sizes.setdefault(tuple(image.shape), []).append(i)
        parts = [
            features(backbone, torch.stack([self.images[i] for i in rows]))
            for rows in sizes.values()
        ]
        order = torch.tensor([i for rows in sizes.values() for i in rows])
        return torch.cat(parts)[order.argsort()]


def read_support(
    folder: Path, shots: int | None = None, seed: int = 0
) -> tuple[Pictures, tuple[str, ...]]:
    """The labelled images, sorted by class, and the classes: the sub-folders' sorted names.

    Args:
        shots: this many random images of each class; by default all.

    Raises:
        FlownError: no folder, fewer than two classes, a class with no image or fewer than `shots`,
            an unreadable image.
    """
    classes = _classes(folder)
    generator = torch.Generator().manual_seed(seed)
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = image_files(folder / name)
        if not own:
            raise FlownError(
                f"{folder / name}: class '{name}' has no image ({', '.join(SUFFIXES)})"
            )
        if shots is not None:
            if not 1 <= shots <= len(own):
                raise FlownError(
                    f"{folder / name}: class '{name}' has {_count(len(own))}, "
                    f"--shots {shots} asks for {shots}"
                )
            chosen = torch.randperm(len(own), generator=generator)[:shots].sort().values
            own = [own[i] for i in chosen]
        files += own
        labels += [label] * len(own)
    images = []
    for found in _read(files):
        if isinstance(found, FlownError):
            raise found
        images.append(found)
    return Pictures(tuple(files), tuple(images), torch.tensor(labels)), classes


def _read(files: Sequence[Path]) -> Iterator[Tensor | FlownError]:
    """Images or why not, in order; decoders work beside each other."""

    def one(file: Path) -> Tensor | FlownError:
        try:
            return read_image(file, _LARGEST)
        except FlownError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(one, files)


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise FlownError(f"{folder}: no such folder")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        only = f"only '{names[0]}'" if names else "none"
        raise FlownError(
            f"{folder}: expected a sub-folder of images for each of two or more "
            f"classes, found {only}"
        )
    return tuple(names)


def read_queries(folder: Path, support: Path, classes: Sequence[str]) -> tuple[Pictures, list[str]]:
    """The images to label, and warnings of what was left out.

    Images in a sub-folder named after a class are known to be of it, which is used for nothing but
    the figures on the page.

    Raises:
        FlownError: no folder, one within the other, no readable image.
    """
    if not folder.is_dir():
        raise FlownError(f"{folder}: no such folder")
    here, there = folder.resolve(), support.resolve()
    if here == there or there in here.parents or here in there.parents:
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
    for (file, label), image in zip(found, _read([file for file, _ in found]), strict=True):
        if isinstance(image, FlownError):
            warnings.append(f"{image}; left out")
            continue
        files.append(file)
        images.append(image)
        labels.append(label)
    if not files:
        said = f"none of {_count(len(found))} can be read" if found else "no image"
        raise FlownError(f"{folder}: {said} ({', '.join(SUFFIXES)})")
    return Pictures(tuple(files), tuple(images), torch.tensor(labels)), warnings


def duplicates(support: Pictures, queries: Pictures | None) -> list[str]:
    """Warnings of images that stand in the support of two classes, or there and among the queries."""
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
                "whether it is labelled right tells nothing"
            )
    return warnings


def _hash(image: Tensor) -> str:
    colour = image.expand(3, -1, -1).contiguous()
    return hashlib.sha256(f"{colour.shape}".encode() + colour.numpy().tobytes()).hexdigest()


def _count(images: int) -> str:
    return f"{images} image" + ("" if images == 1 else "s")
