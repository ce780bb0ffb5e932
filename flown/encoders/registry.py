"""The weight encoders by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Union

from pydantic import Field

from flown.base.errors import unknown
from flown.encoders.base import Encoder
from flown.encoders.chunked import Chunked, ChunkedConfig
from flown.encoders.graph import GraphConfig, GraphEncoder
from flown.encoders.identity import Identity, IdentityConfig
from flown.encoders.linear import Linear, LinearConfig
from flown.encoders.pdiff import PDiff, PDiffConfig
from flown.encoders.vae import VAE, VAEConfig
from flown.weights.layout import JointLayout

EncoderConfig = Annotated[
    Union[VAEConfig, ChunkedConfig, GraphConfig, IdentityConfig, LinearConfig, PDiffConfig],
    Field(discriminator="kind"),
]
ENCODERS: dict[str, tuple[type[EncoderConfig], Callable[..., Encoder]]] = {
    "vae": (VAEConfig, VAE),
    "chunked": (ChunkedConfig, Chunked),
    "graph": (GraphConfig, GraphEncoder),
    "identity": (IdentityConfig, Identity),
    "linear": (LinearConfig, Linear),
    "pdiff": (PDiffConfig, PDiff),
}


def from_values(values: Mapping[str, Any], where: str = "encoder") -> EncoderConfig:
    """The config of the encoder that `values["kind"]` names.

    Raises:
        FlownError: there is no encoder of that name, or as `Config.parse`.
    """
    kind = str(values.get("kind", "vae"))
    if kind not in ENCODERS:
        raise unknown("encoder", kind, ENCODERS)
    return ENCODERS[kind][0].parse(values, where)


def build(config: EncoderConfig, joint: JointLayout, size: int) -> Encoder:
    """An encoder for the networks of a joint layout, as scaled vectors of `size` numbers."""
    return ENCODERS[config.kind][1](config, joint, size)
