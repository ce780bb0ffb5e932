"""Accuracy of many networks at once on labelled images.

    accuracy_i = 100 / N * sum_j [argmax_c f(x_j; w_i)_c = y_j]

Images are preprocessed as the networks' own task says, and in chunks: memory does not grow with N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.base.files import check_finite
from flown.tasks import as_bytes, labels_in
from flown.weights.batch import WeightBatch

_IMAGES = 1000  # images preprocessed at a time
_VOTED = 500  # the same for votes


@torch.no_grad()
def predictions(batch: WeightBatch, images: Tensor) -> Tensor:
    """Predicted classes int64 (n, N) of all networks.

    Args:
        images: (N, c, H, W), grey or colour, or grey (N, H, W); uint8 or floats in [0, 1].

    Raises:
        FlownError: images of another shape or type, or a network whose weights are NaN or Inf.
    """
    architecture, images = batch.layout.architecture, as_bytes(images, "evaluate: images")
    check_finite({"weights": batch.vectors}, f"networks {batch.name}")
    device = batch.vectors.device
    classes = torch.empty(len(batch), len(images), dtype=torch.int64, device=device)
    if not len(batch):
        return classes
    for start in range(0, len(images), _IMAGES):
        some = architecture.preprocess(images[start : start + _IMAGES].to(device))
        classes[:, start : start + _IMAGES] = batch.logits(some).argmax(dim=-1)
    return classes


@torch.no_grad()
def probabilities(batch: WeightBatch, images: Tensor) -> Tensor:
    """Mean probabilities (N, C) of all networks, their vote, for uint8 images (N, c, H, W)."""
    device = batch.vectors.device
    parts = [
        batch.logits(batch.preprocess(some.to(device))).softmax(dim=-1).mean(dim=0)
        for some in images.split(_VOTED)
    ]
    return torch.cat(parts)


def evaluate(
    batch: WeightBatch, images: Tensor, labels: Tensor, classes: Sequence[str] | None = None
) -> Tensor:
    """Accuracy in percent of every network, (n,).

    Args:
        images: as in `predictions`.
        labels: integers (N,) in 0..C-1, C the networks' classes.
        classes: what the labels are called, as `ImageData.classes`; they are then compared by name
            with the networks', and may stand in another order.

    Raises:
        FlownError: other classes than the networks', no image, another number of labels, a label out of
            range, or as `predictions`.
    """
    if labels.ndim != 1 or not len(images) or len(images) != len(labels):
        got = f"{len(images)} images and labels of shape {tuple(labels.shape)}"
        raise FlownError(f"evaluate: expected N > 0 images and N labels, got {got}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise FlownError(f"evaluate: expected integer labels, got {labels.dtype}")
    outputs = batch.layout.architecture.outputs
    wrong = labels[(labels < 0) | (labels >= outputs)]
    if len(wrong):
        raise FlownError(
            f"evaluate: label {int(wrong[0])} is out of range 0..{outputs - 1}, the classes of "
            f"{batch.name}"
        )
    if classes is not None and batch.task is not None:
        labels = labels_in(labels, classes, batch.task.classes, f"evaluate: {batch.name}")
    hits = predictions(batch, images) == labels.to(batch.vectors.device)
    return 100 * hits.float().mean(dim=1)
