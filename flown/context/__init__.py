"""Support sets as context: frozen backbone -> CAML -> class outputs -> head."""

from flown.context.backbones import BACKBONES, Backbone, BackboneConfig
from flown.context.caml import CAML, CAMLConfig
from flown.context.elmes import elmes
from flown.context.episodes import FeatureSet, episode_accuracy, train_caml
from flown.context.head import CONTEXT_DIM, ContextHead
from flown.context.published import load_published
from flown.context.support import SupportConfig, SupportEncoder

__all__ = [
    "BACKBONES",
    "CAML",
    "CONTEXT_DIM",
    "Backbone",
    "BackboneConfig",
    "CAMLConfig",
    "ContextHead",
    "FeatureSet",
    "SupportConfig",
    "SupportEncoder",
    "elmes",
    "episode_accuracy",
    "load_published",
    "train_caml",
]
