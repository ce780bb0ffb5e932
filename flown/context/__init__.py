"""Support sets as context: frozen backbone -> CAML -> class outputs -> head."""

from flown.context.backbones import BACKBONES, Backbone, BackboneConfig
from flown.context.caml import CAML, CAMLConfig, load_published
from flown.context.elmes import elmes
from flown.context.head import ContextHead
from flown.context.support import SupportConfig, SupportEncoder

__all__ = [
    "BACKBONES", "CAML", "Backbone", "BackboneConfig", "CAMLConfig", "ContextHead",
    "SupportConfig", "SupportEncoder", "elmes", "load_published",
]  # fmt: skip
