"""Image backbones: uint8 images of any size to feature vectors, frozen once they are trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.config import Config
from flown.errors import unknown


class BackboneConfig(Config):
    """`kind` is a name of `BACKBONES`; `widths` are the channels of its stages."""

    kind: str = "conv"
    widths: tuple[int, ...] = (32, 64, 128, 128)
    size: int = 32

    @property
    def features(self) -> int:
        return self.widths[-1]


def _conv(config: BackboneConfig) -> nn.Module:
    """Conv -> BatchNorm -> ReLU -> pool, once a stage, then the mean over positions."""
    layers: list[nn.Module] = []
    channels = 3
    for width in config.widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                   nn.ReLU(), nn.MaxPool2d(2)]  # fmt: skip
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


BACKBONES: dict[str, Callable[[BackboneConfig], nn.Module]] = {"conv": _conv}


class Backbone(nn.Module):
    """Features (N, F) of uint8 images (N, 1 or 3, H, W)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        if config.kind not in BACKBONES:
            raise unknown("backbone", config.kind, BACKBONES)
        self.config = config
        self.body = BACKBONES[config.kind](config)

    def prepare(self, images: Tensor) -> Tensor:
        """Resizes to (N, 3, size, size) and scales to [-1, 1]."""
        x = images.float() / 127.5 - 1
        side = (self.config.size, self.config.size)
        if x.shape[-2:] != side:
            x = F.interpolate(x, side, mode="bilinear", antialias=True, align_corners=False)
        return x.expand(-1, 3, -1, -1)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.prepare(images))  # type: ignore[no-any-return]

    @torch.no_grad()
    def features(self, images: Tensor, batch: int = 256) -> Tensor:
        """Features of many images, in eval mode."""
        self.eval()
        return torch.cat([self(some) for some in images.split(batch)])
