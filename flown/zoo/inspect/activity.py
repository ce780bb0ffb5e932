"""Dead hidden units of a network: their output is the same for every image.

A unit is a channel of a convolution or a feature of a linear layer. It is measured after the
activation that follows its layer, with or without pooling in between, or at the layer's output if
no activation module follows (an activation called as a function cannot be seen).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from flown.weights.batch import WeightBatch

TOLERANCE = 1e-6  # of a unit's largest activation
_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Hardswish,
)


@dataclass(frozen=True)
class Layer:
    """A layer's hidden units, and the percent of them that are dead: the mean over networks."""

    name: str
    units: int
    dead: float


def dead_units(batch: WeightBatch, images: Tensor) -> tuple[Layer, ...]:
    """The hidden layers of n networks in the order in which they run.

    Args:
        images: uint8 (N, c, H, W), grey or colour.

    Raises:
        FlownError: images of another shape, or a network that cannot be built.
    """
    x = batch.preprocess(images.to(batch.vectors.device))
    masks: dict[str, list[Tensor]] = {}
    for i in range(len(batch)):
        for name, mask in dead_in(batch.module(i), x).items():
            masks.setdefault(name, []).append(mask)
    stacked = {name: torch.stack(found).float() for name, found in masks.items()}
    return tuple(Layer(k, mask.shape[1], 100 * float(mask.mean())) for k, mask in stacked.items())


@torch.no_grad()
def dead_in(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """True for each dead unit, (units,), by layer; the last layer's units, the logits, are left out.

    Args:
        x: the network's input (N, ...).
    """
    found: dict[str, Tensor] = {}
    last: list[tuple[str, nn.Module]] = []  # the layer that waits for its activation

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if isinstance(module, (_ConvNd, nn.Linear)):
                last[:] = [(name, module)]
                found.pop(name, None)  # a layer that runs twice takes its later place
                found[name] = _constant(module, output)
            elif last and isinstance(module, _ACTIVATIONS):
                layer_name, layer = last.pop()
                if output[0].numel() % _units(layer) == 0:
                    found[layer_name] = _constant(layer, output)

        return hook

    handles = [
        module.register_forward_hook(look(name))
        for name, module in net.named_modules()
        if isinstance(module, (_ConvNd, nn.Linear, *_ACTIVATIONS))
    ]
    try:
        net(x)
    finally:
        for handle in handles:
            handle.remove()
    return dict(list(found.items())[:-1])


def _units(layer: nn.Module) -> int:
    return int(layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features)  # type: ignore[arg-type]


def _constant(layer: nn.Module, output: Tensor) -> Tensor:
    """True for every unit (units,) that no image changes anywhere, in the output of N images."""
    by_unit = output if isinstance(layer, _ConvNd) else output.movedim(-1, 1)
    by_unit = by_unit.reshape(len(output), _units(layer), -1)  # (N, units, positions)
    change = (by_unit.amax(dim=0) - by_unit.amin(dim=0)).amax(dim=1)
    return change <= TOLERANCE * by_unit.abs().amax(dim=(0, 2))
