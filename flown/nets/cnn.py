"""The convolutional networks of the Model Zoos paper: conv -> maxpool -> activation, two linear layers.

Schürholt et al. 2022 (2209.14764). `cnn-small` is their CNN, 2,464 parameters with one input
channel and 2,864 with three; `cnn-medium` is their CNN3, 10,565 and 10,853 with ten classes. `conv4`
is the few-shot literature's network (Vinyals et al. 2016) without BatchNorm.
"""

from __future__ import annotations

from torch import nn

from flown.base.errors import unknown

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
}


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def cnn_small(channels: int, classes: int, activation: str) -> nn.Sequential:
    """For images (N, channels, 28, 28)."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 5), nn.MaxPool2d(2), _activation(activation)),  # (N, 8, 12, 12)
        *(nn.Conv2d(8, 6, 5), nn.MaxPool2d(2), _activation(activation)),  # (N, 6, 4, 4)
        *(nn.Conv2d(6, 4, 2), _activation(activation), nn.Flatten()),  # (N, 36)
        *(nn.Linear(36, 20), _activation(activation), nn.Linear(20, classes)),
    )


def cnn_medium(channels: int, classes: int, activation: str) -> nn.Sequential:
    """For images (N, channels, 32, 32)."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3), nn.MaxPool2d(2), _activation(activation)),  # (N, 16, 15, 15)
        *(nn.Conv2d(16, 32, 3), nn.MaxPool2d(2), _activation(activation)),  # (N, 32, 6, 6)
        *(nn.Conv2d(32, 15, 3), nn.MaxPool2d(2), _activation(activation), nn.Flatten()),  # (N, 60)
        *(nn.Linear(60, 20), _activation(activation), nn.Linear(20, classes)),
    )


def conv4(channels: int, classes: int, activation: str, width: int) -> nn.Sequential:
    """Four blocks of `width` channels, for images (N, channels, 32, 32)."""
    layers: list[nn.Module] = []
    for before in (channels, width, width, width):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.MaxPool2d(2), _activation(activation)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, classes))
