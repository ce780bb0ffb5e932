"""Integration of the flow, dx/dt = v(x, t), from the source at t = 0 to weights at t = 1.

An explicit Runge-Kutta step of length h is data, its tableau (c, a, b):

    k_i = v(x + h sum_j a_ij k_j, t + c_i h),        x <- x + h sum_i b_i k_i

Fixed-grid solvers are differentiated as they are computed (discretise, then optimise): their
gradient is that of the numbers returned, never that of a continuous adjoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flown.base.errors import FlownError, unknown
from flown.flow.recompute import Recomputed
from flown.flow.velocity import BoundVelocity

_MAX_ADAPTIVE_STEPS = 10_000  # a stiff velocity would keep dopri5 busy without end


class Tableau(NamedTuple):
    """Nodes c, rows of a below the diagonal, and weights b."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


# rk4 is Kutta's 3/8 rule, as in torchdiffeq. dopri5 has no grid: None.
SOLVERS: dict[str, Tableau | None] = {
    "euler": Tableau((0,), ((),), (1,)),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "rk4": Tableau(
        (0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)
    ),
    "dopri5": None,
}


class Solution(NamedTuple):
    """Where the flow ended: x (n, *L), and what it cost.

    `nfe` counts the network evaluations made for a row; `times` (T+1,) is the grid, and `path`
    (T+1, n, *L) the states on it, if asked for.
    """

    x: Tensor
    nfe: int
    times: Tensor
    path: Tensor | None


class _Counted:
    """A velocity that counts its evaluations; a guided one spends two a call."""

    def __init__(self, velocity: BoundVelocity) -> None:
        self.velocity, self.nfe = velocity, 0
        inner = velocity.velocity if isinstance(velocity, Recomputed) else velocity
        self.price: int = getattr(inner, "evaluations", 1)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.nfe += self.price
        return self.velocity(x, t)


def integrate(
    velocity: BoundVelocity,
    x0: Tensor,
    solver: str = "euler",
    steps: int = 100,
    t0: float = 0.0,
    t1: float = 1.0,
    trajectory: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    recompute: bool = False,
) -> Solution:
    """Follows the flow from x0 at t0 to t1.

    Args:
        velocity: v(x (n, *L), t ()), its condition already bound.
        x0: start (n, *L).
        solver: a name of `SOLVERS`.
        steps: of the fixed grid; dopri5 chooses its own and reports a trajectory on this grid.
        trajectory: keep the states on the grid.
        rtol: relative tolerance of dopri5.
        atol: absolute tolerance of dopri5.
        recompute: compute each velocity again in the backward pass rather than keep its activations.

    Raises:
        FlownError: unknown solver, steps < 1, `recompute` without a fixed grid, or a flow that
            diverged.
    """
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    if steps < 1:
        raise FlownError(f"steps: the solver needs at least one, got {steps}")
    tableau = SOLVERS[solver]
    counted = _Counted(Recomputed(velocity) if recompute else velocity)
    times = torch.linspace(t0, t1, steps + 1, dtype=x0.dtype, device=x0.device)
    if tableau is None:
        if recompute:
            raise FlownError("recompute: dopri5 has no fixed steps to recompute; choose euler")
        times = times if trajectory else times[[0, -1]]
        states: Sequence[Tensor] = _adaptive(counted, x0, times, rtol, atol)
    else:
        states = _fixed(counted, x0, times, (t1 - t0) / steps, tableau)
    if not torch.isfinite(states[-1]).all():
        raise _diverged(solver, steps, "the result holds NaN or Inf")
    path = torch.stack(tuple(states)) if trajectory else None
    return Solution(states[-1], counted.nfe, times, path)


def _fixed(
    velocity: _Counted, x: Tensor, times: Tensor, h: float, tableau: Tableau
) -> list[Tensor]:
    states = [x]
    for t in times[:-1]:
        states.append(_step(velocity, states[-1], t, h, tableau))
    return states


def _step(velocity: BoundVelocity, x: Tensor, t: Tensor, h: float, tableau: Tableau) -> Tensor:
    slopes: list[Tensor] = []
    for c, row in zip(tableau.c, tableau.a, strict=True):
        slopes.append(velocity(_advance(x, h, row, slopes), t + c * h if c else t))
    return _advance(x, h, tableau.b, slopes)


def _advance(x: Tensor, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        x = x.add(slope, alpha=h * weight) if weight else x
    return x


def _adaptive(
    velocity: _Counted, x0: Tensor, times: Tensor, rtol: float, atol: float
) -> tuple[Tensor, ...]:
    from torchdiffeq import odeint

    def reordered(t: Tensor, x: Tensor) -> Tensor:
        return velocity(x, t.to(x.dtype))

    try:
        states: Tensor = odeint(
            reordered,
            x0,
            times,
            method="dopri5",
            rtol=rtol,
            atol=atol,
            options={"max_num_steps": _MAX_ADAPTIVE_STEPS},
        )
    except AssertionError as error:  # torchdiffeq's way of giving up
        raise _diverged("dopri5", len(times) - 1, str(error)) from None
    return states.unbind()


def _diverged(solver: str, steps: int, reason: str) -> FlownError:
    return FlownError(
        f"solver {solver}, steps {steps}: the flow diverged ({reason}); take more steps, or check "
        "the model's training loss and the source's scale"
    )
