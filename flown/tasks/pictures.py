"""One picture of a user's: an image file of any kind that Pillow reads, or an array."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.tasks.splits import Pixels

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".npy")  # the usual ones
LARGEST = 512  # pixels of the longer side of a picture in a folder; no network here sees more
# What Pillow knows by name and reads with other programs, or not at all.
_OTHERS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "WMF"}


@functools.cache
def suffixes() -> frozenset[str]:
    """Endings of picture files that can be read here, in lower case."""
    from PIL import Image

    with contextlib.suppress(ImportError):  # HEIC, where it is installed
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    known = {end for end, kind in Image.EXTENSION.items() if kind in Image.OPEN.keys() - _OTHERS}
    return frozenset({*known, ".npy"})


def is_picture(path: Path) -> bool:
    """Whether a file's ending, or without one its beginning, is that of a picture."""
    if path.suffix:
        return path.suffix.lower() in suffixes()
    from PIL import Image

    try:
        with Image.open(path):
            return True
    except Exception:  # decoders raise errors of many types for other files
        return False


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
    """Images of any sizes as one tensor (N, c, H, W), of the given size or their `common_size`.

    Raises:
        FlownError: a size below 1.
    """
    check_size(size)
    channels = max(image.shape[0] for image in images)
    side = (size, size) if size else common_size([(x.shape[1], x.shape[2]) for x in images])
    return torch.stack([resized(image, side).expand(channels, -1, -1) for image in images])


def check_size(size: int | None) -> None:
    """Raises FlownError for a size of images that is none."""
    if size is not None and not 1 <= size <= 4096:
        raise FlownError(f"images of size {size} asked for; it must lie between 1 and 4096")


def common_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Height and width of most of some images, or the medians where no size is that of most."""
    (most, count), *_ = Counter(sizes).most_common(1)
    if 2 * count >= len(sizes):
        return most
    heights, widths = (sorted(side) for side in zip(*sizes, strict=True))
    return heights[len(sizes) // 2], widths[len(sizes) // 2]


def resized(image: Tensor, side: tuple[int, int]) -> Tensor:
    """An image uint8 (c, H, W) of that height and width."""
    if tuple(image.shape[1:]) == side:
        return image
    from torchvision.transforms.functional import resize

    found: Tensor = resize(image, list(side), antialias=True)
    return found


def picture_size(path: Path, largest: int | None = None) -> tuple[int, int]:
    """Height and width as `read_image` gives them, from a file's beginning alone.

    Raises:
        FlownError: as `read_image`.
    """
    if path.suffix.lower() == ".npy":
        height, width = _read_array(path).shape[1:]
        return int(height), int(width)
    from PIL import ExifTags, Image

    try:
        with Image.open(path) as file:
            width, height = file.size
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception as error:
        raise FlownError(f"{path}: not a readable image ({error})") from None
    if turned:
        width, height = height, width
    share = min(1.0, (largest or max(width, height)) / max(width, height))
    return max(1, round(height * share)), max(1, round(width * share))
