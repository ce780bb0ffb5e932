"""Paths through several marginals: the checkpoints of one training, in order.

    (0, x_0), (t_1, y_1), ..., (t_K = 1, y_K),      y_k one network after epoch e_k,  t_k = k / K

`piecewise` joins them by straight lines, `spline` by the natural cubic spline, whose velocity is
continuous: multi-marginal flow matching (Rohbeck et al., ICLR 2025; FLoWN's section 5 proposes it).
With K = 1 both are the straight path, bit for bit. On [t_k-1, t_k] of length h, s = (t - t_k-1) / h
and M the second derivatives at the knots,

    x_t = (1 - s) y_k-1 + s y_k + h^2 / 6 ((1 - s)((1 - s)^2 - 1) M_k-1 + s (s^2 - 1) M_k)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.flow.path import PathSample


class Path(Protocol):
    """How x_0 travels through the marginals."""

    def __call__(self, x0: Tensor, marginals: Tensor, t: Tensor) -> PathSample:
        """x_t and its velocity, (B, *L) each, of x_0 (B, *L) and marginals (B, K, *L) at t (B,)."""


class Segment(NamedTuple):
    """Between which knots t lies: their number (B,), ends (B, *L), place s in [0, 1] and length h."""

    number: Tensor
    start: Tensor
    end: Tensor
    s: Tensor
    h: Tensor


def knot_times(count: int) -> tuple[float, ...]:
    """Times t_1 .. t_K of K marginals."""
    return tuple(k / count for k in range(1, count + 1))


def segment(x0: Tensor, marginals: Tensor, t: Tensor, times: Sequence[float]) -> Segment:
    """The segment of each row; s and h are shaped to multiply (B, *L).

    Raises:
        FlownError: the shapes do not fit, or there are not as many marginals as times.
    """
    fits = marginals.shape[0:1] + marginals.shape[2:] == x0.shape and t.shape == x0.shape[:1]
    if not fits or marginals.shape[1] != len(times):
        raise FlownError(
            f"path: x0 {tuple(x0.shape)}, marginals {tuple(marginals.shape)} and t {tuple(t.shape)} "
            f"do not fit; expected (B, *L), (B, {len(times)}, *L) and (B,)"
        )
    knots = torch.cat([x0[:, None], marginals], dim=1)  # (B, K + 1, *L)
    edges = t.new_tensor((0.0, *times))
    k = torch.bucketize(t, edges[1:-1].contiguous(), right=True)
    rows, wide = torch.arange(len(t), device=t.device), (-1, *[1] * (x0.ndim - 1))
    h = (edges[k + 1] - edges[k]).view(wide)
    s = (t - edges[k]).view(wide) / h
    return Segment(k, knots[rows, k], knots[rows, k + 1], s, h)


class Piecewise:
    """Straight lines from marginal to marginal."""

    def __init__(self, times: Sequence[float]) -> None:
        self.times = checked(times)

    def __call__(self, x0: Tensor, marginals: Tensor, t: Tensor) -> PathSample:
        _, a, b, s, h = segment(x0, marginals, t, self.times)
        return PathSample((1 - s) * a + s * b, (b - a) / h)


class Spline:
    """The natural cubic spline: no second derivative at either end."""

    def __init__(self, times: Sequence[float]) -> None:
        self.times = checked(times)
        h = torch.tensor((0.0, *self.times), dtype=torch.float64).diff()
        inner, outer = len(h) - 1, len(h) + 1
        # h_k-1 M_k-1 + 2 (h_k-1 + h_k) M_k + h_k M_k+1 = 6 (slope_k - slope_k-1) at inner knots
        left, right = torch.zeros(inner, inner), torch.zeros(inner, outer)
        left, right = left.double(), right.double()
        for i in range(inner):
            left[i, i] = 2 * (h[i] + h[i + 1])
            if i:
                left[i, i - 1] = left[i - 1, i] = h[i]
            right[i, i : i + 3] = 6 * torch.stack(
                [1 / h[i], -1 / h[i] - 1 / h[i + 1], 1 / h[i + 1]]
            )
        self.second_derivatives = torch.zeros(
            outer, outer, dtype=torch.float64
        )  # M = this times the knots
        self.second_derivatives[1:-1] = torch.linalg.solve(left, right)

    def __call__(self, x0: Tensor, marginals: Tensor, t: Tensor) -> PathSample:
        k, a, b, s, h = segment(x0, marginals, t, self.times)
        x, u = (1 - s) * a + s * b, (b - a) / h
        if len(self.times) == 1:
            return PathSample(x, u)
        knots = torch.cat([x0[:, None], marginals], dim=1)
        matrix = self.second_derivatives.to(x0)
        before, after = (torch.einsum("bk,bk...->b...", matrix[i], knots) for i in (k, k + 1))
        r = 1 - s
        x = x + h**2 / 6 * (r * (r**2 - 1) * before + s * (s**2 - 1) * after)
        u = u + h / 6 * ((1 - 3 * r**2) * before + (3 * s**2 - 1) * after)
        return PathSample(x, u)


def checked(times: Sequence[float]) -> tuple[float, ...]:
    """The times, if they are rising, above 0, and end at 1.

    Raises:
        FlownError: they are not.
    """
    rising = all(a < b for a, b in zip((0.0, *times), times, strict=False))
    if not times or not rising or times[-1] != 1:
        raise FlownError(f"path: times {tuple(times)}: expected rising ones above 0, the last 1")
    return tuple(times)
