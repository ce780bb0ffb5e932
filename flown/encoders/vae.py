"""The variational autoencoder of weights (FLoWN A.2.1, sizes of Table 6, after D2NWG).

    h = LeakyReLU(Linear(D -> side^2)), read as a one-channel image, through a convolutional encoder
    q(z | w) = N(mu(w), sigma(w)^2),  z in R^(4 x s x s),  s = side / 2^(levels - 1)

Its loss, noise and latent scale: `flown.encoders.latent`.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.config import Size
from flown.base.errors import FlownError
from flown.encoders.latent import GaussianLatent, LatentConfig
from flown.nets.pixels import PixelAttention, group_norm
from flown.weights.layout import JointLayout


class VAEConfig(LatentConfig):
    """Sizes of the VAE. The defaults are the CPU preset, `published()` is Table 6's."""

    kind: Literal["vae"] = "vae"
    side: Size = 16
    width: Size = 16
    multipliers: tuple[Size, ...] = (1, 2, 2)
    blocks: Size = 1
    latent_channels: Size = 4

    @classmethod
    def published(cls, few_shot: bool = False) -> VAEConfig:
        """Table 6: a 4x4x4 latent for retrieval, 4x8x8 for few-shot heads."""
        multipliers = (1, 1, 2, 2) if few_shot else (1, 1, 2, 2, 2)
        beta = 1e-6 if few_shot else 1e-2
        return cls(side=64, width=128, multipliers=multipliers, blocks=2, beta=beta)


class VAE(GaussianLatent):
    """Standardised weight vectors (n, D) <-> latents (n, latent_channels, s, s)."""

    def __init__(self, config: VAEConfig, joint: JointLayout, size: int) -> None:
        shrink = 2 ** (len(config.multipliers) - 1)
        if config.side % shrink:
            raise FlownError(f"vae: side {config.side} is not divisible by {shrink}")
        side = config.side // shrink
        super().__init__(config, (config.latent_channels, side, side))
        self.config, self.size = config, size
        pixels = config.side**2
        widths = [config.width * m for m in config.multipliers]
        self.expand = nn.Linear(size, pixels)
        self.down = down(widths, config.blocks, 2 * config.latent_channels)
        self.posterior = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.up = up(widths[::-1], config.blocks, config.latent_channels)
        self.contract = nn.Linear(pixels, size)

    def approximate_posterior(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Mean before, and log-variance after scaling to unit deviation, of q(z | w); each (n, L)."""
        image = F.leaky_relu(self.expand(vectors)).unflatten(1, (1, self.config.side, -1))
        mean, logvar = self.posterior(self.down(image)).flatten(2).chunk(2, dim=1)
        return mean.flatten(1), logvar.flatten(1).clamp(-20, 4)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, *latent_shape) to vectors (n, D)."""
        return self.contract(self.up(latents).flatten(1))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """GroupNorm -> SiLU -> conv, twice, beside a skip connection."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(group_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)),
            *(group_norm(outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1)),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)  # type: ignore[no-any-return]


def _middle(width: int) -> list[nn.Module]:
    return [_Block(width, width), PixelAttention(width, 1), _Block(width, width)]


def down(widths: list[int], blocks: int, outputs: int) -> nn.Sequential:
    """An image (n, 1, h, w), halved at every level but the last, to `outputs` channels."""
    layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 3, padding=1)]
    width = widths[0]
    for level, target in enumerate(widths):
        for _ in range(blocks):
            layers.append(_Block(width, target))
            width = target
        if level < len(widths) - 1:
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
    last = [group_norm(width), nn.SiLU(), nn.Conv2d(width, outputs, 3, padding=1)]
    return nn.Sequential(*layers, *_middle(width), *last)


def up(widths: list[int], blocks: int, inputs: int) -> nn.Sequential:
    """The mirror of `down`, from `inputs` channels to an image."""
    width = widths[0]
    layers = [nn.Conv2d(inputs, width, 3, padding=1), *_middle(width)]
    for level, target in enumerate(widths):
        for _ in range(blocks + 1):
            layers.append(_Block(width, target))
            width = target
        if level < len(widths) - 1:
            layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1)]
    return nn.Sequential(*layers, group_norm(width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))
