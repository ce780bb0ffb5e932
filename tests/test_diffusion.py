"""DDPM and DDIM against data whose best noise prediction is known."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flown import diffusion
from flown.errors import FlownError
from flown.flow import UNet, VelocityConfig

pytest.importorskip("diffusers")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class GaussianData:
    """E[eps | z] of data N(mean, std^2), by noise level; it counts its calls."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std, self.calls = mean, std, 0
        self.alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)

    def __call__(self, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls += 1
        a = self.alphas[((1 - t) * 1000).round().long() - 1].view(-1, *[1] * (z.ndim - 1))
        return (1 - a).sqrt() * (z - a.sqrt() * self.mean) / (a * self.std**2 + 1 - a)

    def bind(self, context: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        return self


SAMPLERS = {"ddpm": diffusion.sample_ddpm, "ddim": diffusion.sample_ddim}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_datas_moments(name: str) -> None:
    found = SAMPLERS[name](GaussianData(1.5, 0.5), (8_000, 1), generator=seeded()).x
    assert found.mean().item() == pytest.approx(1.5, abs=0.03)
    assert found.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("steps", [1, 10, 100])
def test_ddim_finds_a_single_point_in_any_number_of_steps(steps: int) -> None:
    found = diffusion.sample_ddim(GaussianData(2.0, 0.0), (4, 3), steps=steps, generator=seeded())
    torch.testing.assert_close(found.x, torch.full((4, 3), 2.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "steps"), [("ddpm", 1000), ("ddpm", 50), ("ddim", 7)])
def test_nfe_is_the_number_of_calls(name: str, steps: int) -> None:
    net = GaussianData(0.0, 1.0)
    found = SAMPLERS[name](net, (2, 1), steps=steps, generator=seeded())
    assert found.nfe == net.calls == steps
    assert found.times.shape == (steps + 1,)
    assert (found.times.diff() > 0).all()
    assert found.times[[0, -1]].tolist() == pytest.approx([0, 1], abs=1e-6)


def test_default_steps_are_the_papers() -> None:
    assert diffusion.sample_ddpm(GaussianData(0.0, 1.0), (1, 1), generator=seeded()).nfe == 1000
    assert diffusion.sample_ddim(GaussianData(0.0, 1.0), (1, 1), generator=seeded()).nfe == 100


def test_loss_of_the_best_prediction() -> None:
    point = torch.full((500, 2), 2.0)
    assert diffusion.diffusion_loss(GaussianData(2.0, 0.0), point, None, seeded()) < 1e-6
    data = torch.randn(4_000, 2, generator=seeded(1))
    best = diffusion.diffusion_loss(GaussianData(0.0, 1.0), data, None, seeded())
    expected = GaussianData(0.0, 1.0).alphas.mean()  # Var(eps | z) at unit variance is a_k
    assert best.item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("name", SAMPLERS)
def test_with_the_flows_network(name: str) -> None:
    unet = UNet(VelocityConfig(channels=8, blocks=1, context_dropout=0.3), (4, 4, 4), 12)
    torch.nn.init.normal_(unet.out.weight, std=0.01, generator=seeded())
    x1 = torch.randn(6, 4, 4, 4, generator=seeded())
    context = torch.randn(6, 12, generator=seeded())
    diffusion.diffusion_loss(unet, x1, context, seeded()).backward()
    assert [k for k, p in unet.named_parameters() if p.grad is None] == []
    draws = [
        SAMPLERS[name](unet.eval(), (6, 4, 4, 4), context, steps=5, generator=seeded(s)).x
        for s in (1, 1, 2)
    ]
    assert draws[0].shape == (6, 4, 4, 4)
    assert not draws[0].requires_grad
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(FlownError, match=f"between 1 and 1000, got {steps}"):
        diffusion.sample_ddim(GaussianData(0.0, 1.0), (1, 1), steps=steps)


def test_divergence_is_reported() -> None:
    with pytest.raises(FlownError, match=r"DDIM, steps 3.*NaN"):
        diffusion.sample_ddim(GaussianData(float("nan"), 1.0), (1, 1), steps=3)


def test_missing_diffusers_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(FlownError, match=r"flown\[diffusion\]"):
        diffusion.sample_ddim(GaussianData(0.0, 1.0), (1, 1))
