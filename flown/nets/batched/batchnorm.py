"""BatchNorm's running statistics, for many networks at once.

    mean = 1/K sum_k mean(x_k),   var = 1/K sum_k var(x_k),   x_k a layer's input for batch k

with the unbiased variance and every layer normalising by its batch meanwhile, as
`torch.optim.swa_utils.update_bn` has it for one network. Generated weights come without statistics:
these are estimated on training images, without labels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flown.base.errors import FlownError
from flown.nets.batched import stacked

KEPT = "running_mean", "running_var", "num_batches_tracked"  # by a layer


def layers(net: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that keep running statistics, by name."""
    return {
        name: layer
        for name, layer in net.named_modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats
    }


def by_batch(net: nn.Module, names: Iterable[str]) -> nn.Module:
    """Makes these BatchNorm layers normalise by their batch and leave running statistics alone.

    `vmap` cannot update in place what all networks share. Returns the network.
    """
    known = layers(net)
    for layer in [known[name] for name in names]:
        layer.train()
        layer.track_running_stats = False
    return net


def draw(images: Tensor, batches: int, size: int, seed: int) -> Iterator[Tensor]:
    """Random batches of images (N, ...); no image comes again before all have come.

    Raises:
        FlownError: no batch asked for, or fewer than two images to a batch.
    """
    size = min(size, len(images))
    if batches < 1 or size < 2:
        raise FlownError(
            "BatchNorm statistics need a batch of two images or more, got "
            f"{batches} batches of {size} of {len(images)} images"
        )
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(batches * size / len(images))
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(passes)])
    return (images[rows] for rows in order[: batches * size].split(size))


def influenced(net: nn.Module, tensors: Collection[str], images: Tensor) -> set[str]:
    """Names of the statistics on which any of the parameters `tensors` has an effect."""
    net = copy.deepcopy(net).eval()
    found: set[str] = set()

    def note(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs[0].requires_grad:
            found.update(f"{name}.{kept}" for kept in KEPT)

    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in tensors)
    for name in layers(net):
        net.get_submodule(name).register_forward_pre_hook(partial(note, name))
    with torch.enable_grad():
        net(images)
    return found


@torch.no_grad()
def statistics(
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor],
    batches: Iterable[Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Running statistics of n networks under their state_dict names.

    Args:
        net: the architecture. tensors, frozen: as `stacked.forward`'s.
        batches: preprocessed images (B, c, H, W) each, shown to all networks.

    Returns:
        Each network's own, (n, *shape), and those that come before any of `tensors` has had an
        effect and are thus the same in all, (*shape).
    """
    names = list(layers(net))
    found: dict[str, Tensor] = {}
    seen = copy.deepcopy(net).eval()
    for name in names:
        seen.get_submodule(name).register_forward_pre_hook(partial(_note, found, name))
    by_batch(seen, names)

    def one(some: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        found.clear()
        torch.func.functional_call(seen, {**frozen, **some}, (x,))
        return dict(found)

    size = stacked.GROUP * (4 if frozen else 1)
    every = partial(stacked.each, seen, one, dict(tensors), size=size)
    means: dict[str, Tensor] = {}
    own: set[str] = set()
    for count, x in enumerate(batches, 1):
        if count == 1:
            own = influenced(net, tensors, x[:2])
        for name, value in every(x).items():
            means[name] = means[name].lerp(value, 1 / count) if name in means else value
    n, device = len(next(iter(tensors.values()))), next(iter(tensors.values())).device
    for name in names:
        means[f"{name}.num_batches_tracked"] = torch.full((n,), count, device=device)
    shared = {name: value[0] for name, value in means.items() if name not in own}
    return {name: value for name, value in means.items() if name in own}, shared


def _note(found: dict[str, Tensor], name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    x: Tensor = inputs[0]
    others = [axis for axis in range(x.ndim) if axis != 1]
    found[f"{name}.running_mean"] = x.mean(others)
    found[f"{name}.running_var"] = x.var(others)
