"""Support sets as context: frozen backbone -> CAML -> class outputs -> head."""

from flown.context.backbones import BACKBONES, Backbone, BackboneConfig, train_backbone
from flown.context.base import CONTEXTS, Context, build
from flown.context.caml import CAML, CAMLConfig
from flown.context.elmes import elmes
from flown.context.episodes import FeatureSet, episode_accuracy, train_caml
from flown.context.head import CONTEXT_DIM, ContextHead
from flown.context.published import load_published
from flown.context.support import SupportConfig, SupportEncoder

__all__ = [
    "BACKBONES",
    "CAML",
    "CONTEXTS",
    "CONTEXT_DIM",
    "Backbone",
    "BackboneConfig",
    "CAMLConfig",
    "Context",
    "ContextHead",
    "FeatureSet",
    "SupportConfig",
    "SupportEncoder",
    "build",
    "elmes",
    "episode_accuracy",
    "load_published",
    "train_backbone",
    "train_caml",
]
