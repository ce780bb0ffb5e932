"""Every encoder keeps the protocol; the VAE has the published shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flown import encoders
from flown.base.errors import FlownError
from flown.encoders import LinearConfig, PDiffConfig, VAEConfig
from flown.weights.layout import JointLayout
from flown.weights.scale import NetworkScale
from tests.examples import layout

JOINT = JointLayout.of([layout()])
SIZE = NetworkScale(JOINT).size


@pytest.fixture(params=list(encoders.ENCODERS))
def encoder(request: pytest.FixtureRequest) -> encoders.Encoder:
    torch.manual_seed(0)
    return encoders.build(encoders.from_values({"kind": request.param}), JOINT, SIZE)


def test_contract(encoder: encoders.Encoder, generator: torch.Generator) -> None:
    vectors = torch.randn(6, SIZE, generator=generator)
    encoder.fit_scale(vectors)
    encoder.eval()
    latents = encoder.encode(vectors)
    assert latents.shape == (6, *encoder.latent_shape)
    assert encoder.decode(latents).shape == vectors.shape
    assert torch.equal(encoder.encode(vectors), latents), "encoding draws nothing"
    assert torch.equal(encoder.decode(latents), encoder.decode(latents)), "decoding draws nothing"
    encoder.train()
    mask = torch.ones_like(vectors, dtype=torch.bool)
    decoded, penalty = encoder.training_pass(vectors, mask, generator)
    assert decoded.shape == vectors.shape and penalty.ndim == 0
    if list(encoder.parameters()):
        ((decoded - vectors).square().mean() + penalty).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_saved_and_loaded_it_is_the_same(
    encoder: encoders.Encoder, generator: torch.Generator, tmp_path: Path
) -> None:
    vectors = torch.randn(6, SIZE, generator=generator)
    encoder.fit_scale(vectors)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    again = encoders.build(encoder.config, JOINT, SIZE)
    again.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    latents = encoder.encode(vectors)
    assert torch.equal(again.encode(vectors), latents)
    assert torch.equal(again.decode(latents), encoder.decode(latents))


def test_the_divergence_reaches_the_means(generator: torch.Generator) -> None:
    """Its gradient is that of KL(N(mu, s^2 rho^2) || N(0, I)) for s the deviation of the means."""
    encoder = encoders.build(LinearConfig(latent_shape=(1, 4, 4), beta=1.0), JOINT, SIZE).double()
    vectors = torch.randn(8, SIZE, generator=generator, dtype=torch.float64)
    mask = torch.ones_like(vectors, dtype=torch.bool)
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, mean: torch.Tensor) -> None:
        mean.retain_grad()
        kept.append(mean)

    encoder.posterior.register_forward_hook(keep)
    _, penalty = encoder.training_pass(vectors, mask, generator)
    (mean,) = kept
    centre, std = mean.mean(dim=0), mean.std(dim=0, correction=0)
    rho2 = encoder.logvar.exp()
    sigma2 = std**2 * rho2
    kl = 0.5 * (mean**2 + sigma2 - 1 - sigma2.log()).sum()
    torch.testing.assert_close(penalty, kl / mask.sum())
    penalty.backward()
    expected = mean + (mean - centre) * (rho2 - 1 / std**2)
    torch.testing.assert_close(mean.grad, expected / mask.sum())


def test_identity_is_exact() -> None:
    encoder = encoders.build(encoders.IdentityConfig(), JOINT, SIZE)
    vectors = torch.randn(2, SIZE)
    assert torch.equal(encoder.decode(encoder.encode(vectors)), vectors)


@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (7, 4), (5, 5), (3, 2), (9, 4)])
def test_pdiffs_levels_undo_each_other(kernel: int, stride: int) -> None:
    """Whatever the length, each level's transposed convolution restores what its own shortened."""
    config = PDiffConfig(channels=(4, 6, 8), kernel=kernel, stride=stride)
    encoder = encoders.build(config, JOINT, SIZE)
    vectors = torch.randn(2, SIZE)
    assert encoder.decode(encoder.encode(vectors)).shape == vectors.shape
    assert encoder.decoder(torch.randn(1, 64)).shape[1] - SIZE == encoder.padding
    assert 0 <= encoder.padding < stride**3


def test_pdiff_as_published() -> None:
    encoder = encoders.build(PDiffConfig.published(), JOINT, SIZE)
    assert encoder.latent_shape == (8, 4, 4)
    convs = [m for m in encoder.encoder if isinstance(m, torch.nn.Conv1d)]
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == [
        (64, 7, 2),
        (128, 7, 2),
        (256, 7, 2),
        (256, 7, 2),
        (32, 7, 2),
    ]


@pytest.mark.parametrize(("few_shot", "shape"), [(False, (4, 4, 4)), (True, (4, 8, 8))])
def test_published_latents(few_shot: bool, shape: tuple[int, int, int]) -> None:
    config = VAEConfig.published(few_shot)
    small = config.model_copy(update={"width": 8})  # the shapes do not depend on the width
    encoder = encoders.build(small, JointLayout.of([layout(channels=3)]), 2884)
    assert encoder.latent_shape == shape and encoder.expand.out_features == 4096
    assert encoder.encode(torch.randn(1, 2884)).shape == (1, *shape)
    assert config.beta == (1e-6 if few_shot else 1e-2) and config.width == 128


@pytest.mark.parametrize("config", [VAEConfig(), PDiffConfig()])
def test_latents_settle_to_unit_scale(config: VAEConfig | PDiffConfig) -> None:
    encoder = encoders.build(config, JOINT, SIZE)
    vectors = torch.randn(200, SIZE)
    encoder.fit_scale(vectors)
    latents = encoder.encode(vectors).flatten(1)
    assert (
        latents.mean(0).abs().max() < 1e-4 and (latents.std(0, correction=0) - 1).abs().max() < 1e-3
    )


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(FlownError, match="side 18"):
        encoders.build(VAEConfig(side=18), JOINT, SIZE)
    for sizes in ({"kernel": 6}, {"kernel": 3, "stride": 4}):
        with pytest.raises(FlownError, match=r"pdiff: kernel \d must be odd"):
            encoders.build(PDiffConfig(**sizes), JOINT, SIZE)
    with pytest.raises(FlownError, match=r"unknown encoder 'vea'. Did you mean 'vae'"):
        encoders.from_values({"kind": "vea"})


def test_the_linear_vaes_optimum_is_exact_on_its_subspace(generator: torch.Generator) -> None:
    encoder = encoders.build(LinearConfig(latent_shape=(1, 4, 4)), JOINT, SIZE)
    basis = torch.randn(16, SIZE, generator=generator)
    vectors = torch.randn(300, 16, generator=generator) @ basis + 1
    encoder.fit(vectors)
    torch.testing.assert_close(
        encoder.decode(encoder.encode(vectors)), vectors, rtol=1e-3, atol=1e-2
    )
    latents = encoder.encode(vectors).flatten(1)
    torch.testing.assert_close(latents.T @ latents / 300, torch.eye(16), rtol=1e-3, atol=1e-3)
