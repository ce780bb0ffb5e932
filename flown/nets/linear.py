"""A linear classifier over features of a frozen backbone: the head that few-shot work generates."""

from __future__ import annotations

from torch import Tensor, nn


class LinearHead(nn.Linear):
    """Features (N, F), or (N, F, 1, 1) as images of one pixel, to logits (N, classes)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def linear_head(channels: int, classes: int) -> LinearHead:
    """`channels` are the features F."""
    return LinearHead(channels, classes)
