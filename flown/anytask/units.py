"""A layer brought to the units of its support set: a normalisation that ends in the weights.

    z = w * h                                        without bias, on the support set
    mu = a mean(z) + (1 - a) m,   s^2 = a var(z) + (1 - a) v
    g (z - mu) / s + b  =  (g w / s) * h + (b - g mu / s)

How far K images are believed is learned, a = sigmoid(a_0 + a_1 log K), as in TaskNorm (Bronskill et
al. 2020, 2003.03284, section 4); m and v are what all tasks share. What is written has no such layer:
it is in the weights. Axes: n networks, K images, `out` neurons or channels of a layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_SMALLEST = 1e-3  # is added to variances


class Units(nn.Module):
    """Mean and scale of what a layer of `size` neurons computes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(size))
        self.log_variance = nn.Parameter(torch.zeros(size))
        self.trust = nn.Parameter(torch.zeros(2))

    def forward(self, z: Tensor, gain: Tensor, bias: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """By what each neuron is multiplied, and what is added then, each (n, out).

        Args:
            z: on the support set, (K, ..., n, out). gain, bias: g and b, (n, out). count: K.
        """
        trust = (self.trust[0] + self.trust[1] * math.log(count)).sigmoid()
        rows = z.flatten(0, -3)
        mean = rows.mean(dim=0)
        variance = rows.square().mean(dim=0) - mean.square()  # eight times as fast as torch.var
        mean = torch.lerp(self.mean.expand_as(mean), mean, trust)
        variance = torch.lerp(self.log_variance.exp().expand_as(variance), variance, trust)
        factor = gain * (variance.clamp(min=0) + _SMALLEST).rsqrt()
        return factor, bias - factor * mean
