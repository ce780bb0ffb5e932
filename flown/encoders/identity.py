"""No latent: the flow acts on the standardised weights themselves. A control for small networks."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from flown.base.config import Config
from flown.encoders.base import Encoder
from flown.weights.layout import JointLayout


class IdentityConfig(Config):
    kind: Literal["identity"] = "identity"


class Identity(Encoder):
    """Weights (n, D), zero-padded and reshaped to a square image (n, 1, s, s), s a multiple of 4."""

    def __init__(self, config: IdentityConfig, joint: JointLayout, size: int) -> None:
        side = 4 * math.ceil(math.sqrt(size) / 4)
        super().__init__((1, side, side))
        self.config, self.size = config, size

    def encode(self, vectors: Tensor) -> Tensor:
        padding = math.prod(self.latent_shape) - self.size
        return nn.functional.pad(vectors, (0, padding)).view(-1, *self.latent_shape)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.flatten(1)[:, : self.size]

    def training_pass(
        self, vectors: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The vectors themselves: there is nothing to train."""
        return vectors, vectors.new_zeros(())

    def fit_scale(self, vectors: Tensor) -> None:
        """Standardised weights have unit scale already."""
