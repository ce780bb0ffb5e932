"""Layers on images of latents, which the weight encoders and the velocity network share."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class PixelAttention(nn.Module):
    """Self-attention over the pixels of an image (n, width, h, w), as a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = group_norm(width), nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2)  # (n, 3 heads d, hw)
        qkv = qkv.unflatten(1, (3, self.heads, -1)).transpose(-1, -2)
        q, k, v = qkv.unbind(1)  # (n, heads, hw, d)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(-1, -2).reshape(x.shape))  # type: ignore[no-any-return]


def group_norm(width: int) -> nn.GroupNorm:
    """At most 32 groups, as many as divide the width."""
    return nn.GroupNorm(math.gcd(width, 32), width)
