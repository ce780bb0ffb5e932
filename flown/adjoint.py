"""Adjoint matching: a flow fine-tuned towards a reward (Domingo-Enrich et al. 2409.08861).

The fine-tuned flow is to generate p(x) exp(r(x)) / Z, p what the base flow generates. For the path
x_t = (1 - t) x_0 + t x_1 with x_0 ~ N(0, I), both flows are run as the memoryless SDE, whose x_1 does
not depend on x_0:

    dx = (2 v(x, t) - x / t) dt + sigma(t) dB,       sigma(t)^2 = 2 (1 - t) / t
    da/dt = -(2 grad v_base - I / t)^T a,            a(1) = -grad r(x_1)          (lean adjoint)
    loss = E |v - v_base + sigma^2 / 2 a|^2          over paths of v, without gradients through them

The paper weighs the loss by 4 / sigma^2; any positive weight has the same minimiser, and this one is
flow matching's own. sigma has a pole at t = 0, so the SDE is stepped from t to s by its own transition
given the predicted ends, x_1^ = x + (1 - t) v and x_0^ = x - t v:

    x_s = s x_1^ + (1 - s) (rho x_0^ + sqrt(1 - rho^2) eps),     rho = t (1 - s) / (s (1 - t))

rho is 0 at t = 0: the first step forgets x_0. With noise of variance (1 - s)^2 (1 - rho^2) and a mean
that moves by s (1 - t) (1 - rho^2) per unit of v, the best v is v_base - (1 - s)^2 / (s (1 - t)) a_s,
where sigma^2 / 2 = (1 - t) / t stood, without its pole. The adjoint is that of these very steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flown.errors import FlownError

BoundVelocity = Callable[[Tensor, Tensor], Tensor]


def transition(x: Tensor, v: Tensor, t: float, s: float) -> tuple[Tensor, float]:
    """Mean (n, *L) and standard deviation of the memoryless step from t to s, 0 <= t < s <= 1."""
    rho = t * (1 - s) / (s * (1 - t))
    mean = s * (x + (1 - t) * v) + (1 - s) * rho * (x - t * v)
    return mean, (1 - s) * math.sqrt(1 - rho**2)


@torch.no_grad()
def memoryless_path(velocity: BoundVelocity, x0: Tensor, steps: int,
                    generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
    """States (steps + 1, n, *L) of the memoryless SDE on an even grid, from x0 (n, *L)."""
    states = [x0]
    for k in range(steps):
        t, s = k / steps, (k + 1) / steps
        v = velocity(states[-1], x0.new_tensor(t))
        mean, std = transition(states[-1], v, t, s)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        states.append(mean + std * noise)
    return torch.stack(states)


def lean_adjoint(base: BoundVelocity, path: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Backwards along a path (T+1, n, *L) from a(1) = `end` (n, *L).

    Returns a at the grid points after the first and v_base at those before the last, (T, n, *L) each.
    """
    steps = len(path) - 1
    adjoints, velocities = [end], []
    for k in reversed(range(steps)):
        with torch.enable_grad():
            x = path[k].detach().requires_grad_()
            v = base(x, path.new_tensor(k / steps))
            mean, _ = transition(x, v, k / steps, (k + 1) / steps)
        velocities.append(v.detach())
        if k:  # nothing is matched to the adjoint at t = 0
            adjoints.append(torch.autograd.grad(mean, x, adjoints[-1])[0])
    return torch.stack(adjoints[::-1]), torch.stack(velocities[::-1])


def adjoint_matching_loss(velocity: BoundVelocity, base: BoundVelocity, x0: Tensor,
                          reward: Callable[[Tensor], Tensor], steps: int,
                          generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
    """The loss of one batch of paths, a scalar.

    Args:
        velocity: v(x (n, *L), t ()) of the flow in training; the base is where it began.
        x0: Gaussian noise (n, *L).
        reward: of end points (n, *L), (n,), differentiable.
        steps: of the grid.

    Raises:
        FlownError: the reward has no gradient, or one that is NaN or Inf.
    """
    path = memoryless_path(velocity, x0, steps, generator)
    with torch.enable_grad():
        x1 = path[-1].detach().requires_grad_()
        value = reward(x1).sum()
    if not value.requires_grad:
        raise FlownError("reward: has no gradient with respect to the weights")
    (gradient,) = torch.autograd.grad(value, x1)
    if not torch.isfinite(gradient).all():
        raise FlownError("reward: its gradient holds NaN or Inf")
    adjoints, bases = lean_adjoint(base, path, -gradient)
    loss = x0.new_zeros(())
    for k in range(steps):
        t, s = k / steps, (k + 1) / steps
        target = bases[k] - (1 - s) ** 2 / (s * (1 - t)) * adjoints[k]
        loss = loss + (velocity(path[k], x0.new_tensor(t)) - target).square().mean() / steps
    return loss
