"""DDPM and DDIM against data whose best noise prediction is known."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flown
from flown.base.errors import FlownError
from flown.experiments.unconditional import share_encoder
from flown.flow import UNet, VelocityConfig, diffusion, guided
from flown.generator.config import FlownConfig
from flown.generator.objectives import FlowObjective
from flown.tasks import draw_support, load

pytest.importorskip("diffusers")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class GaussianData:
    """E[eps | z] of data N(mean, std^2), or E[v | z], by noise level; it counts its calls."""

    def __init__(self, mean: float, std: float, process: str = "diffusion") -> None:
        self.mean, self.std, self.process, self.calls = mean, std, process, 0
        betas = torch.linspace(1e-4, 0.02, 1000)
        if process == "latent-diffusion":
            betas = torch.linspace(0.0015**0.5, 0.0155**0.5, 1024).square()
        self.alphas = torch.cumprod(1 - betas, dim=0)

    def __call__(self, z: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls += 1
        a = self.alphas[((1 - t) * len(self.alphas)).round().long() - 1].view(
            -1, *[1] * (z.ndim - 1)
        )
        surprise = (z - a.sqrt() * self.mean) / (a * self.std**2 + 1 - a)
        eps, x1 = (1 - a).sqrt() * surprise, self.mean + a.sqrt() * self.std**2 * surprise
        return eps if self.process != "v-diffusion" else a.sqrt() * eps - (1 - a).sqrt() * x1


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


@pytest.mark.parametrize("process", diffusion.PROCESSES)
@pytest.mark.parametrize("name", diffusion.SAMPLERS)
def test_samples_have_the_datas_moments(name: str, process: str) -> None:
    net = GaussianData(1.5, 0.5, process)
    found = diffusion.denoise(net, noise(8_000, 1), name, generator=seeded(1), process=process).x
    assert found.mean().item() == pytest.approx(1.5, abs=0.03)
    assert found.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("process", diffusion.PROCESSES)
@pytest.mark.parametrize("steps", [1, 10, 100])
def test_ddim_finds_a_single_point_in_any_number_of_steps(steps: int, process: str) -> None:
    net = GaussianData(2.0, 0.0, process)
    found = diffusion.denoise(net, noise(4, 3), "ddim", steps, process=process)
    torch.testing.assert_close(found.x, torch.full((4, 3), 2.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "steps"), [("ddpm", 1000), ("ddpm", 50), ("ddim", 7)])
def test_nfe_is_the_number_of_calls(name: str, steps: int) -> None:
    net = GaussianData(0.0, 1.0)
    found = diffusion.denoise(net, noise(2, 1), name, steps, seeded(), trajectory=True)
    assert found.nfe == net.calls == steps
    assert found.times.shape == (steps + 1,)
    assert (found.times.diff() > 0).all()
    assert found.times[[0, -1]].tolist() == pytest.approx([0, 1], abs=1e-6)
    assert found.path is not None and found.path.shape == (steps + 1, 2, 1)
    assert torch.equal(found.path[0], noise(2, 1)) and torch.equal(found.path[-1], found.x)


def test_a_networks_error_at_the_start_is_magnified_by_eps_alone() -> None:
    """A tenth of a deviation, in predictions of the noisiest level: one step from there to x_1."""
    off = {}
    for process in diffusion.PROCESSES:
        net = GaussianData(2.0, 0.0, process)
        found = diffusion.denoise(
            lambda z, t, net=net: net(z, t) + 0.1,
            noise(4, 3),
            "ddim",
            1,  # type: ignore[misc]
            process=process,
        )
        off[process] = (found.x - 2).abs().max()
    assert off["diffusion"] > 15 > 5 > off["latent-diffusion"] > 3 and off["v-diffusion"] < 0.11


def test_loss_of_the_best_prediction() -> None:
    point = torch.full((500, 2), 2.0)
    for process in diffusion.PROCESSES:
        best = GaussianData(2.0, 0.0, process)
        assert diffusion.diffusion_loss(best, point, None, seeded(), process) < 1e-6
    data = torch.randn(4_000, 2, generator=seeded(1))
    best = diffusion.diffusion_loss(GaussianData(0.0, 1.0), data, None, seeded())
    expected = GaussianData(0.0, 1.0).alphas.mean()  # Var(eps | z) at unit variance is a_k
    assert best.item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("name", diffusion.SAMPLERS)
def test_with_the_flows_network(name: str) -> None:
    unet = UNet(VelocityConfig(channels=8, blocks=1, context_dropout=0.3), (4, 4, 4), 12)
    torch.nn.init.normal_(unet.out.weight, std=0.01, generator=seeded())
    x1, context = noise(6, 4, 4, 4), noise(6, 12)
    diffusion.diffusion_loss(unet, x1, context, seeded()).backward()
    assert [k for k, p in unet.named_parameters() if p.grad is None] == []
    eps = unet.eval().bind(context)
    draws = [
        diffusion.denoise(eps, noise(6, 4, 4, 4, seed=s), name, 5, seeded(s)).x for s in (1, 1, 2)
    ]
    assert draws[0].shape == (6, 4, 4, 4)
    assert not draws[0].requires_grad
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_guidance_spends_two_evaluations_a_step() -> None:
    unet = UNet(VelocityConfig(channels=8, blocks=1, context_dropout=0.3), (4, 4, 4), 12)
    eps = guided(unet.eval(), noise(1, 12), 2.0)
    assert diffusion.denoise(eps, noise(2, 4, 4, 4), "ddim", 7).nfe == 14


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(FlownError, match=f"between 1 and 1000, got {steps}"):
        diffusion.denoise(GaussianData(0.0, 1.0), noise(1, 1), "ddim", steps)


def test_unknown_samplers_are_refused() -> None:
    with pytest.raises(FlownError, match=r"unknown sampler 'dpm'\. Did you mean 'ddpm'"):
        diffusion.denoise(GaussianData(0.0, 1.0), noise(1, 1), "dpm")


def test_divergence_is_reported() -> None:
    with pytest.raises(FlownError, match=r"ddim, steps 3.*NaN"):
        diffusion.denoise(GaussianData(float("nan"), 1.0), noise(1, 1), "ddim", 3)


def test_missing_diffusers_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(FlownError, match=r"flown\[diffusion\]"):
        diffusion.denoise(GaussianData(0.0, 1.0), noise(1, 1))


@pytest.mark.parametrize(
    ("mode", "process"),
    [("none", "diffusion"), ("ordered", "diffusion"), ("ordered", "v-diffusion")],
)
def test_a_model_is_a_diffusion_by_its_config(
    run: Path, zoo: flown.Zoo, config: FlownConfig, tmp_path: Path, mode: str, process: str
) -> None:
    """p-diff without context, D2NWG with: trained, resumed, kept and sampled as a flow is."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    values = config.model_dump(mode="json")
    values["flow"] = {"process": process}
    values["context"]["mode"] = mode
    values["flow_training"] |= {"steps": 12, "checkpoint_every": 6}
    for folder in (whole, cut):
        folder.mkdir()
        share_encoder(run, folder)
    fit = partial(flown.Flown.fit, zoo, FlownConfig.parse(values), resume=True)
    model = fit(out=whole)
    with interrupted(after=7), pytest.raises(KeyboardInterrupt):
        fit(out=cut)
    support = () if mode == "none" else _support()
    first = model.sample(*support, n=3, solver="ddpm", steps=20)
    assert first.nfe == 20 and first.batch.provenance["solver"] == "ddpm"
    for again in (fit(out=cut), flown.Flown.from_pretrained(whole / "model")):
        vectors = again.generate(*support, n=3, solver="ddpm", steps=20).vectors
        assert torch.equal(vectors, first.batch.vectors)
    with pytest.raises(
        FlownError, match=rf"'euler': this model was trained as a {process}; .* ddim"
    ):
        model.generate(*support, n=1)


def test_a_flow_refuses_diffusions_samplers(model: flown.Flown) -> None:
    with pytest.raises(FlownError, match="'ddpm': this model was trained as a flow; choose euler"):
        model.generate(*_support(), n=1, solver="ddpm")


def test_a_diffusion_has_no_source_to_choose() -> None:
    for process in diffusion.PROCESSES:
        with pytest.raises(
            FlownError, match="no choice of source, coupling, path, loss, times and sigma"
        ):
            FlownConfig.parse({"flow": {"process": process, "coupling": "ot"}})


def _support() -> tuple[Tensor, Tensor]:
    some = draw_support(load("digits").train, 10, 3, seeded())
    return some.images, some.labels


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """Ctrl-C in the flow's training after some steps."""
    calls, forward = iter(range(after)), FlowObjective.forward

    def once(self: FlowObjective, generator: torch.Generator) -> Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return forward(self, generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowObjective, "forward", once)
        yield
