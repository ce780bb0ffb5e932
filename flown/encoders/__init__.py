"""Weight encoders: standardised weight vectors <-> a small latent."""

from flown.encoders.base import Encoder
from flown.encoders.chunked import Chunked, ChunkedConfig
from flown.encoders.graph import GraphConfig, GraphEncoder
from flown.encoders.identity import Identity, IdentityConfig
from flown.encoders.linear import Linear, LinearConfig
from flown.encoders.pdiff import PDiff, PDiffConfig
from flown.encoders.registry import ENCODERS, EncoderConfig, build, from_values
from flown.encoders.vae import VAE, VAEConfig

__all__ = [
    "ENCODERS",
    "VAE",
    "Chunked",
    "ChunkedConfig",
    "Encoder",
    "EncoderConfig",
    "GraphConfig",
    "GraphEncoder",
    "Identity",
    "IdentityConfig",
    "Linear",
    "LinearConfig",
    "PDiff",
    "PDiffConfig",
    "VAEConfig",
    "build",
    "from_values",
]
