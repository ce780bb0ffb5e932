"""The straight path from source to data, and the regression that learns its velocity.

    x_t = (1 - t) x_0 + t x_1 + sigma eps,  eps ~ N(0, I),   t in [0, 1]
    u   = x_1 - x_0
    loss = E |v(x_t, t; c) - u|^2,          t ~ U[0, 1]      (FLoWN, eq. 1; I-CFM of Tong et al.)

or, `pseudo-huber`, E sqrt(|v - u|^2 / d + h^2) - h, which a mean of two networks does not minimise.
It is for a coupling that gives a point one velocity; of many it would learn their geometric
median.

Time runs from noise, t = 0, to weights, t = 1. The source of x_0 need not be Gaussian: u holds for
any pair, which a target written for a Gaussian source does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flown.base.errors import FlownError

LossName = Literal["squared", "pseudo-huber"]
_HUBER = 0.125  # h, in units of the latents' deviation


class PathSample(NamedTuple):
    """A point of the path and the velocity there, each (B, *L)."""

    x_t: Tensor
    u: Tensor


def sample_path(
    x0: Tensor, x1: Tensor, t: Tensor, sigma: float = 0.0, generator: torch.Generator | None = None
) -> PathSample:
    """The path between pairs at given times.

    Args:
        x0: source samples (B, *L).
        x1: data (B, *L), row by row the partner of x0.
        t: times (B,) in [0, 1].
        sigma: standard deviation of the noise around the straight line.

    Raises:
        FlownError: the shapes do not fit.
    """
    if x0.shape != x1.shape or t.shape != x1.shape[:1]:
        raise FlownError(
            f"path: x0 {tuple(x0.shape)}, x1 {tuple(x1.shape)} and t {tuple(t.shape)} do not fit; "
            "expected (B, *L), (B, *L) and (B,)"
        )
    t = t.view(-1, *[1] * (x1.ndim - 1))  # (B, 1, ...)
    return PathSample(_noised((1 - t) * x0 + t * x1, sigma, generator), x1 - x0)


def _noised(x: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    if not sigma:
        return x
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x + sigma * noise


def flow_matching_loss(
    velocity: Callable[..., Tensor],
    x0: Tensor,
    x1: Tensor,
    context: Tensor | None,
    t: Tensor | None = None,
    sigma: float = 0.0,
    generator: torch.Generator | None = None,
    path: Callable[[Tensor, Tensor, Tensor], PathSample] | None = None,
    loss: LossName = "squared",
) -> Tensor:
    """The error of the velocity on the path, a scalar: the mean of its square, or pseudo-Huber.

    Args:
        velocity: called as v(x_t, t, context), and with `drop` where it trains context dropout.
        x0: source samples (B, *L).
        x1: data (B, *L), or the marginals (B, K, *L) of a `path`.
        context: (B, C), or None for an unconditional flow.
        t: times (B,), drawn uniformly when None.
        sigma: noise of the path.
        generator: of t, the path's noise and the dropped contexts.
        path: a `flow.Path`, the straight one when None.
    """
    if t is None:
        t = torch.rand(len(x1), generator=generator, device=x1.device, dtype=x1.dtype)
    if path is None:
        x_t, u = sample_path(x0, x1, t, sigma, generator)
    else:
        x_t, u = path(x0, x1, t)
        x_t = _noised(x_t, sigma, generator)
    v = velocity(x_t, t, context, **dropped(velocity, context, generator))
    squared = (v - u).square().flatten(1).mean(dim=1)
    if loss == "pseudo-huber":
        return ((squared + _HUBER**2).sqrt() - _HUBER).mean()
    return squared.mean()


def dropped(
    velocity: Callable[..., Tensor], context: Tensor | None, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """The `drop` argument (B,) of a network in training, nothing for any other velocity.

    It is drawn even for a dropout of 0: the null context then has a gradient, of zeros, and
    distributed training finds no unused parameter.
    """
    chance = getattr(velocity, "context_dropout", None)
    if chance is None or context is None or not getattr(velocity, "training", False):
        return {}
    draws = torch.rand(len(context), generator=generator, device=context.device)
    return {"drop": draws < chance}
