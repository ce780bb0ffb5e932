"""Paths through several marginals: their knot_times, their derivative, scipy's spline, the metric."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path as File

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.flow import (
    LandMetric,
    MetricPath,
    Path,
    Piecewise,
    Spline,
    energy,
    flow_matching_loss,
    knot_times,
    sample_path,
)
from flown.training import TrainConfig, train

SHAPE = (2, 3)


def metric_path(times: tuple[float, ...]) -> MetricPath:
    """One whose correction is away from zero, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        path = MetricPath(times, SHAPE, width=16)
        nn.init.normal_(path.phi[-1].weight)  # type: ignore[arg-type]
    return path.double()


PATHS: dict[str, Callable[[tuple[float, ...]], Path]] = {
    "piecewise": Piecewise,
    "spline": Spline,
    "metric": metric_path,
}


def knots(n: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(n, *SHAPE, generator=generator, dtype=torch.float64)
    return x0, torch.randn(n, count, *SHAPE, generator=generator, dtype=torch.float64)


def full(n: int, t: float) -> Tensor:
    return torch.full((n,), t, dtype=torch.float64)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("times", [(1.0,), (0.5, 1.0), (0.1, 0.3, 0.35, 1.0), knot_times(6)])
def test_passes_through_its_marginals(name: str, times: tuple[float, ...]) -> None:
    path, (x0, marginals) = PATHS[name](times), knots(4, len(times))
    assert torch.equal(path(x0, marginals, full(4, 0.0)).x_t, x0)
    for k, t in enumerate(times):
        found = path(x0, marginals, full(4, t)).x_t
        torch.testing.assert_close(found, marginals[:, k], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_the_paths_derivative(name: str) -> None:
    path, (x0, marginals) = PATHS[name]((0.2, 0.5, 1.0)), knots(5, 3)
    t, h = torch.tensor([0.05, 0.19, 0.3, 0.7, 0.95], dtype=torch.float64), 1e-6
    with torch.no_grad():
        ahead, behind = (path(x0, marginals, t + shift).x_t for shift in (h, -h))
        u = path(x0, marginals, t).u
    torch.testing.assert_close((ahead - behind) / (2 * h), u, rtol=1e-6, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.02, 1.0), min_size=1, max_size=6), st.integers(0, 99))
def test_the_spline_is_scipys(gaps: list[float], seed: int) -> None:
    edges = np.cumsum(gaps) / np.sum(gaps)
    edges[-1] = 1.0
    x0, marginals = knots(8, len(gaps), seed)
    t = torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = Spline(edges.tolist())(x0, marginals, t)
    every = torch.cat([x0[:, None], marginals], dim=1).numpy()
    theirs = [CubicSpline([0.0, *edges], rows, bc_type="natural") for rows in every]
    for i, spline in enumerate(theirs):
        scale = 1 + np.abs(spline(float(t[i]), 1)).max()
        np.testing.assert_allclose(found.x_t[i], spline(float(t[i])), atol=1e-9 * scale)
        np.testing.assert_allclose(found.u[i], spline(float(t[i]), 1), atol=1e-9 * scale)


@pytest.mark.parametrize("kind", [Piecewise, Spline])
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_one_marginal_is_the_straight_path_bit_for_bit(
    kind: type[Piecewise | Spline], sigma: float
) -> None:
    x0, marginals = (x.float() for x in knots(64, 1))
    t = torch.rand(64, generator=torch.Generator().manual_seed(1))
    ours, straight = kind((1.0,))(x0, marginals, t), sample_path(x0, marginals[:, 0], t)
    assert torch.equal(ours.x_t, straight.x_t)
    assert torch.equal(ours.u, straight.u)

    def loss(x1: Tensor, path: Path | None) -> Tensor:
        return flow_matching_loss(
            lambda x, t, context: x,
            x0,
            x1,
            None,
            sigma=sigma,
            path=path,
            generator=torch.Generator().manual_seed(2),
        )

    assert torch.equal(loss(marginals, kind((1.0,))), loss(marginals[:, 0], None))


def test_the_spline_has_no_kinks() -> None:
    x0, marginals = knots(3, 3)
    for k in range(2):
        t = knot_times(3)[k]
        before, after = (
            Spline(knot_times(3))(x0, marginals, full(3, t + side)).u for side in (-1e-9, 1e-9)
        )
        torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


def arc(n: int, generator: torch.Generator) -> Tensor:
    """Points (n, 2) near a half circle of radius 3."""
    angle = torch.rand(n, generator=generator) * torch.pi
    points = 3 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return points + 0.05 * torch.randn(n, 2, generator=generator)


class Energy(nn.Module):
    """From one end of the arc to the other."""

    def __init__(self, metric: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.path = MetricPath((1.0,), (2,), width=64)
            nn.init.normal_(self.path.phi[-1].weight, std=0.1)  # type: ignore[arg-type]
        self.metric = metric

    def ends(self, n: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([[3.0, 0.0]]).expand(n, 2), torch.tensor([[[-3.0, 0.0]]]).expand(
            n, 1, 2
        )

    def forward(self, generator: torch.Generator) -> Tensor:
        return energy(self.path(*self.ends(128), torch.rand(128, generator=generator)), self.metric)


def middle(metric: Callable[[Tensor], Tensor], out: File) -> Tensor:
    objective = Energy(metric)
    config = TrainConfig(steps=400, learning_rate=1e-2, warmup=10, weight_decay=0.0, ema=0.9)
    train(objective, config, out=out, name="energy")
    with torch.no_grad():
        return objective.path(*objective.ends(9), torch.linspace(0.1, 0.9, 9)).x_t


def test_a_flat_metric_keeps_the_straight_path(tmp_path: File) -> None:
    found = middle(torch.ones_like, tmp_path)
    straight = torch.stack([3 - 6 * torch.linspace(0.1, 0.9, 9), torch.zeros(9)], dim=1)
    torch.testing.assert_close(found, straight, rtol=0, atol=0.06)


def test_land_follows_the_data(tmp_path: File, generator: torch.Generator) -> None:
    """The straight path cuts through the empty middle of the circle; the learnt one goes round."""
    metric = LandMetric(arc(400, generator), sigma=15.0)
    found = middle(metric, tmp_path)
    assert float(found.norm(dim=1).min()) > 2.2
    assert float(found[4, 1]) > 2.2


def test_land_is_its_formula(generator: torch.Generator) -> None:
    points = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    metric = LandMetric(points, sigma=2.0, epsilon=1e-2)
    apart = points[None] - x[:, None]  # (5, 30, 4)
    weights = (-apart.square().sum(2) / (2 * metric.sigma**2)).exp()
    by_hand = 1 / ((weights[..., None] * apart.square()).sum(1) + 1e-2)
    torch.testing.assert_close(metric(x), by_hand)


def test_copies_of_a_point_do_not_shrink_the_metric(generator: torch.Generator) -> None:
    """A zoo may hold networks twice; the scale is that of different ones."""
    points, x = torch.randn(30, 4, generator=generator), torch.randn(5, 4, generator=generator)
    twice = LandMetric(points.repeat(3, 1))
    assert twice.sigma == pytest.approx(LandMetric(points).sigma, rel=1e-6)
    assert torch.isfinite(twice(x)).all() and torch.isfinite(twice(points)).all()
    with pytest.raises(FlownError, match="all 3 latents are equal"):
        LandMetric(points[:1].repeat(3, 1))


@pytest.mark.parametrize("times", [(), (0.5,), (0.6, 0.5, 1.0), (0.0, 1.0), (0.5, 0.5, 1.0)])
def test_times_that_do_not_rise_to_one_are_refused(times: tuple[float, ...]) -> None:
    for kind in (Piecewise, Spline, MetricPath):
        with pytest.raises(FlownError, match="expected rising ones"):
            kind(times) if kind is not MetricPath else MetricPath(times, SHAPE)


def test_other_shapes_are_refused() -> None:
    x0, marginals = knots(4, 3)
    with pytest.raises(FlownError, match=r"expected \(B, \*L\), \(B, 2, \*L\) and \(B,\)"):
        Piecewise(knot_times(2))(x0, marginals, full(4, 0.5))
    with pytest.raises(FlownError, match="do not fit"):
        Spline(knot_times(3))(x0[:3], marginals, full(4, 0.5))
