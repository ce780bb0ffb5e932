"""Image backbones: uint8 images of any size to feature vectors; frozen after their training.

    image (1 or 3, H, W) --resize, 3 channels, scale--> (3, 32, 32) --body--> feature (F,)

The default body is the four-block convolutional network of the few-shot literature (Snell et al.
1703.05175) with a global mean at the end. `flown.context.pretrain` trains one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.config import Config, Size
from flown.base.errors import FlownError, unknown
from flown.nets.resnet12 import resnet12


class BackboneConfig(Config):
    """`kind` is a name of `BACKBONES`; `widths` are the channels of its stages, the last one F."""

    kind: str = "conv"
    widths: tuple[Size, ...] = (32, 64, 128, 128)
    size: Size = 32

    @property
    def features(self) -> int:
        """F."""
        return self.widths[-1]


def _conv(config: BackboneConfig) -> nn.Module:
    """Conv -> BatchNorm -> ReLU -> pool, once a stage, then the mean over positions."""
    layers: list[nn.Module] = []
    channels = 3
    for width in config.widths:
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _resnet12(config: BackboneConfig) -> nn.Module:
    return resnet12(config.widths)


BACKBONES: dict[str, Callable[[BackboneConfig], nn.Module]] = {"conv": _conv, "resnet12": _resnet12}


class Backbone(nn.Module):
    """Features (N, F) of uint8 images (N, 1 or 3, H, W)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        if config.kind not in BACKBONES:
            raise unknown("backbone", config.kind, BACKBONES)
        if not config.widths or config.size < 2 ** len(config.widths):
            raise FlownError(
                f"backbone: {len(config.widths)} stages halve {config.size} pixels to nothing; "
                "give fewer widths or a larger size"
            )
        self.config = config
        self.body = BACKBONES[config.kind](config)

    def prepare(self, images: Tensor) -> Tensor:
        """Resizes uint8 images (N, 1 or 3, H, W) to (N, 3, size, size), scaled to [-1, 1].

        Raises:
            FlownError: another shape or type.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
            got = f"{images.dtype} {tuple(images.shape)}"
            raise FlownError(f"images: expected uint8 (N, 1 or 3, H, W), got {got}")
        x = images.float() / 127.5 - 1
        side = (self.config.size, self.config.size)
        if x.shape[-2:] != side:
            x = F.interpolate(x, side, mode="bilinear", antialias=True, align_corners=False)
        return x.expand(-1, 3, -1, -1)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.prepare(images))  # type: ignore[no-any-return]


@torch.no_grad()
def features(backbone: nn.Module, images: Tensor, batch: int = 256) -> Tensor:
    """A backbone's features (N, F) of many images (N, c, H, W), in eval mode, on the images' device.

    They are computed where the backbone is, a batch at a time: a set need not fit on its device.

    Raises:
        FlownError: the backbone gives something else.
    """
    tensor = next(chain(backbone.parameters(), backbone.buffers()), images)
    was_training = backbone.training
    backbone.eval()
    parts = []
    for some in images.split(batch):
        found = _checked(backbone(some.to(tensor.device)), backbone, len(some))
        parts.append(found.to(images.device))
    backbone.train(was_training)
    return torch.cat(parts)


def _checked(found: object, backbone: nn.Module, count: int) -> Tensor:
    """What a backbone of whatever origin gives, as features (N, F); a map of one position is one."""
    name = type(backbone).__name__
    if not isinstance(found, Tensor):
        raise FlownError(
            f"backbone {name}: gives a {type(found).__name__}, expected a tensor (N, F) of features; "
            "wrap it in a module that picks them"
        )
    if found.ndim == 4 and found.shape[2:] == (1, 1):
        found = found.flatten(1)
    if found.ndim != 2 or len(found) != count or not found.is_floating_point():
        raise FlownError(
            f"backbone {name}: gives {found.dtype} {tuple(found.shape)} for {count} images, expected "
            "floats (N, F); pool or pick in a module of your own"
        )
    return found
