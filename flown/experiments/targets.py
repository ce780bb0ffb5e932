"""The data of Table 3: a zoo's own data set, or one that no zoo was trained on."""

from __future__ import annotations

import torch

from flown import tasks as data
from flown.base.errors import FlownError
from flown.tasks import ImageData, Split, three_way

TEN_WAY = "omniglot_full"
# Notes that stand beside figures on a data set.
NOTES = {
    "svhn_small": "770 images of SVHN's training set, in grey; its test part is not the official one",
    TEN_WAY: "Ten characters of the evaluation alphabets, 20 images each: 10 to train on, 6 to test",
}
_GREY = ("svhn_small", "svhn")  # as in Model Zoos


def target(name: str, seed: int = 0) -> ImageData:
    """A ten-way task by name.

    Raises:
        FlownError: as `data.load`, or another number of classes.
    """
    images = ten_way(seed) if name == TEN_WAY else data.load(name)
    if len(images.classes) != 10:
        raise FlownError(f"{name}: has {len(images.classes)} classes, the zoos' networks have 10")
    if name not in _GREY:
        return images
    parts = (_grey(part) for part in (images.train, images.val, images.test))
    return ImageData(images.name, images.classes, *parts)


def ten_way(seed: int) -> ImageData:
    """Ten random characters of Omniglot's evaluation alphabets as one task, the same for the same seed."""
    many = data.load_many(TEN_WAY)
    known, generator = many.class_split["test"], torch.Generator().manual_seed(seed)
    if len(known) < 10:
        raise FlownError(f"{TEN_WAY}: {len(known)} test classes, a ten-way task needs 10")
    chosen = known[torch.randperm(len(known), generator=generator)[:10]].sort().values
    hits = many.labels[:, None] == chosen
    rows = hits.any(dim=1)
    return three_way(
        TEN_WAY,
        tuple(many.classes[int(i)] for i in chosen),
        Split(many.images[rows], hits[rows].long().argmax(dim=1)),
        None,
        seed=seed,
        test_fraction=0.3,
        val_fraction=0.3,
    )


def _grey(split: Split) -> Split:
    """Luminance, uint8 (N, 1, H, W)."""
    luma = torch.tensor((0.299, 0.587, 0.114))
    grey = torch.einsum("nchw,c->nhw", split.images.float(), luma)[:, None]
    return Split(grey.round().to(torch.uint8), split.labels)
