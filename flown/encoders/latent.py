"""What weight encoders with a Gaussian latent share.

    q(z | w) = N(mu(w), sigma(w)^2)
    loss = |w_hat - w|^2 / D + beta KL(q || N(0, I)) / D                                    (eq. 2)
    z = f(w + xi_in),  w_hat = g(z + xi_lat),  xi ~ N(0, sigma^2)                           (A.3.2)

The latent means are brought to unit scale per dimension, by batch statistics during training and by
those of the whole training split afterwards: without it, sigma_lat would mean nothing, and an
unscaled latent is the usual cause of "reconstruction is fine, generation is at chance".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flown.base.config import Config


class LatentConfig(Config):
    """Weight of the KL term, and the noise on weights and latents, both of unit scale."""

    beta: float = 1e-2
    sigma_in: float = 1e-3
    sigma_lat: float = 0.5


class GaussianLatent(nn.Module):
    """Encoding and training of an encoder that has `moments` and `decode`."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: LatentConfig, latent_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.noise, self.latent_shape = config, latent_shape
        self.register_buffer("latent_mean", torch.zeros(math.prod(latent_shape)))
        self.register_buffer("latent_std", torch.ones(math.prod(latent_shape)))

    def moments(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | w), each (n, L), the mean not yet at unit scale."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, *latent_shape) to vectors (n, D)."""
        raise NotImplementedError

    def encode(self, vectors: Tensor) -> Tensor:
        """Vectors (n, D) to posterior means (n, *latent_shape), standardised."""
        mean, _ = self.moments(vectors)
        standard = (mean - self.latent_mean) / self.latent_std
        return standard.view(-1, *self.latent_shape)

    def training_pass(
        self, vectors: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Standardised vectors (n, D) decoded under noise, and equation 2's KL term."""
        c = self.noise

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, device=like.device)

        mean, logvar = self.moments(vectors + c.sigma_in * noise(vectors) * mask)
        mean = (mean - mean.mean(dim=0)) / mean.std(dim=0, correction=0).clamp_min(1e-4)
        z = mean + (logvar / 2).exp() * noise(mean) + c.sigma_lat * noise(mean)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / mask.sum()
        return self.decode(z.unflatten(1, self.latent_shape)), c.beta * kl

    @torch.no_grad()
    def settle(self, vectors: Tensor) -> None:
        """Fits the latent's scale on the training vectors (n, D)."""
        mean = torch.cat([self.moments(some)[0] for some in vectors.split(256)])
        self.latent_mean.copy_(mean.mean(dim=0))
        self.latent_std.copy_(mean.std(dim=0, correction=0).clamp_min(1e-4))
