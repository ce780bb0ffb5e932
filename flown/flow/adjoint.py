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

rho is 0 at t = 0: the first step forgets x_0. With x_1^ from the step's start alone, x_s lacks
the uncertainty about x_1, 3 % of a mixture's deviation after 100 steps, and the tilt magnifies
that. So a step is Heun's: it is made once, x_1^ is predicted again from where it leads, and it is
made with the mean of both and the same eps. The adjoint is that of these very steps. The target's
sigma^2 / 2 = (1 - t) / t is taken at the first grid point after 0 for t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.flow.velocity import BoundVelocity


def transition(x: Tensor, v: Tensor, t: float, s: float) -> tuple[Tensor, float]:
    """Mean (n, *L) and standard deviation of the memoryless step from t to s, 0 <= t < s <= 1."""
    rho = t * (1 - s) / (s * (1 - t))
    mean = s * (x + (1 - t) * v) + (1 - s) * rho * (x - t * v)
    return mean, (1 - s) * math.sqrt(1 - rho**2)


def corrected(x: Tensor, v: Tensor, y: Tensor, w: Tensor, t: float, s: float) -> Tensor:
    """The velocity at x whose x_1^ is the mean of that at x and that at y, where w = v(y, s)."""
    return (v + (y + (1 - s) * w - x) / (1 - t)) / 2


class SDEPath(NamedTuple):
    """States (T+1, n, *L) on an even grid, and where each step led before it was corrected (T, n, *L)."""

    states: Tensor
    guesses: Tensor


@torch.no_grad()
def memoryless_path(
    velocity: BoundVelocity, x0: Tensor, steps: int, generator: torch.Generator | None = None
) -> SDEPath:
    """The memoryless SDE from x0 (n, *L), two evaluations a step and one in the last."""
    states, guesses = [x0], []
    for k in range(steps):
        x, t, s = states[-1], k / steps, (k + 1) / steps
        v = velocity(x, x0.new_tensor(t))
        mean, std = transition(x, v, t, s)
        noise = std * torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        guesses.append(mean + noise)
        if k + 1 < steps:  # the last step ends at x_1^ itself
            w = velocity(guesses[-1], x0.new_tensor(s))
            mean, _ = transition(x, corrected(x, v, guesses[-1], w, t, s), t, s)
        states.append(mean + noise)
    return SDEPath(torch.stack(states), torch.stack(guesses))


def lean_adjoint(base: BoundVelocity, path: SDEPath, end: Tensor) -> tuple[Tensor, Tensor]:
    """Backwards along a path of T steps from a(1) = `end` (n, *L).

    Returns a at the grid points between 0 and 1, (T-1, n, *L), and v_base at those before 1, (T, n, *L).
    """
    steps = len(path.guesses)
    adjoints, velocities = [end], []
    for k in reversed(range(steps)):
        t, s = k / steps, (k + 1) / steps
        with torch.enable_grad():
            x = path.states[k].detach().requires_grad_()
            v = base(x, x.new_tensor(t))
            velocities.append(v.detach())
            if not k:  # nothing is matched to the adjoint at t = 0
                break
            mean, _ = transition(x, v, t, s)
            if k + 1 < steps:
                y = path.guesses[k] + mean - mean.detach()  # the guess, as a function of x
                w = base(y, x.new_tensor(s))
                mean, _ = transition(x, corrected(x, v, y, w, t, s), t, s)
        adjoints.append(torch.autograd.grad(mean, x, adjoints[-1])[0])
    return torch.stack(adjoints[:0:-1]), torch.stack(velocities[::-1])


def adjoint_matching_loss(
    velocity: BoundVelocity,
    base: BoundVelocity,
    x0: Tensor,
    reward: Callable[[Tensor], Tensor],
    steps: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The loss of one batch of paths, a scalar.

    Args:
        velocity: v(x (n, *L), t ()) of the flow in training; the base is where it began.
        x0: Gaussian noise (n, *L).
        reward: of end points (n, *L), (n,), differentiable.
        steps: of the grid, two or more.

    Raises:
        FlownError: one step only; the reward has no gradient, or one that is NaN or Inf.
    """
    if steps < 2:
        raise FlownError(f"steps: adjoint matching needs a grid of two or more, got {steps}")
    path = memoryless_path(velocity, x0, steps, generator)
    with torch.enable_grad():
        x1 = path.states[-1].detach().requires_grad_()
        value = reward(x1).sum()
    if not value.requires_grad:
        raise FlownError("reward: has no gradient with respect to the weights")
    (gradient,) = torch.autograd.grad(value, x1)
    if not torch.isfinite(gradient).all():
        raise FlownError("reward: its gradient holds NaN or Inf")
    adjoints, bases = lean_adjoint(base, path, -gradient)
    loss = x0.new_zeros(())
    for k in range(steps):
        near = max(k, 1)  # see above for t = 0
        target = bases[k] - (steps - near) / near * adjoints[near - 1]
        v = velocity(path.states[k], x0.new_tensor(k / steps))
        loss = loss + (v - target).square().mean() / steps
    return loss
