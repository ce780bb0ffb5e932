"""A folder of images, one sub-folder per class; and a support set read whole from such a folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flown.data.splits import Split
from flown.errors import FlownError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".npy")


def load_folder(path: Path) -> tuple[Split, tuple[str, ...]]:
    """All images of a folder's sub-folders, and the classes: the sub-folders' sorted names.

    Images of different sizes are resized to the most frequent one; when all are grey there is one
    channel, otherwise three.

    Raises:
        FlownError: no folder, fewer than two classes, an empty class, an unreadable image.
    """
    if not path.is_dir():
        raise FlownError(f"{path}: no such folder")
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise FlownError(
            f"{path}: expected a sub-folder of images for each of two or more classes, "
            f"found {len(folders)}"
        )
    images, labels = [], []
    for label, folder in enumerate(folders):
        files = image_files(folder)
        if not files:
            raise FlownError(f"{folder}: class '{folder.name}' has no image ({', '.join(SUFFIXES)})")
        images += [read_image(file) for file in files]
        labels += [label] * len(files)
    return Split(stack(images), torch.tensor(labels)), tuple(f.name for f in folders)


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name."""
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES)


def read_image(path: Path) -> Tensor:
    """One image as uint8 (1 or 3, H, W). Transparency is laid over white.

    Raises:
        FlownError: unreadable, or an array of another shape or with NaN, naming the file.
    """
    if path.suffix.lower() == ".npy":
        return _read_array(path)
    from PIL import Image

    try:
        with Image.open(path) as file:
            file.load()
            image = file.copy()
    except (OSError, ValueError, SyntaxError) as error:
        raise FlownError(f"{path}: not a readable image ({error})") from None
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more
        wide = np.asarray(image, dtype=np.float64)
        top = 65535 if wide.max() > 255 else 255
        return torch.from_numpy(np.round(wide * (255 / top)).astype(np.uint8))[None]
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if image.mode in ("L", "1") else "RGB")
    array = torch.from_numpy(np.array(image))
    if array.ndim == 2:
        return array[None]
    grey = (array[..., :1] == array).all()
    return array[..., 0][None] if grey else array.permute(2, 0, 1).contiguous()


def _read_array(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FlownError(f"{path}: not a readable array ({error})") from None
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise FlownError(f"{path}: shape {array.shape}, expected (H, W) or (H, W, 1 or 3)")
    if array.dtype != np.uint8:
        if not np.isfinite(array).all():
            raise FlownError(f"{path}: holds NaN or Inf pixels")
        if array.min() < 0 or array.max() > 1:
            raise FlownError(f"{path}: float pixels must lie in [0, 1]; or store uint8")
        array = np.round(array * 255).astype(np.uint8)
    pixels = torch.from_numpy(array)
    return pixels[None] if array.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def stack(images: list[Tensor]) -> Tensor:
    """Images of any sizes as one tensor (N, c, H, W)."""
    from torchvision.transforms.functional import resize

    channels = max(image.shape[0] for image in images)
    side = Counter(tuple(image.shape[1:]) for image in images).most_common(1)[0][0]
    ready = [
        (image if image.shape[1:] == side else resize(image, list(side), antialias=True))
        .expand(channels, -1, -1)
        for image in images
    ]  # fmt: skip
    return torch.stack(ready)
