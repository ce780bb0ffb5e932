"""What generated networks must be compared with, each drawn from a zoo's training networks.

`noise-r` adds Gaussian noise of r times each tensor's spread to a training network, `average-16` is
the mean of sixteen, `gaussian` is drawn from every weight's own mean and deviation: cheap
generators that much published work does not beat (Zeng et al. 2506.07998).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flown.weights import WeightBatch

Baseline = Callable[[WeightBatch, int, torch.Generator], WeightBatch]


def _rows(train: WeightBatch, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(len(train), (n,), generator=generator)


def random_init(train: WeightBatch, n: int, generator: torch.Generator) -> WeightBatch:
    """PyTorch's default initialisation, U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    parts, fan_in = [], 1
    for shape in train.layout.shapes:
        if len(shape) > 1:
            fan_in = math.prod(shape[1:])
        unit = 2 * torch.rand(n, math.prod(shape), generator=generator) - 1
        parts.append(unit / math.sqrt(fan_in))
    return WeightBatch(train.layout, torch.cat(parts, dim=1))


def nearest(train: WeightBatch, n: int, generator: torch.Generator) -> WeightBatch:
    """Lookup: training networks of the task that the support set comes from."""
    return WeightBatch(train.layout, train.vectors[_rows(train, n, generator)].clone())


def noise(scale: float, train: WeightBatch, n: int, generator: torch.Generator) -> WeightBatch:
    """A training network plus Gaussian noise of `scale` times each tensor's standard deviation."""
    base = train.vectors[_rows(train, n, generator)].clone()
    for part in base.split(train.layout.numels, dim=1):
        draw = torch.randn(part.shape, generator=generator)
        part += scale * part.std(dim=1, keepdim=True) * draw
    return WeightBatch(train.layout, base)


def average(count: int, train: WeightBatch, n: int, generator: torch.Generator) -> WeightBatch:
    """The mean of `count` random training networks."""
    means = [train.vectors[_rows(train, count, generator)].mean(dim=0) for _ in range(n)]
    return WeightBatch(train.layout, torch.stack(means))


def gaussian(train: WeightBatch, n: int, generator: torch.Generator) -> WeightBatch:
    """Every weight from a normal distribution of its own mean and deviation over the zoo."""
    mean, std = train.vectors.mean(dim=0), train.vectors.std(dim=0, correction=0)
    draw = torch.randn(n, train.layout.size, generator=generator)
    return WeightBatch(train.layout, mean + std * draw)


BASELINES: dict[str, Baseline] = {
    "random-init": random_init,
    "nearest": nearest,
    "noise-0.06": partial(noise, 0.06),
    "noise-0.12": partial(noise, 0.12),
    "average-16": partial(average, 16),
    "gaussian": gaussian,
}
