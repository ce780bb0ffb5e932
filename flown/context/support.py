"""The frozen part of the context: backbone and CAML, from labelled images to class tokens.

    support images --backbone, standardise--> features; for each class k a query q_k of that class
    o_k = CAML(support, labels, q_k),  averaged over the class's queries      (FLoWN 2.2, A.4.2)

or a class's token is the mean of its features. Nothing here is trained with the flow; a `ContextHead`
turns the tokens into one vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.base.files import load_into, load_tensors, read_json
from flown.base.frozen import load_frozen, save_frozen
from flown.base.seeding import seeded
from flown.context.backbones import Backbone, BackboneConfig, features
from flown.context.caml import CAML, CAMLConfig
from flown.context.centroids import class_means

_CHUNK = 4096  # tokens through CAML at once


class SupportConfig(Config):
    """Sizes; `backbone` is None when a module of the user computes the features."""

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
        chosen = backbone if config.backbone is None else Backbone(config.backbone)
        assert chosen is not None
        self.backbone: nn.Module = chosen
        self.caml = CAML(config.caml)
        self.register_buffer("feature_mean", torch.zeros(config.caml.feature_dim))
        self.register_buffer("feature_std", torch.ones(config.caml.feature_dim))
        self.width = config.caml.width
        self.eval().requires_grad_(False)

    @classmethod
    def from_values(
        cls, values: Mapping[str, Any], backbone: nn.Module | None = None
    ) -> SupportEncoder:
        """An encoder of the given sizes, with weights to be loaded."""
        return cls(SupportConfig.parse(values, "support"), backbone)

    def train(self, mode: bool = True) -> SupportEncoder:
        """Stays in eval mode: a frozen BatchNorm must not see a batch."""
        return super().train(False)

    def features(self, images: Tensor) -> Tensor:
        """Standardised features (N, F) of uint8 images (N, c, H, W) on any device."""
        found = features(self.backbone, images).to(self.feature_mean.device)
        return (found - self.feature_mean) / self.feature_std

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        labels: Tensor,
        classes: int,
        generator: torch.Generator,
        queries: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """CAML's output for each class, (classes, width), on the encoder's device.

        Args:
            images, labels: the support, uint8 (K, c, H, W) and (K,), labels in 0..classes-1, on
                any device.
            generator: picks one random support image of each class as its query (model retrieval).
            queries: images and labels of queries instead (few-shot); a class's are averaged.

        Raises:
            FlownError: a class without support or query image, or too many classes.
        """
        asked = None if queries is None else (self.features(queries[0]), queries[1])
        return self.outputs(self.features(images), labels, classes, generator, asked)

    @torch.no_grad()
    def outputs(
        self,
        support: Tensor,
        labels: Tensor,
        classes: int,
        generator: torch.Generator,
        queries: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `encode`, of features (K, F) in place of images."""
        device = self.feature_mean.device
        support, labels = support.to(device), labels.to(device)
        if queries is None:
            rows = pick_queries(labels, classes, generator)
            return self.outputs_of_sets(support[None], labels, rows[None])[0]
        asked, targets = queries[0].to(device), queries[1].to(device)
        _check_all_classes(targets, classes, "queries")
        _check_all_classes(labels, classes, "support set")
        # Every query repeats the support: large sets go through in parts.
        step = max(1, _CHUNK // (len(support) + 1))
        parts = [asked[i : i + step] for i in range(0, len(asked), step)]
        outputs = torch.cat([self.caml(support[None], labels[None], q[None])[0] for q in parts])
        total = outputs.new_zeros(classes, self.width).index_add_(0, targets, outputs)
        return total / torch.bincount(targets, minlength=classes)[:, None]

    @torch.no_grad()
    def outputs_of_sets(self, support: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """CAML's outputs (T, classes, width) for T support sets, one query of each class.

        Args:
            support: features (T, S, F) on the encoder's device.
            labels: (S,), those of every set.
            rows: (T, classes), which images of each set are its queries, as `pick_queries` gives.
        """
        sets = torch.arange(len(support), device=rows.device)[:, None]
        asked, labels = support[sets, rows], labels.expand(len(support), -1)
        step = max(1, _CHUNK // (rows.shape[1] * (support.shape[1] + 1)))
        parts = zip(support.split(step), labels.split(step), asked.split(step), strict=True)
        return torch.cat([self.caml(*part) for part in parts])

    def save(self, path: Path | str) -> None:
        """One safetensors file in half precision, the sizes in its header."""
        save_frozen(self, path, "config", self.config)

    @classmethod
    def load(cls, path: Path | str, backbone: nn.Module | None = None) -> SupportEncoder:
        """Reads what `save` wrote; a backbone of the user must be given again.

        Raises:
            FlownError: no such file, or no support encoder.
        """
        return load_frozen(
            path,
            "config",
            "support encoder",
            SupportConfig,
            lambda config, _: cls(config, backbone),
        )

    @classmethod
    def pretrained(cls) -> SupportEncoder:
        """The encoder that ships with the package: that of `flown-small`, so that it ships once."""
        folder = Path(str(resources.files("flown") / "pretrained" / "flown-small"))
        with seeded(None):
            encoder = cls.from_values(read_json(folder / "config.json")["support"])
        file, start = folder / "context.safetensors", "support."
        tensors, _ = load_tensors(file)
        own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        load_into(encoder, own, file)
        return encoder


def centroid_tokens(
    support: SupportEncoder, features: Tensor, labels: Tensor, queries: Tensor
) -> Tensor:
    """The mean feature of each class, (T, classes, F), in the support set's own frame.

    The frame's origin is the mean of the classes, its unit the mean distance of an image from there.
    """
    means = class_means(features, labels.expand(len(features), -1), queries.shape[1])
    centre = means.mean(dim=1, keepdim=True)
    radius = (features - centre).norm(dim=2).mean(dim=1).clamp_min(1e-6)
    scale = math.sqrt(features.shape[2])
    centred: Tensor = scale * (means - centre) / radius[:, None, None]
    return centred


# Of T support sets with the same labels (S,): features (T, S, F) and query rows (T, classes).
Tokens: TypeAlias = Callable[[SupportEncoder, Tensor, Tensor, Tensor], Tensor]
TOKENS: dict[str, Tokens] = {"caml": SupportEncoder.outputs_of_sets, "centroid": centroid_tokens}


def token_width(support: SupportEncoder, tokens: str) -> int:
    """The width of one class token."""
    return support.width if tokens == "caml" else support.config.caml.feature_dim


def pick_queries(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """A random row of each class (classes,) among a support set's labels (S,).

    Raises:
        FlownError: a class has no image.
    """
    return torch.stack([_pick(labels, k, generator) for k in range(classes)])


def _pick(labels: Tensor, label: int, generator: torch.Generator) -> Tensor:
    rows = (labels == label).nonzero().flatten()
    if not len(rows):
        raise FlownError(f"support set: class {label} has no image")
    return rows[int(torch.randint(len(rows), (1,), generator=generator))]


def _check_all_classes(labels: Tensor, classes: int, what: str) -> None:
    if labels.numel() and int(labels.max()) >= classes:
        raise FlownError(f"{what}: label {int(labels.max())} is out of range 0..{classes - 1}")
    counts = torch.bincount(labels, minlength=classes)
    if (counts == 0).any():
        raise FlownError(f"{what}: class {int(counts.argmin())} has no image")
