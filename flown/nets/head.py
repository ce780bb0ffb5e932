"""A classifier's last layer on its own: a linear map of centred features of length 1.

    z = (f - centre) / |f - centre|,   logits = W z + b
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """Logits (N, W) of features (N, F); `centre` (F,) is no weight but a property of the features."""

    centre: Tensor

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(channels))
        self.linear = nn.Linear(channels, classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(F.normalize(features - self.centre, dim=1))  # type: ignore[no-any-return]

