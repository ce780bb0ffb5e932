"""A VAE for big networks, layer-wise vectorised (FLoWN A.2.1): chunk by chunk, one latent for all.

    w, zero-padded, = (w_1, ..., w_K), chunks of one length, all through the same encoder
    h_k = LeakyReLU(Linear(w_k)) + p_k -> N(mu_k, sigma_k^2),  w_hat_k = Linear(up(z_k) + q_k)

p and q are embeddings of a chunk's position: what a number means depends on where it stands. The
latents of all chunks, (c, s, s) each, are tiles of one image, which the flow generates at once;
tiles beyond the last chunk are zero. Noise, loss and latent scale are the VAE's.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.config import Size
from flown.base.errors import FlownError
from flown.encoders.latent import GaussianLatent, LatentConfig
from flown.encoders.vae import down, up
from flown.weights.layout import JointLayout


class ChunkedConfig(LatentConfig):
    """Sizes of the encoder that all chunks of `chunk` numbers share."""

    kind: Literal["chunked"] = "chunked"
    chunk: Size = 4096
    side: Size = 16
    width: Size = 4
    multipliers: tuple[Size, ...] = (1, 2, 2, 2)
    blocks: Size = 1
    latent_channels: Size = 4


class Chunked(GaussianLatent):
    """Standardised weight vectors (n, D) <-> latents (n, latent_channels, rows * s, columns * s)."""

    def __init__(self, config: ChunkedConfig, joint: JointLayout, size: int) -> None:
        shrink = 2 ** (len(config.multipliers) - 1)
        if config.side % shrink:
            raise FlownError(f"chunked: side {config.side} is not divisible by {shrink}")
        chunks, tile = math.ceil(size / config.chunk), config.side // shrink
        columns = _even(math.ceil(math.sqrt(chunks)))
        rows = _even(math.ceil(chunks / columns))
        super().__init__(config, (config.latent_channels, rows * tile, columns * tile))
        self.config, self.size = config, size
        self.chunks, self.rows, self.columns = chunks, rows, columns
        pixels, channels = config.side**2, config.latent_channels
        widths = [config.width * m for m in config.multipliers]
        self.expand, self.contract = (
            nn.Linear(config.chunk, pixels),
            nn.Linear(pixels, config.chunk),
        )
        self.position_in = nn.Parameter(torch.randn(self.chunks, pixels))
        self.position_out = nn.Parameter(torch.randn(self.chunks, pixels))
        self.down = down(widths, config.blocks, 2 * channels)
        self.posterior = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.up = up(widths[::-1], config.blocks, channels)

    def approximate_posterior(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Mean before, and log-variance after scaling to unit deviation, of q(z | w); each (n, L)."""
        padded = F.pad(vectors, (0, self.chunks * self.config.chunk - self.size))
        h = F.leaky_relu(self.expand(padded.unflatten(1, (self.chunks, -1)))) + self.position_in
        image = h.flatten(0, 1).unflatten(
            1, (1, self.config.side, -1)
        )  # (n * chunks, 1, side, side)
        tiles = self.posterior(self.down(image)).unflatten(0, (-1, self.chunks))
        mean, logvar = tiles.chunk(2, dim=2)
        return self._tiled(mean).flatten(1), self._tiled(logvar).flatten(1).clamp(-20, 4)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, *latent_shape) to vectors (n, D)."""
        tiles = latents.unflatten(3, (self.columns, -1)).unflatten(2, (self.rows, -1))
        tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)[:, : self.chunks]  # (n, k, c, s, s)
        h = self.up(tiles.flatten(0, 1)).flatten(1).unflatten(0, (-1, self.chunks))
        vectors: Tensor = self.contract(h + self.position_out)  # (n, chunks, chunk)
        return vectors.flatten(1)[:, : self.size]

    def _tiled(self, tiles: Tensor) -> Tensor:
        """Chunks' latents (n, chunks, c, s, s) as one image (n, c, rows * s, columns * s)."""
        empty = self.rows * self.columns - self.chunks
        whole = F.pad(tiles, (0, 0, 0, 0, 0, 0, 0, empty)).unflatten(1, (self.rows, self.columns))
        image: Tensor = whole.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return image


def _even(count: int) -> int:
    """Rounded up, so that the velocity network can halve the image of latents."""
    return count + count % 2
