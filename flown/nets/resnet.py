"""The residual networks that He et al. 2015 (1512.03385, 4.2) made for CIFAR-10."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - inputs

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        # Their option A: the shortcut has no weights, channels that are new are zero.
        skip = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return (h + skip).relu()  # type: ignore[no-any-return]


def resnet20(channels: int, classes: int) -> nn.Sequential:
    """ResNet-20, 269,722 weights for ten classes and colour; images (N, channels, s, s), s >= 4."""
    layers: list[nn.Module] = [
        *(nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    ]
    width = 16
    for target in (16, 32, 64):
        for _ in range(3):
            layers.append(_Block(width, target, 1 if width == target else 2))
            width = target
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, *pool, nn.Linear(width, classes))
