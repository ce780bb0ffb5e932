"""A folder of images, one sub-folder per class; images of any size, or all of one size as a tensor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flown.base.errors import FlownError, FlownWarning
from flown.base.files import walk
from flown.base.output import is_ours
from flown.base.text import name_of
from flown.tasks.pictures import (
    LARGEST,
    SUFFIXES,
    check_size,
    common_size,
    is_picture,
    picture_size,
    read_image,
    resized,
)
from flown.tasks.splits import Parts, Split

# Folders of a data set's parts, which are not classes.
_PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_NAMED = 5  # files, in a warning


def load_folder(path: Path, size: int | None = None) -> Parts:
    """All images of a folder's sub-folders, and the classes: the sorted folder names.

    A folder with `train`, and `val` or `test`, that hold folders of classes has parts of its own.
    Images are resized to `size` by `size` pixels, without it to their `common_size`; the longer side
    is at most 512. When all are grey there is one channel, otherwise three. Memory holds them at that
    size, not as they are on disk.

    Raises:
        FlownError: as `list_classes`, a class with no image, an unreadable image.
    """
    check_size(size)
    parts = _parts(path) or {"train": path}
    known = {part: list_classes(folder) for part, folder in parts.items()}
    classes = tuple(known["train"])
    listed: dict[str, list[tuple[Path, int]]] = {}
    for part, folders in known.items():
        if astray := folders.keys() ^ set(classes):
            raise FlownError(f"{path}: class '{min(astray)}' is not in both train and {part}")
        files = [class_files(folders[name], name) for name in classes]
        listed[part] = [(file, label) for label, some in enumerate(files) for file in some]
    every = [file for part in listed.values() for file, _ in part]
    if size is None:
        side = common_size([picture_size(file, LARGEST) for file in every])
    else:
        side = (size, size)
    largest = max(LARGEST, 2 * max(side))
    images = [_found(image) for image in read_images(every, largest, side)]
    channels = max(image.shape[0] for image in images)
    whole = torch.stack([image.expand(channels, -1, -1) for image in images])
    found: dict[str, Split] = {}
    for part, rows in listed.items():
        labels = torch.tensor([label for _, label in rows])
        found[part], whole = Split(whole[: len(rows)], labels), whole[len(rows) :]
    return Parts(classes, found["train"], found.get("val"), found.get("test"))


@dataclass(frozen=True)
class Pictures:
    """Images uint8 (1 or 3, H, W) of any sizes, their files, and labels (N,), -1 where unknown."""

    files: tuple[Path, ...]
    images: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.files)


def read_pictures(
    path: Path, shots: int | None = None, seed: int = 0
) -> tuple[Pictures, tuple[str, ...]]:
    """The labelled images of a folder, sorted by class, and the classes: the sorted folder names.

    The longer side of an image is at most 512 pixels.

    Args:
        shots: images of each class, drawn at random; by default all.

    Raises:
        FlownError: as `list_classes`, a class with no image or fewer than `shots`, an unreadable
            image.
    """
    classes, generator = list_classes(path), torch.Generator().manual_seed(seed)
    chosen: list[Path] = []
    labels: list[int] = []
    for label, (name, folder) in enumerate(classes.items()):
        files = class_files(folder, name)
        if shots is not None:
            if not 1 <= shots <= len(files):
                raise FlownError(
                    f"{folder}: class '{name}' has {len(files)} images, {shots} are needed"
                )
            order = torch.randperm(len(files), generator=generator)[:shots].sort().values
            files = [files[i] for i in order]
        chosen += files
        labels += [label] * len(files)
    images = [_found(image) for image in read_images(chosen, LARGEST)]
    return Pictures(tuple(chosen), tuple(images), torch.tensor(labels)), tuple(classes)


def read_images(
    files: Sequence[Path], largest: int | None = None, side: tuple[int, int] | None = None
) -> Iterator[Tensor | FlownError]:
    """Each file's image, or the error it raised, in order; read by several threads.

    Args:
        largest: as in `read_image`.
        side: height and width to which each is resized once it is read.
    """

    def read(file: Path) -> Tensor | FlownError:
        try:
            image = read_image(file, largest)
        except FlownError as error:
            return error
        return image if side is None else resized(image, side)

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(files), 16 * workers):  # results wait in memory to be taken
            yield from pool.map(read, files[start : start + 16 * workers])


def _found(image: Tensor | FlownError) -> Tensor:
    if isinstance(image, FlownError):
        raise image
    return image


def list_classes(path: Path) -> dict[str, Path]:
    """The sub-folders of a folder by their names, sorted: its classes.

    Hidden ones, what archives and file servers leave, and what this library wrote are no classes.
    Names are composed Unicode, whichever form the disk has.

    Raises:
        FlownError: no folder, fewer than two classes, or the parts of a data set in their place.
    """
    if not path.is_dir():
        raise FlownError(f"{path}: no such folder")
    found: dict[str, Path] = {}
    _, folders, files = next(walk(path))
    for sub in _not_ours(folders):
        name = name_of(sub.name)
        if name in found:
            raise FlownError(f"{path}: two folders are called '{name}', in two forms of Unicode")
        found[name] = sub
    if len(found) < 2:
        only = f"only '{next(iter(found))}'" if found else "none"
        raise FlownError(
            f"{path}: expected a sub-folder of images for each of two or more classes, found {only}"
        )
    if all(name.lower() in _PARTS for name in found):
        raise FlownError(
            f"{path}: its folders {', '.join(found)} are parts of a data set, not classes; put the "
            f"images of each class in a folder of its name, or name {found[min(found)]}"
        )
    if loose := [file for file in files if is_picture(file)]:
        lie = "lies" if len(loose) == 1 else f"and {len(loose) - 1:,} more lie"
        of = "is" if len(loose) == 1 else "are"
        warnings.warn(
            f"{path}: {loose[0].name} {lie} beside the folders of classes and {of} of none",
            FlownWarning,
            stacklevel=2,
        )
    return found


def _not_ours(folders: Sequence[Path]) -> list[Path]:
    return sorted(folder for folder in folders if not is_ours(folder))


def class_files(folder: Path, name: str) -> list[Path]:
    """The images of a class; warns of files that are none.

    Raises:
        FlownError: there is no image.
    """
    files, others = files_of(folder)
    if not files:
        raise FlownError(f"{folder}: class '{name}' has no image ({', '.join(SUFFIXES)}, ...)")
    if others:
        warnings.warn(not_used(others), FlownWarning, stacklevel=2)
    return files


def not_used(files: Sequence[Path]) -> str:
    """A line on files that are no images."""
    more = f" and {len(files) - _NAMED:,} more" if len(files) > _NAMED else ""
    named = ", ".join(str(file) for file in files[:_NAMED])
    are = "file is" if len(files) == 1 else "files are"
    return f"{len(files):,} {are} not read as images: {named}{more}"


def files_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images of a folder and all below it, and its other files, sorted and without hidden ones."""
    files = [file for _, _, some in walk(folder) for file in some]
    images = [file for file in files if file.is_file() and is_picture(file)]
    return sorted(images), sorted(set(files) - set(images))


def _parts(path: Path) -> dict[str, Path] | None:
    """The folders of a data set's parts; None where these are classes."""
    if not path.is_dir():
        raise FlownError(f"{path}: no such folder")
    found: dict[str, Path] = {}
    for sub in _not_ours(next(walk(path))[1]):
        part = _PARTS.get(sub.name.lower())
        if part is None or part in found or not _not_ours(next(walk(sub))[1]):
            return None
        found[part] = sub
    return found if "train" in found and len(found) > 1 else None
