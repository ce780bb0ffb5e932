"""Velocities v(x, t) whose flows are known in closed form: (name, v, x(t; x0))."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Problem(NamedTuple):
    name: str
    velocity: Callable[[Tensor, Tensor], Tensor]
    exact: Callable[[Tensor, float], Tensor]


def gaussian_to_gaussian(mean: float, start: float, end: float) -> Problem:
    """N(0, start^2) -> N(mean, end^2) along straight lines between independent pairs.

    The marginal velocity E[x_1 - x_0 | x_t = x] is affine; its flow takes x_0 to
    t mean + sqrt(var_t) x_0 / start, with var_t = (1 - t)^2 start^2 + t^2 end^2.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        variance = (1 - t) ** 2 * start**2 + t**2 * end**2
        slope = (t * end**2 - (1 - t) * start**2) / variance
        return mean + slope * (x - t * mean)

    def exact(x0: Tensor, t: float) -> Tensor:
        return t * mean + math.hypot((1 - t) * start, t * end) * x0 / start

    return Problem("gaussian", velocity, exact)


PROBLEMS = [
    Problem("decay", lambda x, t: -x, lambda x0, t: x0 * math.exp(-t)),
    Problem(
        "swing", lambda x, t: 2 * x * torch.cos(2 * t), lambda x0, t: x0 * math.exp(math.sin(2 * t))
    ),
    Problem(
        "logistic",
        lambda x, t: x * (1 - x),
        lambda x0, t: x0 * math.exp(t) / (1 - x0 + x0 * math.exp(t)),
    ),
    gaussian_to_gaussian(2.0, 1.0, 0.5),
]
