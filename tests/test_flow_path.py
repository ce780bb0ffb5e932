"""The path and its loss, against the equations and torchcfm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.flow import UNet, VelocityConfig, flow_matching_loss, sample_path


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(n: int = 5) -> tuple[Tensor, Tensor]:
    both = torch.randn(2, n, 4, 4, 4, generator=seeded(), dtype=torch.float64)
    return both[0], both[1]


def test_ends_and_velocity() -> None:
    x0, x1 = pair()
    at0, at1 = (sample_path(x0, x1, torch.full((5,), end).double()) for end in (0.0, 1.0))
    assert torch.equal(at0.x_t, x0)
    assert torch.equal(at1.x_t, x1)
    assert torch.equal(at0.u, x1 - x0)


def test_velocity_is_the_paths_derivative() -> None:
    x0, x1 = pair()
    t, h = torch.rand(5, generator=seeded(), dtype=torch.float64), 1e-6
    ahead, behind = sample_path(x0, x1, t + h), sample_path(x0, x1, t - h)
    torch.testing.assert_close((ahead.x_t - behind.x_t) / (2 * h), ahead.u, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_agrees_with_torchcfm(sigma: float) -> None:
    torchcfm = pytest.importorskip("torchcfm")
    x0, x1 = pair()
    t = torch.rand(5, generator=seeded(), dtype=torch.float64)
    matcher = torchcfm.ConditionalFlowMatcher(sigma=sigma)
    eps = torch.randn(x1.shape, generator=seeded(3), dtype=torch.float64)
    ours = sample_path(x0, x1, t, sigma, seeded(3))
    torch.testing.assert_close(ours.x_t, matcher.sample_xt(x0, x1, t, eps))
    torch.testing.assert_close(ours.u, matcher.compute_conditional_flow(x0, x1, t, ours.x_t))


def test_noise_has_the_stated_scale() -> None:
    x = torch.zeros(20_000, 1)
    noisy = sample_path(x, x, torch.rand(20_000, generator=seeded()), 0.3, seeded())
    assert noisy.x_t.std().item() == pytest.approx(0.3, rel=0.03)


def test_loss_of_known_velocities() -> None:
    x0, x1 = pair()
    perfect = flow_matching_loss(lambda x, t, c: x1 - x0, x0, x1, None, generator=seeded())
    still = flow_matching_loss(lambda x, t, c: 0 * x, x0, x1, None, generator=seeded())
    assert perfect.item() == 0
    torch.testing.assert_close(still, (x1 - x0).square().mean())


def test_times_are_uniform_and_given_times_used() -> None:
    seen: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        seen.append(t)
        return x

    x = torch.zeros(10_000, 2)
    flow_matching_loss(velocity, x, x, None, generator=seeded())
    assert 0 <= seen[0].min() < 0.01
    assert 0.99 < seen[0].max() <= 1
    assert seen[0].mean().item() == pytest.approx(0.5, abs=0.02)
    t = torch.full((10_000,), 0.25)
    flow_matching_loss(velocity, x, x, None, t=t)
    assert torch.equal(seen[1], t)


def test_seed_decides_the_loss() -> None:
    x0, x1 = pair()
    net = UNet(VelocityConfig(channels=8, context_dropout=0.5), (4, 4, 4), 16).double()
    torch.nn.init.normal_(net.out.weight, generator=seeded())
    torch.nn.init.normal_(net.null, generator=seeded())
    context = torch.randn(5, 16, generator=seeded(), dtype=torch.float64)
    losses = [
        flow_matching_loss(net, x0, x1, context, sigma=0.1, generator=seeded(s)) for s in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_context_dropout_is_drawn_in_training_only() -> None:
    drops: list[Tensor | None] = []

    class Recorder(UNet):
        def forward(self, x, t, context=None, drop=None):  # type: ignore[no-untyped-def]
            drops.append(drop)
            return super().forward(x, t, context, drop)

    net = Recorder(VelocityConfig(channels=8, context_dropout=0.25), (4, 4, 4), 16)
    x, context = torch.zeros(400, 4, 4, 4), torch.zeros(400, 16)
    flow_matching_loss(net, x, x, context, generator=seeded())
    flow_matching_loss(net, x, x, None, generator=seeded())
    flow_matching_loss(net.eval(), x, x, context, generator=seeded())
    assert drops[0] is not None
    assert drops[0].float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert drops[1:] == [None, None]


def test_wrong_shapes_are_named() -> None:
    x0, x1 = pair()
    with pytest.raises(FlownError, match=r"x0 \(5, 4, 4, 4\), x1 \(3, 4, 4, 4\)"):
        sample_path(x0, x1[:3], torch.zeros(3))
    with pytest.raises(FlownError, match=r"t \(5, 1\)"):
        sample_path(x0, x1, torch.zeros(5, 1))
