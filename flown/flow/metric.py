"""Metric flow matching: paths that stay near the data (Kapusniak et al. 2405.14780).

    x_t = (1 - s) y_k-1 + s y_k + s (1 - s) phi(y_k-1, y_k, t)          on [t_k-1, t_k]
    phi minimises  E |dx_t/dt|^2_g,      |u|^2_g = sum_d g_d(x) u_d^2

`LandMetric` is the paper's metric, small where data is and 1 / epsilon away from it:

    g_d(x) = (h_d(x) + epsilon)^-1,    h_d(x) = sum_i (x_i,d - x_d)^2 exp(-|x_i - x|^2 / (2 sigma^2))

phi starts at 0, the piecewise straight path, which a flat metric keeps. It has one factor s (1 - s)
for each segment, so that the path passes through every marginal whatever phi is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.flow.path import PathSample
from flown.flow.trajectory import checked, segment

Metric = Callable[[Tensor], Tensor]  # x (B, L) -> the diagonal of g there, (B, L)
_NEIGHBOURS = 256  # points of which the distance to their nearest is measured


class MetricPath(nn.Module):
    """The path with its correction phi, an MLP on the flattened ends and the time."""

    def __init__(self, times: Sequence[float], shape: Sequence[int], width: int = 256) -> None:
        super().__init__()
        self.times, size = checked(times), math.prod(shape)
        self.phi = nn.Sequential(
            nn.Linear(2 * size + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, size),
        )
        nn.init.zeros_(self.phi[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.phi[-1].bias)  # type: ignore[arg-type]

    def forward(self, x0: Tensor, marginals: Tensor, t: Tensor) -> PathSample:
        """As `flow.Path`, differentiable in phi's parameters."""
        _, a, b, s, h = segment(x0, marginals, t, self.times)
        ends = torch.cat([a.flatten(1), b.flatten(1)], dim=1)

        def correction(t: Tensor) -> Tensor:
            found: Tensor = self.phi(torch.cat([ends, t[:, None]], dim=1))
            return found.view_as(a)

        phi, slope = torch.func.jvp(correction, (t,), (torch.ones_like(t),))  # type: ignore[misc]
        x = (1 - s) * a + s * b + s * (1 - s) * phi
        return PathSample(x, (b - a + (1 - 2 * s) * phi) / h + s * (1 - s) * slope)


def energy(path: PathSample, metric: Metric) -> Tensor:
    """Mean of |dx/dt|^2_g over a batch and its dimensions, a scalar."""
    x, u = path.x_t.flatten(1), path.u.flatten(1)
    return (metric(x) * u.square()).mean()


class LandMetric:
    """The LAND metric of points (N, L).

    `sigma` is in units of the points' median distance to the nearest other point; copies of a point,
    which a zoo may hold, do not count.

    Raises:
        FlownError: all points are equal, so they have no scale.
    """

    def __init__(self, points: Tensor, sigma: float = 1.0, epsilon: float = 1e-3) -> None:
        self.points, self.epsilon = points, epsilon
        # Without matrix products, whose rounding would keep copies apart.
        exact = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(points[:_NEIGHBOURS], points, compute_mode=exact)
        nearest = distances.masked_fill(distances == 0, torch.inf).amin(dim=1)
        if not torch.isfinite(nearest).all():
            raise FlownError(
                f"flow.path metric: all {len(points)} latents are equal, so the metric has no scale; "
                "fit on networks that differ, or choose flow.path spline"
            )
        self.sigma = sigma * float(nearest.median())

    def __call__(self, x: Tensor) -> Tensor:
        weights = (-torch.cdist(x, self.points).square() / (2 * self.sigma**2)).exp()  # (B, N)
        # sum_i w_i (x_i - x)^2 without a (B, N, L) tensor
        spread = weights @ self.points.square() - 2 * x * (weights @ self.points)
        spread = spread + x.square() * weights.sum(dim=1, keepdim=True)
        return 1 / (spread.clamp_min(0) + self.epsilon)
