"""Linear classifiers over features of a frozen backbone: the heads of few-shot work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearHead(nn.Linear):
    """Features (N, F), or (N, F, 1, 1) as images of one pixel, to logits (N, classes)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def linear_head(channels: int, classes: int) -> LinearHead:
    """`channels` are the features F."""
    return LinearHead(channels, classes)


class NormalisedHead(nn.Module):
    """Features f (N, F) to logits (N, classes): a linear map of (f - centre) / |f - centre|.

    `centre` (F,) is no weight but a property of the features.
    """

    centre: Tensor

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(channels))
        self.linear = nn.Linear(channels, classes)

    def forward(self, features: Tensor) -> Tensor:
        centred = features.flatten(1) - self.centre
        return self.linear(F.normalize(centred, dim=1))  # type: ignore[no-any-return]
