"""Base networks, by name: those whose weights are generated (FLoWN A.3.1; Model Zoos' CNNs)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from flown.errors import FlownError, unknown
from flown.nets.cnn import ACTIVATIONS, cnn_medium, cnn_small

__all__ = ["ACTIVATIONS", "INPUT_SIZES", "NETS", "build"]

NETS: dict[str, Callable[[int, int, str], nn.Module]] = {
    "cnn-small": cnn_small,
    "cnn-medium": cnn_medium,
}
INPUT_SIZES = {"cnn-small": 28, "cnn-medium": 32}


def build(name: str, channels: int, classes: int, activation: str) -> nn.Module:
    """A freshly made network with PyTorch's default initialisation.

    Raises:
        FlownError: unknown name or activation, fewer than two classes, no channel.
    """
    if name not in NETS:
        raise unknown("network", name, NETS)
    if channels < 1 or classes < 2:
        raise FlownError(f"{name}: needs a channel and two classes, got {channels} and {classes}")
    return NETS[name](channels, classes, activation)
