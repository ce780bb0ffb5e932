"""Base networks, by name: those whose weights are generated (FLoWN A.3.1; Model Zoos' CNNs)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from flown.base.errors import FlownError, unknown
from flown.base.trust import is_code, load_code
from flown.nets.cnn import ACTIVATIONS, cnn_medium, cnn_small, conv4
from flown.nets.large import convnext_tiny, resnet18, vit_base
from flown.nets.linear import NormalisedHead, linear_head
from flown.nets.resnet import resnet20

__all__ = [
    "ACTIVATIONS",
    "DEFAULT_INITIALISED",
    "INPUT_SIZES",
    "NETS",
    "build",
    "input_size",
]

NETS: dict[str, Callable[..., nn.Module]] = {
    "cnn-small": cnn_small,
    "cnn-medium": cnn_medium,
    "conv4-8": partial(conv4, width=8),
    "conv4-16": partial(conv4, width=16),
    "conv4-32": partial(conv4, width=32),
    "resnet20": resnet20,
    "resnet18": resnet18,
    "vit_base": vit_base,
    "convnext_tiny": convnext_tiny,
    "linear-head": linear_head,
    "normalised-head": NormalisedHead,
}
INPUT_SIZES = {
    "cnn-small": 28,
    "cnn-medium": 32,
    "conv4-8": 32,
    "conv4-16": 32,
    "conv4-32": 32,
    "resnet20": 32,
    "resnet18": 32,
    "vit_base": 224,
    "convnext_tiny": 224,
    "linear-head": 1,
    "normalised-head": 1,
}
# Networks whose constructors leave all layers at PyTorch's default initialisation.
DEFAULT_INITIALISED = frozenset(
    {
        *("cnn-small", "cnn-medium", "conv4-8", "conv4-16", "conv4-32"),
        *("resnet20", "linear-head", "normalised-head"),
    }
)


def build(
    name: str, channels: int, classes: int, activation: str, size: int | None = None
) -> nn.Module:
    """A freshly made network with its own default initialisation.

    `name` is one of `NETS`, or `package.module:function`: anything that can be imported and
    called, once the user allowed it (`flown.trust`). It gets those of `channels`, `classes`,
    `activation` and `size` (the side of its images, by default the usual one) that it takes by name.

    Raises:
        FlownError: unknown name or activation, fewer than two classes, no channel, a function that
            is not allowed, cannot be imported or does not return a network, or a parameter that a
            vector of float32 numbers cannot hold.
    """
    if channels < 1 or classes < 2:
        raise FlownError(f"{name}: needs a channel and two classes, got {channels} and {classes}")
    make = load_code(name, "network") if is_code(name) else NETS.get(name)
    if make is None:
        raise unknown("network", name, NETS)
    given = {
        "channels": channels,
        "classes": classes,
        "activation": activation,
        "size": size or INPUT_SIZES.get(name),
    }
    try:
        takes = inspect.signature(make).parameters
        net = make(**{key: value for key, value in given.items() if key in takes})
    except (TypeError, ValueError) as error:
        raise FlownError(f"network '{name}': {error}") from None
    if not isinstance(net, nn.Module):
        raise FlownError(f"network '{name}': returned {type(net).__name__}, expected nn.Module")
    _check_parameters(name, net)
    return net


def _check_parameters(name: str, net: nn.Module) -> None:
    lazy = [key for key, x in [*net.named_parameters(), *net.named_buffers()] if is_lazy(x)]
    if lazy:
        raise FlownError(
            f"network '{name}': '{lazy[0]}' of a lazy layer has no shape yet; give the layer its "
            "number of inputs (nn.Linear for nn.LazyLinear)"
        )
    for key, parameter in net.named_parameters():
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise FlownError(
                f"network '{name}': parameter '{key}' holds {kind}, expected float32; keep what is "
                "not to be generated in a buffer, and complex numbers as two real ones"
            )


def input_size(name: str) -> int:
    """The side of the images that a named network is for.

    Raises:
        FlownError: not known for a network of one's own.
    """
    if name not in INPUT_SIZES:
        raise FlownError(f"{name}: the side of its input is not known; give the recipe a `size`")
    return INPUT_SIZES[name]
