"""The linear VAE, whose optimum is known: principal components.

    q(z | w) = N(A w + a, sigma^2),   w_hat = B z + b

As the KL term's weight goes to 0, A and B span the leading principal directions of the weights (Tipping
and Bishop 1999; Lucas et al. 1911.02469), which `fit` takes from their covariance instead of from
gradients. Its loss, noise and latent scale where it is trained: `flown.encoders.latent`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from flown.base.config import Size
from flown.encoders.latent import GaussianLatent, LatentConfig
from flown.weights.layout import JointLayout


class LinearConfig(LatentConfig):
    """The latent's shape; few-shot heads have 4x8x8."""

    kind: Literal["linear"] = "linear"
    latent_shape: tuple[Size, Size, Size] = (4, 8, 8)


class Linear(GaussianLatent):
    """Standardised weight vectors (n, D) <-> latents (n, *latent_shape)."""

    def __init__(self, config: LinearConfig, joint: JointLayout, size: int) -> None:
        super().__init__(config, config.latent_shape)
        self.config = config
        latent = math.prod(config.latent_shape)
        self.posterior = nn.Linear(size, latent)
        self.logvar = nn.Parameter(torch.full((latent,), -6.0))
        self.contract = nn.Linear(latent, size)

    def approximate_posterior(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Mean before, and log-variance after scaling to unit deviation, of q(z | w); each (n, L)."""
        mean = self.posterior(vectors)
        return mean, self.logvar.clamp(-20, 4).expand_as(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, *latent_shape) to vectors (n, D)."""
        return self.contract(latents.flatten(1))  # type: ignore[no-any-return]

    @torch.no_grad()
    def fit(self, vectors: Tensor) -> None:
        """The optimum for training vectors (n, D), latents of unit scale; what is beyond D is 0."""
        centre = vectors.mean(dim=0)
        covariance = (vectors - centre).T.double() @ (vectors - centre).double() / len(vectors)
        values, directions = torch.linalg.eigh(covariance)
        count = min(len(values), len(self.logvar))
        scale = values.flip(0)[:count].clamp_min(1e-8).sqrt()
        basis = directions.flip(1)[:, :count]  # (D, count), the leading one first
        for part in (*self.posterior.parameters(), *self.contract.parameters()):
            part.zero_()
        self.posterior.weight[:count] = (basis / scale).T.float()
        self.posterior.bias[:count] = -(centre.double() @ (basis / scale)).float()
        self.contract.weight[:, :count] = (basis * scale).float()
        self.contract.bias.copy_(centre)
        self.fit_scale(vectors)
