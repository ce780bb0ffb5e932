"""ResNet-12, the backbone of the few-shot literature (Oreshkin et al. 1805.10123, Lee et al. 1904.03758).

    block: h = conv3 -> BN -> LeakyReLU -> conv3 -> BN -> LeakyReLU -> conv3 -> BN
           y = maxpool2(LeakyReLU(h + BN(conv1(x)))),   slope 0.1

Four blocks, then the mean over positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

_SLOPE = 0.1


class _Block(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (inputs, width, width):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(_SLOPE),
            ]
        self.body = nn.Sequential(*layers[:-1])
        self.skip = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.leaky_relu(self.body(x) + self.skip(x), _SLOPE), 2)


def resnet12(widths: Sequence[int] = (64, 128, 256, 512)) -> nn.Sequential:
    """Images (N, 3, s, s) to features (N, widths[-1]); s >= 2 to the number of widths."""
    inputs = (3, *widths[:-1])
    blocks = [_Block(*pair) for pair in zip(inputs, widths, strict=True)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
