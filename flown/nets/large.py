"""Big networks, of which only a subset of tensors is generated (FLoWN's Table 1; p-diff).

Their activation is part of them: the task's says what it is and chooses nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from flown.base.errors import FlownError


def resnet18(channels: int, classes: int) -> nn.Module:
    """ResNet-18 in its usual form for images of 32x32: a 3x3 stem of stride 1, no max-pooling.

    torchvision's, with its names and initialisation; images (N, channels, 32, 32) or larger.
    """
    from torchvision.models import resnet18 as published

    net: nn.Module = published(weights=None, num_classes=classes)
    stem = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    net.conv1, net.maxpool = stem, nn.Identity()
    return net


def vit_base(channels: int, classes: int, size: int) -> nn.Module:
    """timm's `vit_base_patch16_224`, made for images (N, channels, size, size)."""
    if size % 16:
        raise FlownError(f"vit_base: the side of its images must be a multiple of 16, got {size}")
    return _timm("vit_base_patch16_224", in_chans=channels, num_classes=classes, img_size=size)


def convnext_tiny(channels: int, classes: int) -> nn.Module:
    """timm's `convnext_tiny`; images (N, channels, 224, 224), at least 32x32."""
    return _timm("convnext_tiny", in_chans=channels, num_classes=classes)


def _timm(name: str, **options: Any) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise FlownError(f"network '{name}' comes from timm: pip install 'flown[timm]'") from None
    net: nn.Module = timm.create_model(name, pretrained=False, **options)
    return net
