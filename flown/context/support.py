"""The frozen part of the context: backbone and CAML, from labelled images to class outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flown.config import Config
from flown.context.backbones import Backbone, BackboneConfig
from flown.context.caml import CAML, CAMLConfig
from flown.errors import FlownError
from flown.files import load_tensors, save_tensors


class SupportConfig(Config):
    backbone: BackboneConfig = BackboneConfig()
    caml: CAMLConfig = CAMLConfig()


class SupportEncoder(nn.Module):
    """Support sets to class outputs (classes, width).

    Features are standardised with the statistics of the images that the backbone was trained on.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: SupportConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone, self.caml = Backbone(config.backbone), CAML(config.caml)
        self.width = config.caml.width
        self.register_buffer("feature_mean", torch.zeros(config.backbone.features))
        self.register_buffer("feature_std", torch.ones(config.backbone.features))
        self.eval().requires_grad_(False)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> SupportEncoder:
        """An encoder of the given sizes, its weights still to be filled in."""
        return cls(SupportConfig.parse(values, "support"))

    def features(self, images: Tensor) -> Tensor:
        """Standardised features (N, F) of uint8 images (N, c, H, W)."""
        return (self.backbone.features(images) - self.feature_mean) / self.feature_std

    @torch.no_grad()
    def encode(self, images: Tensor, labels: Tensor, classes: int,
               generator: torch.Generator) -> Tensor:  # fmt: skip
        """CAML's output for one random image of each class, (classes, width).

        Args:
            images, labels: uint8 (K, c, H, W) and (K,); the queries are drawn from them
                (model retrieval, FLoWN 2.2).
        """
        features = self.features(images)
        rows = []
        for label in range(classes):
            among = (labels == label).nonzero().flatten()
            pick = torch.randint(len(among), (1,), generator=generator).item()
            rows.append(among[int(pick)])
        query = features[torch.stack(rows)]
        return self.caml(features[None], labels[None], query[None])[0]  # type: ignore[no-any-return]

    def save(self, path: Path | str) -> None:
        """One safetensors file in half precision, the sizes in its header."""
        half = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_tensors(path, half, {"config": self.config.model_dump_json()})

    @classmethod
    def load(cls, path: Path | str) -> SupportEncoder:
        """Reads what `save` wrote.

        Raises:
            FlownError: no such file, or not one of ours.
        """
        tensors, about = load_tensors(path)
        if "config" not in about:
            raise FlownError(f"{path}: no support encoder, its header has no 'config'")
        encoder = cls.from_values(json.loads(about["config"]))
        whole = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
        encoder.load_state_dict(whole)
        return encoder

    @classmethod
    def pretrained(cls) -> SupportEncoder:
        """The encoder that ships with the package."""
        file = resources.files("flown") / "context" / "pretrained" / "support.safetensors"
        return cls.load(Path(str(file)))
