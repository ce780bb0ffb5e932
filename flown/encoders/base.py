"""What every weight encoder is: scaled weight vectors to a small latent, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """Vectors (n, D) of unit scale <-> latents (n, *latent_shape) of unit scale.

    The flow needs `encode` and `decode`, training needs `training_pass` and `fit_scale`.
    """

    def __init__(self, latent_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.latent_shape = latent_shape

    @abstractmethod
    def encode(self, vectors: Tensor) -> Tensor:
        """Vectors (n, D) to latents (n, *latent_shape); nothing is drawn."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, *latent_shape) to vectors (n, D)."""

    @abstractmethod
    def training_pass(
        self, vectors: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Encodes and decodes a batch (n, D), whose real weights `mask` marks, as in training.

        Returns the decoded vectors (n, D), and what the loss adds to their error, a scalar.
        """

    @abstractmethod
    def fit_scale(self, vectors: Tensor) -> None:
        """Fits the latent's scale on training vectors (n, D), once training is over."""
