"""What weight encoders with a latent of their own scale share, and those with a Gaussian posterior.

    q(z | w) = N(mu(w), s^2 rho(w)^2)
    loss = |w_hat - w|^2 / D + beta KL(q || N(0, I)) / D                                    (eq. 2)
    z = f(w + xi_in),  w_hat = g((z - m) / s + xi_lat),  z ~ q,  xi ~ N(0, sigma^2)         (A.3.2)

m and s are mean and deviation of the latent means, per dimension: of the batch during training, of the
whole training split afterwards. Without them sigma_lat would mean nothing, and an unscaled latent is the
usual cause of "reconstruction is fine, generation is at chance". Samples are scaled as a whole, so the
network's rho is the posterior's deviation at unit scale. The divergence is that of q, before it is
scaled, and so depends on the means: on a batch, dKL/dmu = mu + (mu - m) (mean rho^2 - 1 / s^2).
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from flown.base.config import Config
from flown.encoders.base import Encoder

_ROWS = 256  # networks encoded at once where the scale is fitted
_SMALLEST = 1e-4  # deviation of a latent dimension that does not vary


class LatentConfig(Config):
    """Weight of the KL term, and the noise on weights and latents, both of unit scale."""

    beta: float = 1e-2
    sigma_in: float = 1e-3
    sigma_lat: float = 0.5


class ScaledLatent(Encoder):
    """An encoder whose codes (n, L) are brought to unit scale, dimension by dimension."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        super().__init__(latent_shape)
        self.register_buffer("latent_mean", torch.zeros(math.prod(latent_shape)))
        self.register_buffer("latent_std", torch.ones(math.prod(latent_shape)))

    @abstractmethod
    def codes(self, vectors: Tensor) -> Tensor:
        """Vectors (n, D) to latents (n, L), not yet at unit scale."""

    def encode(self, vectors: Tensor) -> Tensor:
        """Vectors (n, D) to latents (n, *latent_shape)."""
        standard = (self.codes(vectors) - self.latent_mean) / self.latent_std
        return standard.view(-1, *self.latent_shape)

    @torch.no_grad()
    def fit_scale(self, vectors: Tensor) -> None:
        """Fits mean and deviation of the codes of training vectors (n, D)."""
        mean, std = scale_of(torch.cat([self.codes(part) for part in vectors.split(_ROWS)]))
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)


class GaussianLatent(ScaledLatent):
    """An encoder with `approximate_posterior` and `decode`, trained as a variational autoencoder."""

    def __init__(self, config: LatentConfig, latent_shape: tuple[int, int, int]) -> None:
        super().__init__(latent_shape)
        self.noise = config

    @abstractmethod
    def approximate_posterior(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Mean before, and log-variance after scaling to unit deviation, of q(z | w); each (n, L)."""

    def codes(self, vectors: Tensor) -> Tensor:
        """The posterior's means (n, L)."""
        return self.approximate_posterior(vectors)[0]

    def training_pass(
        self, vectors: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Vectors (n, D) decoded from noisy samples of the posterior, and equation 2's KL term."""
        c = self.noise
        noisy = vectors + c.sigma_in * noise_like(vectors, generator) * mask
        mean, logvar = self.approximate_posterior(noisy)
        centre, scale = scale_of(mean)
        z = (mean - centre) / scale + (logvar / 2).exp() * noise_like(mean, generator)
        latents = z + c.sigma_lat * noise_like(mean, generator)
        penalty = c.beta * divergence(mean, logvar + 2 * scale.log()) / mask.sum()
        return self.decode(latents.unflatten(1, self.latent_shape)), penalty


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, I)), summed over all entries, a scalar."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()


def scale_of(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (L,) of codes (n, L); the deviation is never 0."""
    return codes.mean(dim=0), codes.std(dim=0, correction=0).clamp_min(_SMALLEST)


def noise_like(values: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of the values' shape, on their device."""
    return torch.randn(values.shape, generator=generator, device=values.device, dtype=values.dtype)
