"""The frozen part of the context: backbone and CAML, from labelled images to class outputs.

    support images --backbone, standardise--> features; for each class k a query q_k of that class
    o_k = CAML(support, labels, q_k),  averaged over the class's queries      (FLoWN 2.2, A.4.2)

Nothing here is trained with the flow; a `Context` makes one vector of the class outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.base.files import halved, load_into, load_tensors, save_tensors
from flown.context.backbones import Backbone, BackboneConfig, features
from flown.context.caml import CAML, CAMLConfig

_CHUNK = 4096  # tokens that go through CAML at once


class SupportConfig(Config):
    """`backbone` is None when the user's own module computes the features."""

    backbone: BackboneConfig | None = BackboneConfig()
    caml: CAMLConfig = CAMLConfig()


class SupportEncoder(nn.Module):
    """Support sets to class outputs (classes, width); frozen, always in eval mode.

    Features are standardised with the statistics of the images that CAML was trained on.

    Args:
        config: sizes of the parts.
        backbone: any module from uint8 images (N, c, H, W) to features (N, F), in place of the
            config's own; then `config.backbone` must be None.

    Raises:
        FlownError: backbone and CAML do not fit together.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: SupportConfig, backbone: nn.Module | None = None) -> None:
        super().__init__()
        if (config.backbone is None) == (backbone is None):
            raise FlownError("support encoder: give either config.backbone or a backbone module")
        if config.backbone and config.backbone.features != config.caml.feature_dim:
            raise FlownError(
                f"support encoder: the backbone has {config.backbone.features} features, "
                f"caml.feature_dim is {config.caml.feature_dim}"
            )
        self.config = config
        own = backbone if config.backbone is None else Backbone(config.backbone)
        assert own is not None
        self.backbone: nn.Module = own
        self.caml = CAML(config.caml)
        self.register_buffer("feature_mean", torch.zeros(config.caml.feature_dim))
        self.register_buffer("feature_std", torch.ones(config.caml.feature_dim))
        self.width = config.caml.width
        self.eval().requires_grad_(False)

    @classmethod
    def from_values(
        cls, values: Mapping[str, Any], backbone: nn.Module | None = None
    ) -> SupportEncoder:
        """An encoder of the given sizes, its weights still to be filled in."""
        return cls(SupportConfig.parse(values, "support"), backbone)

    def train(self, mode: bool = True) -> SupportEncoder:
        """Stays in eval mode: a frozen BatchNorm must not see a batch."""
        return super().train(False)

    def features(self, images: Tensor) -> Tensor:
        """Standardised features (N, F) of uint8 images (N, c, H, W), in batches."""
        return (features(self.backbone, images) - self.feature_mean) / self.feature_std

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        labels: Tensor,
        classes: int,
        generator: torch.Generator,
        queries: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """CAML's output for each class, (classes, width).

        Args:
            images, labels: the support, uint8 (K, c, H, W) and (K,), labels in 0..classes-1.
            generator: picks one random support image of each class as its query (model retrieval).
            queries: images and labels of queries instead (few-shot); a class's are averaged.

        Raises:
            FlownError: a class without support or query image, or too many classes.
        """
        support = self.features(images)
        if queries is None:
            rows = torch.stack([_pick(labels, k, generator) for k in range(classes)])
            asked, targets = support[rows], labels[rows]
        else:
            asked, targets = self.features(queries[0]), queries[1]
            _check_all_classes(targets, classes, "queries")
            _check_all_classes(labels, classes, "support set")
        # Every query repeats the support: large sets go through in parts.
        step = max(1, _CHUNK // (len(support) + 1))
        parts = [asked[i : i + step] for i in range(0, len(asked), step)]
        outputs = torch.cat([self.caml(support[None], labels[None], q[None])[0] for q in parts])
        total = outputs.new_zeros(classes, self.width).index_add_(0, targets, outputs)
        return total / torch.bincount(targets, minlength=classes)[:, None]

    def save(self, path: Path | str) -> None:
        """One safetensors file in half precision, the sizes in its header."""
        config = self.config.model_dump_json()
        save_tensors(path, halved(self.state_dict()), {"config": config})

    @classmethod
    def load(cls, path: Path | str, backbone: nn.Module | None = None) -> SupportEncoder:
        """Reads what `save` wrote; a backbone of the user's own must be given again.

        Raises:
            FlownError: no such file, or not one of ours.
        """
        tensors, about = load_tensors(path)
        try:
            values = json.loads(about["config"])
        except (KeyError, ValueError):
            raise FlownError(f"{path}: no support encoder, its header has no 'config'") from None
        encoder = cls.from_values(values, backbone)
        load_into(encoder, tensors, path)
        return encoder

    @classmethod
    def pretrained(cls) -> SupportEncoder:
        """The encoder that ships with the package."""
        file = resources.files("flown.context") / "pretrained" / "support.safetensors"
        with resources.as_file(file) as path:
            return cls.load(path)


def _pick(labels: Tensor, label: int, generator: torch.Generator) -> Tensor:
    among = (labels == label).nonzero().flatten()
    if not len(among):
        raise FlownError(f"support set: class {label} has no image")
    return among[int(torch.randint(len(among), (1,), generator=generator))]


def _check_all_classes(labels: Tensor, classes: int, what: str) -> None:
    if labels.numel() and int(labels.max()) >= classes:
        raise FlownError(f"{what}: label {int(labels.max())} is out of range 0..{classes - 1}")
    counts = torch.bincount(labels, minlength=classes)
    if (counts == 0).any():
        raise FlownError(f"{what}: class {int(counts.argmin())} has no image")
