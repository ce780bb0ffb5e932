"""The npz files of a `FLOWN_DATA` folder, checked.

A classification set holds uint8 `train_images` (N, H, W) or (N, H, W, 1 or 3), int `train_labels` (N,) or
(N, 1), `test_images`, `test_labels`, and where it has them `val_images`, `val_labels` and `class_names` (by
default the numbers); a set of many classes `images`, `labels`,
`class_names` and `class_split` (`train`, `val` or `test` for each class).
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch

from flown.base.errors import FlownError
from flown.tasks.splits import ManyClass, Parts, Pixels, Split

_KINDS = ("images", "labels")
_MOST = 100_000  # classes without names


def keys(path: Path) -> list[str]:
    """The keys of an npz file, from its directory alone.

    Raises:
        FlownError: it is no npz file, or a truncated one.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return sorted(name.removesuffix(".npy") for name in file.namelist())
    except Exception as error:  # zipfile and numpy raise errors of many types for damaged files
        raise FlownError(f"{path}: not an npz file, or cut short ({error})") from None


def read_parts(path: Path) -> Parts:
    """A classification set.

    Raises:
        FlownError: the file is damaged, or a key is missing or has another type or shape.
    """
    present = keys(path)
    parts = ["train", "test", *(["val"] if "val_images" in present else [])]
    named = ["class_names"] if "class_names" in present else []
    arrays = _read(path, *(f"{part}_{kind}" for part in parts for kind in _KINDS), *named)
    names = _texts(arrays, "class_names", path) if named else _numbers(arrays, path)
    found = {
        part: as_split(
            arrays[f"{part}_images"], arrays[f"{part}_labels"], len(names), path, f"{part}_"
        )
        for part in parts
    }
    return Parts(names, found["train"], found.get("val"), found["test"])


def read_many(path: Path) -> ManyClass:
    """A set of many classes; errors as for `read_parts`."""
    arrays = _read(path, "images", "labels", "class_names", "class_split")
    names, parts = _texts(arrays, "class_names", path), _texts(arrays, "class_split", path)
    split = as_split(arrays["images"], arrays["labels"], len(names), path)
    if len(parts) != len(names):
        raise FlownError(f"{path}: class_split has {len(parts)} entries for {len(names)} classes")
    if bad := set(parts) - {"train", "val", "test"}:
        raise FlownError(f"{path}: class_split holds '{min(bad)}', expected train, val or test")
    chosen = {
        part: torch.from_numpy(np.flatnonzero(np.array(parts) == part))
        for part in ("train", "val", "test")
    }
    return ManyClass(path.stem, names, split.images, split.labels, chosen)


def _read(path: Path, *wanted: str) -> dict[str, Pixels]:
    present = keys(path)
    for key in wanted:
        if key not in present:
            raise FlownError(f"{path}: key '{key}' is missing; it holds {', '.join(present)}")
    arrays: dict[str, Pixels] = {}
    key = wanted[0]
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in wanted:
                arrays[key] = file[key]
    except Exception as error:
        raise FlownError(f"{path}: '{key}' cannot be read ({error})") from None
    return arrays


def _numbers(arrays: dict[str, Pixels], path: Path) -> tuple[str, ...]:
    """Names of classes that have none: their numbers."""
    labels = arrays["train_labels"]
    if labels.dtype.kind not in "iu" or not labels.size or not 0 <= labels.max() < _MOST:
        raise FlownError(f"{path}: train_labels is {labels.dtype}, expected numbers of classes")
    return tuple(str(label) for label in range(int(labels.max()) + 1))


def _texts(arrays: dict[str, Pixels], key: str, path: Path) -> tuple[str, ...]:
    array = arrays[key]
    if array.ndim != 1 or array.dtype.kind not in "USiu":
        raise FlownError(f"{path}: {key} is {array.dtype} {array.shape}, expected a list of texts")
    return tuple(x.decode(errors="replace") if isinstance(x, bytes) else str(x) for x in array)


def as_split(
    images: Pixels, labels: Pixels, classes: int, path: Path | str, prefix: str = ""
) -> Split:
    """Checked arrays as tensors; `path` and `prefix` name them in errors."""
    if images.shape[3:] == (1,):
        images = images[..., 0]
    if labels.shape == (len(images), 1):
        labels = labels[:, 0]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        raise FlownError(
            f"{path}: {prefix}images is {images.dtype} {images.shape}, "
            "expected uint8 (N, H, W) or (N, H, W, 1 or 3)"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise FlownError(
            f"{path}: {prefix}labels is {labels.dtype} {labels.shape}, "
            f"expected {len(images)} integers"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise FlownError(
            f"{path}: {prefix}labels go from {labels.min()} to {labels.max()}, "
            f"there are {classes} class names"
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    pixels = pixels[:, None] if images.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return Split(pixels, torch.from_numpy(labels.astype(np.int64)))
