"""p-diff's autoencoder of weights (Wang et al. 2024): one-dimensional convolutions on the flat vector.

    encode: [conv of a stride -> norm -> LeakyReLU] per level, a linear layer to a latent vector
    decode: a linear layer, [transposed conv of that stride -> norm -> ELU] per level, a last conv

    loss = |w_hat - w|^2 / D,    z = f(w + xi_in),  w_hat = g(z + xi_lat),  xi ~ N(0, sigma^2)

Strides, channels and kernels are their code's, and so are the noise factors of their paper, 1e-3 on
the weights and 0.1 on the latent. Two things differ: GroupNorm for BatchNorm, so that a network's
latent does not depend on those beside it, and a latent at unit scale, without which 0.1 means nothing.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from flown.base.config import Config, Size
from flown.base.errors import FlownError
from flown.encoders.latent import ScaledLatent, noise_like, scale_of
from flown.weights.layout import JointLayout


class PDiffConfig(Config):
    """Sizes of the autoencoder. The defaults are a CPU preset, `published()` is p-diff's."""

    kind: Literal["pdiff"] = "pdiff"
    channels: tuple[Size, ...] = Field(default=(8, 16, 32), min_length=1)
    kernel: Size = 7
    stride: Size = Field(default=4, ge=2)
    latent_shape: tuple[Size, Size, Size] = (4, 4, 4)
    sigma_in: float = 1e-3
    sigma_lat: float = 0.1

    @classmethod
    def published(cls) -> PDiffConfig:
        """Five levels that halve the length, 128 latent numbers."""
        return cls(channels=(64, 128, 256, 256, 32), stride=2, latent_shape=(8, 4, 4))


class PDiff(ScaledLatent):
    """Standardised weight vectors (n, D) <-> latents (n, *latent_shape).

    Raises:
        FlownError: a kernel that is even or shorter than the stride: it would skip weights.
    """

    def __init__(self, config: PDiffConfig, joint: JointLayout, size: int) -> None:
        super().__init__(config.latent_shape)
        kernel, stride, channels = config.kernel, config.stride, config.channels
        if kernel < stride or kernel % 2 == 0:
            raise FlownError(f"pdiff: kernel {kernel} must be odd and at least the stride {stride}")
        self.config, self.size = config, size
        length = math.ceil(size / stride ** len(channels))  # of the last level
        self.padding = length * stride ** len(channels) - size
        latents, shortest = math.prod(config.latent_shape), (channels[-1], length)
        layers: list[nn.Module] = []
        for inputs, outputs in zip((1, *channels), channels, strict=False):
            conv = nn.Conv1d(inputs, outputs, kernel, stride, kernel // 2)
            layers += [conv, nn.GroupNorm(1, outputs), nn.LeakyReLU()]
        last = nn.Linear(math.prod(shortest), latents)
        self.encoder = nn.Sequential(*layers, nn.Flatten(), last)
        trim = (kernel - stride + 1) // 2
        layers = [nn.Linear(latents, math.prod(shortest)), nn.Unflatten(1, shortest)]
        for inputs, outputs in zip(channels[::-1], (*channels[-2::-1], channels[0]), strict=True):
            back = nn.ConvTranspose1d(
                inputs, outputs, kernel, stride, trim, output_padding=2 * trim - kernel + stride
            )
            layers += [back, nn.GroupNorm(1, outputs), nn.ELU()]
        final = nn.Conv1d(channels[0], 1, kernel, padding=kernel // 2)
        self.decoder = nn.Sequential(*layers, final, nn.Flatten())

    def codes(self, vectors: Tensor) -> Tensor:
        """Vectors (n, D) to latents (n, L), not yet at unit scale."""
        flat: Tensor = self.encoder(nn.functional.pad(vectors, (0, self.padding))[:, None])
        return flat

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, *latent_shape) to vectors (n, D)."""
        padded: Tensor = self.decoder(latents.flatten(1))
        return padded[:, : self.size]

    def training_pass(
        self, vectors: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Standardised vectors (n, D) decoded under noise; there is no penalty."""
        noisy = vectors + self.config.sigma_in * noise_like(vectors, generator) * mask
        codes = self.codes(noisy)
        centre, scale = scale_of(codes)
        z = (codes - centre) / scale + self.config.sigma_lat * noise_like(codes, generator)
        return self.decode(z.unflatten(1, self.latent_shape)), z.new_zeros(())
