"""A user's pictures: a folder with a sub-folder of a few images a class, and a folder to label.

Pictures keep their size and shape, with the longer side at most 512 pixels; the backbone resizes them.
Those to label are read a few at a time, and what a head sees in them is kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.base.progress import bar
from flown.base.text import name_of
from flown.context.backbones import features
from flown.tasks import Pictures, read_image, read_images
from flown.tasks.folder import files_of, not_used
from flown.tasks.pictures import LARGEST, SUFFIXES

_TOGETHER = 16  # pictures in memory

See = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Queries:
    """Images to label: files, labels (N,), -1 where unknown, and what a head sees in them (N, ...)."""

    files: tuple[Path, ...]
    labels: Tensor
    seen: Tensor
    digests: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def image(self, place: int) -> Tensor:
        """One of them, read again: they need not all fit into memory."""
        return read_image(self.files[place], LARGEST)


def picture_features(backbone: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """A backbone's features (N, F) of pictures; those of one size go through it together."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        sizes.setdefault(tuple(image.shape), []).append(i)
    parts = [features(backbone, torch.stack([images[i] for i in rows])) for rows in sizes.values()]
    order = torch.tensor([i for rows in sizes.values() for i in rows])
    return torch.cat(parts)[order.argsort()]


def check_seen(seen: Tensor, pictures: Pictures) -> None:
    """Raises FlownError, with the file's name, where a picture's features (N, F) are no numbers."""
    bad = (~torch.isfinite(seen).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise FlownError(
            f"{pictures.files[bad[0]]}: the backbone gives NaN or Inf for it; remove it"
        )


def read_queries(
    folder: Path, support: Path, classes: Sequence[str], see: See
) -> tuple[Queries, list[str]]:
    """The images to label, and warnings of files that are left out.

    Images in a sub-folder named after a class have that class as their label, which only the figures
    on the page use.

    Args:
        see: some images of any sizes to what is kept of them, (n, ...).

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
    found, warnings = _listed(folder, classes)
    parts: list[Queries] = []
    with bar("label", len(found)) as update:
        for start in range(0, len(found), _TOGETHER):
            parts.append(_read(found[start : start + _TOGETHER], see, warnings))
            update(min(start + _TOGETHER, len(found)), "")
    parts = [part for part in parts if len(part)]
    if not parts:
        fault = f"none of {len(found)} images can be read" if found else "no image"
        raise FlownError(f"{folder}: {fault} ({', '.join(SUFFIXES)}, ...)")
    queries = Queries(
        tuple(file for part in parts for file in part.files),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.seen for part in parts]),
        tuple(digest for part in parts for digest in part.digests),
    )
    return queries, warnings


def _listed(folder: Path, classes: Sequence[str]) -> tuple[list[tuple[Path, int]], list[str]]:
    """The images below a folder with their labels, and warnings of all that is not one."""
    known = {name: label for label, name in enumerate(classes)}
    found: list[tuple[Path, int]] = []
    strange: list[Path] = []
    images, others = files_of(folder)
    for file in images:
        first, *rest = file.relative_to(folder).parts
        name = name_of(first) if rest else None
        found.append((file, known.get(name, -1) if name else -1))
        if name and name not in known:
            strange.append(folder / first)
    warnings = [
        f"{sub}: no class of that name; its images count as unlabelled"
        for sub in dict.fromkeys(strange)
    ]
    if others:
        warnings.append(not_used(others))
    return found, warnings


def _read(some: Sequence[tuple[Path, int]], see: See, warnings: list[str]) -> Queries:
    """A few images as they are seen; adds to `warnings` those that are left out."""
    fine: list[tuple[Path, int]] = []
    images: list[Tensor] = []
    for one, image in zip(some, read_images([file for file, _ in some], LARGEST), strict=True):
        if isinstance(image, FlownError):
            warnings.append(f"{image}; left out")
        else:
            fine.append(one)
            images.append(image)
    seen = see(images) if images else torch.empty(0, 0)
    finite = torch.isfinite(seen.flatten(1).float()).all(dim=1)
    for (file, _), good in zip(fine, finite.tolist(), strict=True):
        if not good:
            warnings.append(f"{file}: the backbone gives NaN or Inf for it; left out")
    rows = finite.nonzero().flatten().tolist()
    return Queries(
        tuple(fine[i][0] for i in rows),
        torch.tensor([fine[i][1] for i in rows], dtype=torch.long),
        seen[finite],
        tuple(digest(images[i]) for i in rows),
    )


def duplicates(support: Pictures, queries: Queries | None) -> list[str]:
    """Warnings of images in the support of two classes, or both in the support and the queries."""
    first: dict[str, int] = {}
    warnings = []
    for i, image in enumerate(support.images):
        j = first.setdefault(digest(image), i)
        if support.labels[i] != support.labels[j]:
            warnings.append(
                f"{support.files[i]}: the same image as {support.files[j]}, "
                "which is of another class"
            )
    if queries is None:
        return warnings
    for file, same in zip(queries.files, queries.digests, strict=True):
        if (found := first.get(same)) is not None:
            warnings.append(
                f"{file}: the same image as {support.files[found]}; "
                "its label is no measure of accuracy"
            )
    return warnings


def digest(image: Tensor) -> str:
    """What is equal for equal images, grey or colour."""
    colour = image.expand(3, -1, -1).contiguous()
    return hashlib.sha256(f"{colour.shape}".encode() + colour.numpy().tobytes()).hexdigest()
