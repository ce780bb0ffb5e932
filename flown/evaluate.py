"""Accuracy of many networks at once on labelled images."""

from __future__ import annotations

import torch
from torch import Tensor

from flown.errors import FlownError
from flown.weights import WeightBatch

_IMAGES = 100  # images per pass: activations of a group of networks stay in cache


@torch.no_grad()
def predictions(batch: WeightBatch, images: Tensor) -> Tensor:
    """Predicted classes (n, N) of all networks for uint8 images (N, c, H, W)."""
    task = batch.layout.task
    parts = [
        batch.logits(task.preprocess(some.to(batch.vectors.device))).argmax(-1)
        for some in images.split(_IMAGES)
    ]
    return torch.cat(parts, dim=1)


def evaluate(batch: WeightBatch, images: Tensor, labels: Tensor) -> Tensor:
    """Accuracy in percent of every network, (n,).

    Args:
        images: uint8 (N, c, H, W); preprocessed as the networks' task says.
        labels: (N,) in 0..C-1.

    Raises:
        FlownError: no image, another number of labels, or a label out of range.
    """
    if not len(images) or len(images) != len(labels):
        raise FlownError(f"evaluate: got {len(images)} images and {len(labels)} labels")
    classes = len(batch.layout.task.classes)
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        wrong = labels.min() if int(labels.min()) < 0 else labels.max()
        raise FlownError(f"evaluate: label {int(wrong)} is out of range 0..{classes - 1}")
    hits = predictions(batch, images) == labels.to(batch.vectors.device)
    return 100 * hits.float().mean(dim=1)
