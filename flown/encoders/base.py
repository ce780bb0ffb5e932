"""The protocol of weight encoders and their registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Protocol, Union

import torch
from pydantic import Field
from torch import Tensor, nn

from flown.base.config import Config
from flown.base.errors import unknown
from flown.encoders.chunked import Chunked, ChunkedConfig
from flown.encoders.graph import GraphConfig, GraphEncoder
from flown.encoders.identity import Identity, IdentityConfig
from flown.encoders.linear import Linear, LinearConfig
from flown.encoders.pdiff import PDiff, PDiffConfig
from flown.encoders.vae import VAE, VAEConfig
from flown.weights.layout import JointLayout


class Encoder(Protocol):
    """What the flow needs of an encoder; `training_pass` and `settle` are what training needs."""

    latent_shape: tuple[int, int, int]

    def encode(self, vectors: Tensor) -> Tensor:
        """Standardised vectors (n, D) to latents (n, *latent_shape) of unit scale."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (n, *latent_shape) to standardised vectors (n, D)."""

    def training_pass(
        self, vectors: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """A batch (n, D), with its mask of real weights, encoded and decoded again as in training.

        Returns what is decoded (n, D) and what the loss adds to its error, a scalar.
        """

    def settle(self, vectors: Tensor) -> None:
        """Fits the latent scale on all training vectors, once training is over."""


ENCODERS: dict[str, tuple[type[Config], Any]] = {
    "vae": (VAEConfig, VAE),
    "chunked": (ChunkedConfig, Chunked),
    "graph": (GraphConfig, GraphEncoder),
    "identity": (IdentityConfig, Identity),
    "linear": (LinearConfig, Linear),
    "pdiff": (PDiffConfig, PDiff),
}
EncoderConfig = Annotated[
    Union[VAEConfig, ChunkedConfig, GraphConfig, IdentityConfig, LinearConfig, PDiffConfig],
    Field(discriminator="kind"),
]


def from_values(values: Mapping[str, Any], where: str = "encoder") -> Config:
    """The config that `values["kind"]` names."""
    kind = values.get("kind", "vae")
    if kind not in ENCODERS:
        raise unknown("encoder", kind, ENCODERS)
    return ENCODERS[kind][0].parse(values, where)


def reconstruction_error(decoded: Tensor, vectors: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the real weights among vectors (n, D); padding is ignored."""
    return ((decoded - vectors).square() * mask).sum() / mask.sum()


def build(config: Config, joint: JointLayout) -> nn.Module:
    """An encoder for the networks of a joint layout."""
    kind: str = config.kind  # type: ignore[attr-defined]
    module: nn.Module = ENCODERS[kind][1](config, joint)
    return module
