"""Weight encoders: standardised weight vectors <-> a small latent."""

from flown.encoders.base import ENCODERS, Encoder, build, from_values, reconstruction_error
from flown.encoders.graph import GraphConfig, GraphEncoder
from flown.encoders.identity import Identity, IdentityConfig
from flown.encoders.pdiff import PDiff, PDiffConfig
from flown.encoders.vae import VAE, VAEConfig

__all__ = [
    "ENCODERS", "VAE", "Encoder", "GraphConfig", "GraphEncoder", "Identity", "IdentityConfig", "PDiff",
    "PDiffConfig", "VAEConfig", "build", "from_values", "reconstruction_error",
]  # fmt: skip
