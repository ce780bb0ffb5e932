"""A folder of images, one sub-folder per class; images of any size, or all of one size as a tensor."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.tasks.splits import Pixels, Split

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".gif",
    ".webp",
    ".ppm",
    ".pgm",
    ".tif",
    ".tiff",
    ".npy",
)


def load_folder(path: Path, size: int | None = None) -> tuple[Split, tuple[str, ...]]:
    """All images of a folder's sub-folders as one tensor, and the classes: the sorted folder names.

    Images are resized to `size` by `size` pixels, without it to the most frequent of their sizes;
    when all are grey there is one channel, otherwise three.

    Raises:
        FlownError: as `read_pictures`.
    """
    pictures, classes = read_pictures(path)
    return Split(stack(pictures.images, size), pictures.labels), classes


@dataclass(frozen=True)
class Pictures:
    """Images uint8 (1 or 3, H, W) of any sizes, their files, and labels (N,), -1 where unknown."""

    files: tuple[Path, ...]
    images: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.files)


def read_pictures(
    path: Path, shots: int | None = None, seed: int = 0, largest: int | None = None
) -> tuple[Pictures, tuple[str, ...]]:
    """The labelled images of a folder, sorted by class, and the classes: the sorted folder names.

    Args:
        shots: images of each class, drawn at random; by default all.
        largest: the longer side, as in `read_image`.

    Raises:
        FlownError: no folder, fewer than two classes, a class with no image or fewer than `shots`,
            an unreadable image.
    """
    classes, generator = _classes(path), torch.Generator().manual_seed(seed)
    chosen: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = image_files(path / name)
        if not files:
            raise FlownError(f"{path / name}: class '{name}' has no image ({', '.join(SUFFIXES)})")
        if shots is not None:
            if not 1 <= shots <= len(files):
                raise FlownError(
                    f"{path / name}: class '{name}' has {len(files)} images, {shots} are needed"
                )
            order = torch.randperm(len(files), generator=generator)[:shots].sort().values
            files = [files[i] for i in order]
        chosen += files
        labels += [label] * len(files)
    images = []
    for found in read_images(chosen, largest):
        if isinstance(found, FlownError):
            raise found
        images.append(found)
    return Pictures(tuple(chosen), tuple(images), torch.tensor(labels)), classes


def read_images(files: Sequence[Path], largest: int | None = None) -> Iterator[Tensor | FlownError]:
    """Each file's image, or the error it raised, in order; read by several threads."""

    def read(file: Path) -> Tensor | FlownError:
        try:
            return read_image(file, largest)
        except FlownError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(read, files)


def _classes(path: Path) -> tuple[str, ...]:
    if not path.is_dir():
        raise FlownError(f"{path}: no such folder")
    names = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(names) < 2:
        found = f"only '{names[0]}'" if names else "none"
        raise FlownError(
            f"{path}: expected a sub-folder of images for each of two or more classes, found {found}"
        )
    return tuple(names)


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder without hidden ones, sorted by name."""
    files = (p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return sorted(p for p in files if p.suffix.lower() in SUFFIXES)


def read_image(path: Path, largest: int | None = None) -> Tensor:
    """One image as uint8 (1 or 3, H, W): an image file, or an array (H, W) or (H, W, 1 or 3).

    Pictures are turned as their EXIF orientation says. Transparency is laid over white; 16 bits are
    scaled to 8, and floats must lie in [0, 1].

    Args:
        largest: the longer side, to which larger pictures are shrunk; arrays and 16 bits are not.

    Raises:
        FlownError: unreadable, of another shape or type, or with NaN; the message names the file.
    """
    if path.suffix.lower() == ".npy":
        return _read_array(path)
    from PIL import Image

    try:
        with Image.open(path) as file:
            if largest is not None:  # a JPEG is decoded at a fraction of its size
                share = largest / max(file.size)
                file.draft(None, (int(file.width * share), int(file.height * share)))
            file.load()
            return from_pil(file, path, largest)
    except FlownError:
        raise
    except Exception as error:  # decoders raise errors of many types for damaged files
        raise FlownError(f"{path}: not a readable image ({error})") from None


def from_pil(image: Image.Image, path: Path, largest: int | None = None) -> Tensor:
    """A PIL image as `read_image` gives it.

    Raises:
        FlownError: pixels that cannot be 8 bits; the message names `path`.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return torch.from_numpy(_bytes(np.asarray(image), path))[None]
    if image.mode.startswith("I"):  # 16 bits; Pillow may hold them in 32
        wide = np.asarray(image, dtype=np.float64)
        if wide.min() < 0 or wide.max() > 65535:
            raise FlownError(f"{path}: pixels of more than 16 bits; store 8 or 16")
        return torch.from_numpy(_bytes(wide / 65535, path))[None]
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if image.mode in ("L", "1") else "RGB")
    if largest is not None:
        image.thumbnail((largest, largest))
    array = torch.from_numpy(np.array(image))
    if array.ndim == 2:
        return array[None]
    grey = (array[..., :1] == array).all()
    return array[..., 0][None] if grey else array.permute(2, 0, 1).contiguous()


def _read_array(path: Path) -> Tensor:
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python: errors of many types
        raise FlownError(f"{path}: not a readable array ({error})") from None
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,)) or not array.size:
        raise FlownError(f"{path}: shape {array.shape}, expected (H, W) or (H, W, 1 or 3)")
    pixels = torch.from_numpy(array if array.dtype == np.uint8 else _bytes(array, path))
    return pixels[None] if array.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _bytes(pixels: Pixels, path: Path) -> Pixels:
    """Floats in [0, 1] as 0..255."""
    if pixels.dtype.kind != "f":
        raise FlownError(f"{path}: {pixels.dtype} pixels, expected uint8 or floats in [0, 1]")
    if not np.isfinite(pixels).all():
        raise FlownError(f"{path}: holds NaN or Inf pixels")
    if pixels.min() < 0 or pixels.max() > 1:
        raise FlownError(f"{path}: float pixels must lie in [0, 1]; or store uint8")
    return np.round(pixels.astype(np.float64) * 255).astype(np.uint8)


def stack(images: Sequence[Tensor], size: int | None = None) -> Tensor:
    """Images of any sizes as one tensor (N, c, H, W), of the given or the most frequent size.

    Raises:
        FlownError: a size below 1.
    """
    from torchvision.transforms.functional import resize

    if size is not None and size < 1:
        raise FlownError(f"images of size {size} asked for; it must be 1 or more")
    channels = max(image.shape[0] for image in images)
    frequent = Counter(tuple(image.shape[1:]) for image in images).most_common(1)[0][0]
    side = (size, size) if size else frequent
    resized = [
        (image if image.shape[1:] == side else resize(image, list(side), antialias=True)).expand(
            channels, -1, -1
        )
        for image in images
    ]
    return torch.stack(resized)
