"""What a network computes but for its weights: the function of pixels that weights complete.

    f(images; w) = net((images / 255 - mean) / std; w)

Preprocessing belongs to it: the same weights behind another normalisation are another classifier.
What the outputs are called, and which images a network was trained on, belongs to its task.
"""

from __future__ import annotations

import math
from typing import Union

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.base.seeding import seeded
from flown.tasks.looks import LUMA

PerChannel = Union[float, tuple[float, ...]]  # one number for all channels, or one for each


class Architecture(Config):
    """A network's kind and sizes, and how it reads images.

    `net` is a name of `flown.nets.NETS`, or `package.module:function`; `outputs` the number of its
    logits; `size` the side of its input; `mean` and `std` of pixels in [0, 1], for all channels or for
    each.
    """

    net: str
    channels: int = Field(ge=1, le=1024)
    size: int = Field(ge=1, le=4096)
    outputs: int = Field(ge=1, le=100_000)
    activation: str
    mean: PerChannel
    std: PerChannel

    @model_validator(mode="after")
    def _check_units(self) -> Architecture:
        for key, value in (("mean", self.mean), ("std", self.std)):
            numbers = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) and len(value) != self.channels:
                raise ValueError(f"{key} has {len(value)} numbers, images {self.channels} channels")
            if not all(math.isfinite(x) for x in numbers) or (key == "std" and min(numbers) <= 0):
                raise ValueError(f"{key} of pixels is {value}")
        return self

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, size, size)."""
        return self.channels, self.size, self.size

    def preprocess(self, images: Tensor) -> Tensor:
        """Turns uint8 images (N, c, H, W) into the network's input (N, channels, size, size).

        Grey images are repeated for a three-channel network, colour ones reduced to luminance for
        a one-channel network, so that any network can be asked about any images.

        Raises:
            FlownError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise FlownError(f"images: expected (N, 1 or 3, H, W), got {tuple(images.shape)}")
        x = images.float() / 255
        if images.shape[1] == 3 and self.channels == 1:
            x = torch.einsum("nchw,c->nhw", x, torch.tensor(LUMA, device=x.device))[:, None]
        if x.shape[-2:] != (self.size, self.size):
            side = (self.size, self.size)
            x = F.interpolate(x, side, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (_of_channels(value, x.device) for value in (self.mean, self.std))
        return ((x - mean) / std).expand(-1, self.channels, -1, -1)

    def build(self) -> nn.Module:
        """A network, initialised from torch's global generator, which stays where it is.

        Raises:
            FlownError: as `flown.nets.build`.
        """
        from flown.nets import build

        with seeded(None):
            return build(self.net, self.channels, self.outputs, self.activation, self.size)


def _of_channels(value: PerChannel, device: torch.device) -> float | Tensor:
    if not isinstance(value, tuple):
        return value
    return torch.tensor(value, device=device)[:, None, None]


def per_channel(value: PerChannel) -> str:
    """As people read it: `0.5`, or `(0.485, 0.456, 0.406)`."""
    if isinstance(value, tuple):
        return f"({', '.join(f'{x:.9g}' for x in value)})"
    return f"{value:.9g}"
