"""What generated networks are compared with: cheap generators that see the same training networks.

`noise-r` adds Gaussian noise of r times each tensor's spread to a training network, `average-16`
is the mean of sixteen, `gaussian` is drawn from every weight's own mean and deviation; much
published work does not beat them (Zeng et al. 2506.07998). `nearest` looks a training network up:
what a generator is worth that has learnt its zoo by heart.

A subset of a trained network has controls of its own: the frozen rest may do all the work. The same
tensors at their default (norms: weight 1, bias 0), with their entries shuffled, filled with their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.base.seeding import seeded
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout
from flown.zoo.train.shard import initial

Baseline = Callable[[WeightBatch, int, torch.Generator], WeightBatch]


def _rows(train: WeightBatch, n: int, generator: torch.Generator) -> Tensor:
    """n rows at random, none twice unless there are fewer."""
    if not len(train):
        raise FlownError(f"baselines: no training network of '{train.name}'")
    rounds = -(-n // len(train))
    drawn = [torch.randperm(len(train), generator=generator) for _ in range(rounds)]
    return torch.cat(drawn)[:n] if drawn else torch.empty(0, dtype=torch.long)


def random_init(
    train: WeightBatch, n: int, generator: torch.Generator, init: str = "default"
) -> WeightBatch:
    """Untrained networks: PyTorch's default initialisation, or a recipe's `init`."""
    seeds = torch.randint(2**31, (n,), generator=generator).tolist()
    fresh = [initial(train.layout, init, seed) for seed in seeds]
    stacked = {name: torch.stack([f[name] for f in fresh]) for name in train.layout.names}
    return train.on(train.layout.pack(stacked))


def nearest(train: WeightBatch, n: int, generator: torch.Generator) -> WeightBatch:
    """Lookup: training networks of the task that the support set is of."""
    return train.on(train.vectors[_rows(train, n, generator)])


def noise(scale: float, train: WeightBatch, n: int, generator: torch.Generator) -> WeightBatch:
    """w + scale * std(w_tensor) * eps, w a training network."""
    base = train.vectors[_rows(train, n, generator)]  # indexing copies
    for part in torch.split(base, list(train.layout.numels), dim=1):
        draw = torch.randn(part.shape, generator=generator)
        part += scale * part.std(dim=1, keepdim=True, correction=0) * draw
    return train.on(base)


def average(count: int, train: WeightBatch, n: int, generator: torch.Generator) -> WeightBatch:
    """The mean of `count` different training networks, or of all where there are fewer."""
    count = min(count, len(train))
    means = [train.vectors[_rows(train, count, generator)].mean(dim=0) for _ in range(n)]
    return train.on(torch.stack(means))


def gaussian(train: WeightBatch, n: int, generator: torch.Generator) -> WeightBatch:
    """Every weight from a normal distribution of its own mean and deviation over the zoo."""
    _rows(train, 0, generator)
    mean, std = train.vectors.mean(dim=0), train.vectors.std(dim=0, correction=0)
    draw = torch.randn(n, train.layout.size, generator=generator)
    return train.on(mean + std * draw)


BASELINES: dict[str, Baseline] = {
    "random-init": random_init,
    "nearest": nearest,
    "noise-0.06": partial(noise, 0.06),
    "noise-0.12": partial(noise, 0.12),
    "average-16": partial(average, 16),
    "gaussian": gaussian,
}


def subset_default(train: WeightBatch, n: int, generator: torch.Generator) -> WeightBatch:
    """The subset as the network itself initialises it, on the trained rest."""
    seeds = torch.randint(2**31, (n,), generator=generator).tolist()
    fresh = [_fresh(train.layout, seed) for seed in seeds]
    stacked = {name: torch.stack([f[name] for f in fresh]) for name in train.layout.names}
    return train.on(train.layout.pack(stacked))


def _fresh(layout: WeightLayout, seed: int) -> dict[str, Tensor]:
    with seeded(seed):  # networks initialise themselves from the global one
        return {name: p.detach() for name, p in layout.architecture.build().named_parameters()}


def subset_shuffled(train: WeightBatch, n: int, generator: torch.Generator) -> WeightBatch:
    """Training networks, the entries of each tensor permuted."""
    base = train.vectors[_rows(train, n, generator)]
    parts = []
    for part in base.split(train.layout.numels, dim=1):
        order = torch.rand(part.shape, generator=generator).argsort(dim=1)
        parts.append(part.gather(1, order))
    return train.on(torch.cat(parts, dim=1))


def subset_mean(train: WeightBatch, n: int, generator: torch.Generator) -> WeightBatch:
    """Training networks, each tensor filled with its mean."""
    base = train.vectors[_rows(train, n, generator)]
    for part in base.split(train.layout.numels, dim=1):
        part.copy_(part.mean(dim=1, keepdim=True).expand_as(part))
    return train.on(base)


SUBSET_BASELINES: dict[str, Baseline] = {
    "subset-default": subset_default,
    "subset-shuffled": subset_shuffled,
    "subset-mean": subset_mean,
}


def fitting(train: WeightBatch, init: str = "default") -> dict[str, Baseline]:
    """The baselines of such networks: of a subset `subset-default` stands for `random-init`.

    `init` is the recipe's; where it is not PyTorch's, `recipe-init` starts from it.
    """
    if any(name not in train.layout.names for name, _ in train.network.named_parameters()):
        return {k: v for k, v in BASELINES.items() if k != "random-init"} | SUBSET_BASELINES
    if init != "default":
        return BASELINES | {"recipe-init": partial(random_init, init=init)}
    return BASELINES
