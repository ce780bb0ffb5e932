"""Adjoint matching against tilted distributions known in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.flow import integrate
from flown.flow.adjoint import adjoint_matching_loss, lean_adjoint, memoryless_path, transition
from flown.training import TrainConfig, train
from tests.problems import gaussian_to_gaussian

MEAN, STD = 1.0, 0.5
BASE = gaussian_to_gaussian(MEAN, 1.0, STD).velocity


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_step_is_the_memoryless_sde_in_the_limit(t: float) -> None:
    """dx = (2 v - x / t) dt + sqrt(2 (1 - t) / t) dB."""
    x, v, h = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64), 1e-6
    mean, std = transition(x, v, t, t + h)
    assert torch.allclose((mean - x) / h, 2 * v - x / t, atol=1e-4)
    assert std**2 / h == pytest.approx(2 * (1 - t) / t, rel=1e-4)


def test_the_base_flow_keeps_its_marginals_and_forgets_its_start(
    generator: torch.Generator,
) -> None:
    x0 = torch.randn(40_000, generator=generator)
    path = memoryless_path(BASE, x0, 40, generator).states
    for k in (10, 20, 40):
        t = k / 40
        assert float(path[k].mean()) == pytest.approx(t * MEAN, abs=0.02)
        assert float(path[k].std()) == pytest.approx(math.hypot(1 - t, t * STD), rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([x0, path[-1]]))[0, 1])) < 0.02


def test_the_lean_adjoint_is_the_gradient_through_the_base_steps() -> None:
    """With the noise held fixed, plain autograd through the base's steps gives the same."""
    x0, steps = torch.randn(6, dtype=torch.float64), 8
    path = memoryless_path(BASE, x0, steps, torch.Generator().manual_seed(0))

    def step(x: Tensor, k: int) -> Tensor:
        t, s = k / steps, (k + 1) / steps
        v = BASE(x, torch.tensor(t))
        noise = (
            path.guesses[k]
            - transition(path.states[k], BASE(path.states[k], torch.tensor(t)), t, s)[0]
        )
        y = transition(x, v, t, s)[0] + noise
        ends = x + (1 - t) * v, y + (1 - s) * BASE(y, torch.tensor(s))
        v = ((ends[0] + ends[1]) / 2 - x) / (1 - t)
        return transition(x, v, t, s)[0] + noise

    end = torch.randn(6, dtype=torch.float64)
    adjoints, velocities = lean_adjoint(BASE, path, end)
    for start in range(1, steps):
        x = leaf = path.states[start].clone().requires_grad_()
        for k in range(start, steps):
            x = step(x, k)
        assert torch.allclose(x, path.states[-1])
        (expected,) = torch.autograd.grad(x, leaf, end)
        assert torch.allclose(adjoints[start - 1], expected)
    assert adjoints.shape == (steps - 1, 6)
    assert torch.allclose(velocities[3], BASE(path.states[3], torch.tensor(3 / steps)))


class Affine(nn.Module):
    """The base plus one affine function of x at each point of the grid: exact for Gaussians."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.slope, self.shift = (nn.Parameter(torch.zeros(steps + 1)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        k = int((t * self.steps).round())
        return BASE(x, t) + self.slope[k] * x + self.shift[k]


@pytest.mark.parametrize("pull", [0.0, 3.0])
def test_a_gaussian_is_tilted(pull: float, generator: torch.Generator) -> None:
    """exp(2 x - pull x^2 / 2) times N(1, 0.25): a Gaussian whose moments are known."""
    steps = 25
    velocity = Affine(steps)
    optimizer = torch.optim.Adam(velocity.parameters(), 0.05)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)

    def reward(x: Tensor) -> Tensor:
        return 2 * x - pull * x.square() / 2

    for _ in range(120):
        x0 = torch.randn(1024, generator=generator)
        optimizer.zero_grad()
        adjoint_matching_loss(velocity, BASE, x0, reward, steps, generator).backward()
        optimizer.step()
        rates.step()
    precision = 1 / STD**2 + pull
    with torch.no_grad():
        x = integrate(velocity, torch.randn(50_000, generator=generator), "heun", steps).x
    assert float(x.mean()) == pytest.approx((MEAN / STD**2 + 2) / precision, rel=0.03)
    assert float(x.std()) == pytest.approx(precision**-0.5, rel=0.03)


MIXTURE = torch.tensor([-1.5, 1.0]), torch.tensor([0.4, 0.6]), torch.tensor([0.3, 0.7])


def mixture_velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[x_1 - x_0 | x_t = x] for x_1 from a mixture of two Gaussians, in each coordinate."""
    means, stds, weights = MIXTURE
    variance = (1 - t) ** 2 + t**2 * stds**2  # (2,)
    apart = x[..., None] - t * means
    chances = (weights.log() - variance.log() / 2 - apart.square() / (2 * variance)).softmax(-1)
    slopes = (t * stds**2 - (1 - t)) / variance
    return (chances * (means + slopes * apart)).sum(-1)


class Correction(nn.Module):
    """The mixture's velocity plus a table, linear between its points in x and t; an objective for the
    training loop."""

    def __init__(self, reward: Callable[[Tensor], Tensor], steps: int) -> None:
        super().__init__()
        self.reward, self.steps = reward, steps
        self.table = nn.Parameter(torch.zeros(steps + 1, 41))  # x from -4 to 4

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        k = int((t * self.steps).clamp(0, self.steps - 1e-4))
        row = torch.lerp(self.table[k], self.table[k + 1], t * self.steps - k)
        place = ((x + 4) * 5).clamp(0, 39.99)
        left = place.long()
        return mixture_velocity(x, t) + torch.lerp(row[left], row[left + 1], place - left)

    def forward(self, generator: torch.Generator) -> Tensor:
        x0 = torch.randn(1024, generator=generator)
        return adjoint_matching_loss(
            self.velocity, mixture_velocity, x0, self.reward, self.steps, generator
        )


@pytest.mark.parametrize(("push", "pull"), [(1.0, 0.0), (1.0, 1.0), (-1.0, 1.0)])
def test_a_mixture_is_tilted(push: float, pull: float, tmp_path: Path) -> None:
    """p(x) exp(push x - pull x^2 / 2): a mixture again, whose weights, means, deviations are known."""
    model = Correction(lambda x: push * x - pull * x.square() / 2, 25)
    config = TrainConfig(steps=150, learning_rate=0.1, warmup=10, weight_decay=0.0, ema=0.9, clip=0)
    train(model, config, out=tmp_path, name="mixture")
    with torch.no_grad():
        x0 = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
        x = integrate(model.velocity, x0, "heun", steps=50).x
    means, stds, weights = MIXTURE
    precisions = 1 / stds**2 + pull
    tilted = (means / stds**2 + push) / precisions
    grown = tilted.square() * precisions / 2 - means.square() / (2 * stds**2)
    weights = (weights.log() - stds.log() - precisions.log() / 2 + grown).softmax(0)
    mean = float((weights * tilted).sum())
    std = float(((weights * (1 / precisions + tilted**2)).sum() - mean**2).sqrt())
    assert float(x.mean()) == pytest.approx(mean, abs=0.03 * std)
    assert float(x.std()) == pytest.approx(std, rel=0.03)
    # The modes are far apart: what is left of the middle is one's weight.
    assert float((x < -0.5).float().mean()) == pytest.approx(float(weights[0]), abs=0.015)


def test_rewards_without_a_usable_gradient_are_refused(generator: torch.Generator) -> None:
    def loss(reward: Callable[[Tensor], Tensor]) -> Tensor:
        return adjoint_matching_loss(BASE, BASE, torch.zeros(3), reward, 4, generator)

    with pytest.raises(FlownError, match="no gradient"):
        loss(lambda x: x.detach())
    with pytest.raises(FlownError, match="NaN or Inf"):
        loss(lambda x: (x - x).sqrt())
    with pytest.raises(FlownError, match="two or more, got 1"):
        adjoint_matching_loss(BASE, BASE, torch.zeros(3), lambda x: x, 1, generator)
