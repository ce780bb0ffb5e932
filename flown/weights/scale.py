"""Weights at unit scale, tensor by tensor and network by network; the scale travels with the vector.

    s_i = (w_i - m_t) / d_t,      m_t, d_t mean and deviation of the network's own tensor t
    scaled = [s; (m_t - mean m_t) / std m_t; (log d_t - mean log d_t) / std log d_t]     (D + 2 T,)

The means and deviations over networks in the second part are of the training split. A network's
scale is its own, not its task's: networks for tasks that nobody trained on can be scaled, and
restored. Between networks of one task it leaves the variance that a scale per task leaves, where
one scale for all tasks would drown those whose weights are small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flown.weights.layout import JointLayout

_FLOOR = 1e-6  # of a deviation: a tensor whose numbers are all equal has none
_RATIO, _SHIFT = 2.0, 10.0  # beyond which an untrained decoder's scale has no gradient


class NetworkScale(nn.Module):
    """Vectors (n, D) of a joint layout to scaled ones (n, D + 2 T) and back.

    T is the number of tensors. Padding is zero in either.
    """

    masks: Tensor
    tensors: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, joint: JointLayout) -> None:
        super().__init__()
        sizes = [math.prod(slot) for slot in joint.shapes]
        self.numbers, self.count = joint.size, len(sizes)
        self.size = self.numbers + 2 * self.count
        owners = torch.repeat_interleave(torch.arange(self.count), torch.tensor(sizes))
        self.register_buffer("masks", joint.masks, persistent=False)  # (A, D)
        self.register_buffer("tensors", owners, persistent=False)  # (D,)
        self.register_buffer("mean", torch.zeros(2 * self.count))
        self.register_buffer("std", torch.ones(2 * self.count))

    def mask(self, layouts: Tensor) -> Tensor:
        """True where networks of layouts (n,) have a number, (n, D + 2 T)."""
        mask = self.masks[layouts]
        return torch.cat([mask, mask.new_ones(len(mask), 2 * self.count)], dim=1)

    def fit(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fits on blocks of training vectors (n, D) with their layouts (n,), read once."""
        total = torch.zeros(2 * self.count, dtype=torch.float64)
        square, count = torch.zeros_like(total), 0
        for vectors, layouts in blocks:
            found = self._statistics(vectors.double(), layouts)
            total, count = total + found.sum(dim=0), count + len(found)
            square = square + found.square().sum(dim=0)
        if not count:
            return
        mean = total / count
        std = (square / count - mean.square()).clamp_min(0).sqrt()
        self.mean.copy_(mean)
        # What is the same in all networks would divide by zero.
        self.std.copy_(torch.where(std > 1e-5 * mean.abs().clamp_min(1), std, 1.0))

    def _statistics(self, vectors: Tensor, layouts: Tensor) -> Tensor:
        """Mean and log deviation of every tensor, (n, 2 T)."""
        mask = self.masks[layouts].to(vectors.dtype)
        count = self._sums(mask).clamp_min(1)
        mean = self._sums(vectors * mask) / count
        centred = (vectors - mean[:, self.tensors]) * mask
        deviation = (self._sums(centred.square()) / count).sqrt().clamp_min(_FLOOR)
        return torch.cat([mean, deviation.log()], dim=1)

    def _sums(self, values: Tensor) -> Tensor:
        """Sums over each tensor, (n, D) to (n, T)."""
        sums = values.new_zeros(len(values), self.count)
        return sums.index_add_(1, self.tensors, values)

    def forward(self, vectors: Tensor, layouts: Tensor) -> Tensor:
        """Scales vectors (n, D) of layouts (n,)."""
        statistics = self._statistics(vectors, layouts)
        mean, log_deviation = statistics.split(self.count, dim=1)
        numbers = (vectors - mean[:, self.tensors]) / log_deviation.exp()[:, self.tensors]
        numbers = torch.where(self.masks[layouts], numbers, 0)
        return torch.cat([numbers, (statistics - self.mean) / self.std], dim=1)

    def invert(self, scaled: Tensor, layouts: Tensor) -> Tensor:
        """The inverse of `forward`: (n, D + 2 T) to (n, D). Differentiable."""
        numbers, statistics = scaled.split([self.numbers, 2 * self.count], dim=1)
        mean, log_deviation = (statistics * self.std + self.mean).split(self.count, dim=1)
        vectors = mean[:, self.tensors] + numbers * log_deviation.exp()[:, self.tensors]
        return torch.where(self.masks[layouts], vectors, 0)

    def error(self, decoded: Tensor, scaled: Tensor, layouts: Tensor) -> Tensor:
        """Mean squared error of weights in units of their own tensor's deviation, a scalar.

            |(w_hat - w) / d|^2

        An error of m or log d counts as much as it moves the tensor's numbers.
        """
        found, statistics = decoded.split([self.numbers, 2 * self.count], dim=1)
        wanted, true = scaled.split([self.numbers, 2 * self.count], dim=1)
        mean, log_deviation = ((statistics - true) * self.std).split(self.count, dim=1)
        deviation = (true * self.std + self.mean)[:, self.count :].exp()
        ratio = log_deviation.clamp(-_RATIO, _RATIO).exp()
        shift = (mean / deviation).clamp(-_SHIFT, _SHIFT)
        error: Tensor = shift[:, self.tensors] + ratio[:, self.tensors] * found - wanted
        mask = self.masks[layouts]
        return (error.square() * mask).sum() / mask.sum()
