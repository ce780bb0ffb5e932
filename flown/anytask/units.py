"""A layer brought to the units of its support set: a normalisation that ends in the weights.

    z = w * h                                        without bias, on the support set
    mu = a mean(z) + (1 - a) m,   s^2 = a var(z) + (1 - a) v
    g (z - mu) / s + b  =  (g w / s) * h + (b - g mu / s)

How far K images are believed is learned, a = sigmoid(a_0 + a_1 log K), as in TaskNorm (Bronskill et
al. 2020, 2003.03284, section 4); m and v are what all tasks share. What is written has no such layer:
it is in the weights. Axes: n networks, K images, `out` neurons or channels of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_SMALLEST = 1e-3  # is added to variances


class Units(nn.Module):
    """Mean and scale of what a layer of `size` neurons computes, in each of E base networks."""

    def __init__(self, size: int, experts: int = 1) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(experts, size))
        self.log_variance = nn.Parameter(torch.zeros(experts, size))
        self.trust = nn.Parameter(torch.zeros(2))

    def forward(
        self, z: Tensor, gain: Tensor, bias: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor]:
        """By what each neuron is multiplied, and what is added then, each (n, out).

        Args:
            z: on the support set, (K, n out, ...). gain, bias: g and b, (n, out).
            shares: of the base networks, (n, E).
        """
        images = z.new_full((), z.shape[0])
        trust = (self.trust[0] + self.trust[1] * images.log()).sigmoid()
        mean, variance = (found.view_as(gain) for found in Moments.apply(z))
        mean = torch.lerp((shares @ self.mean).expand_as(mean), mean, trust)
        usual = (shares @ self.log_variance).exp().expand_as(variance)
        variance = torch.lerp(usual, variance, trust)
        factor = gain * (variance + _SMALLEST).rsqrt()
        return factor, bias - factor * mean


class Moments(torch.autograd.Function):
    """Means and variances (C,) of z (K, C, ...), read once on the way there and once on the way back.

    Composed of PyTorch's own differentiable operations it is read or written nine times, and memory
    is what a layer waits for.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():  # on the way to ONNX, which knows no such operation
            variance, mean = torch.var_mean(z, (0, *range(2, z.ndim)), correction=0)
        else:
            mean, variance = torch.batch_norm_update_stats(z, None, None, 0.0)
        ctx.save_for_backward(z, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> Tensor:
        z, mean = ctx.saved_tensors
        count, axes = z.numel() / len(mean), (-1, *[1] * (z.ndim - 2))
        slope = 2 / count * of_variance
        return torch.addcmul((of_mean / count - slope * mean).view(axes), z, slope.view(axes))
