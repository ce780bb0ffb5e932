"""What a network's constructor decides besides its architecture: starting values and buffers.

Weights are all that a vector holds. A buffer that is neither a weight nor BatchNorm's statistic is
kept once for all networks of a task; `drawn` finds those that differ each time a network is built,
and `check_buffers_stay` networks that change theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.base.seeding import seeded
from flown.nets.architecture import Architecture
from flown.nets.batched import batchnorm
from flown.weights.layout import WeightLayout


def build_seeded(layout: WeightLayout, seed: int) -> nn.Module:
    """The network that a layout is of, as its constructor draws it from a seed."""
    with seeded(seed):
        return layout.architecture.build()


def second_names(net: nn.Module) -> dict[str, str]:
    """Other names of tied parameters, to the names that a layout has."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    every = net.named_parameters(remove_duplicate=False)
    return {name: names[parameter] for name, parameter in every if names[parameter] != name}


def constants(net: nn.Module) -> dict[str, Tensor]:
    """Buffers of the state dict that are not BatchNorm's statistics, by name."""
    statistics = {f"{x}.{kept}" for x in batchnorm.layers(net) for kept in batchnorm.KEPT}
    held = net.state_dict()
    every = net.named_buffers(remove_duplicate=False)
    return {name: b for name, b in every if name in held and name not in statistics}


def fill(net: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Gives a network those of its `constants` that are in `tensors`; returns it."""
    held = constants(net)
    for name in sorted(held.keys() & tensors.keys()):
        if held[name].shape != tensors[name].shape:
            got, want = tuple(tensors[name].shape), tuple(held[name].shape)
            raise FlownError(f"{type(net).__name__}: buffer '{name}' is {got}, expected {want}")
    net.load_state_dict({k: v for k, v in tensors.items() if k in held}, strict=False)
    return net


def drawn(architecture: Architecture) -> frozenset[str]:
    """Names of the `constants` that a network's constructor draws at random.

    Raises:
        FlownError: the network has parts beyond its state dict that differ between two builds, or
            changes its buffers in eval mode.
    """
    if ":" not in architecture.net:
        return frozenset()  # networks of this library draw nothing but weights
    return _drawn(architecture)


@lru_cache(maxsize=256)
def _drawn(architecture: Architecture) -> frozenset[str]:
    builds = []
    for seed in range(2):
        with seeded(seed):
            builds.append(architecture.build().eval())
    first, second = (constants(build) for build in builds)
    found = frozenset(name for name in first if not _same(first[name], second.get(name)))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *architecture.input_shape, generator=generator)
    builds[1].load_state_dict(builds[0].state_dict())
    try:
        logits = [_run(build, {}, images) for build in builds]
    except RuntimeError:
        return found  # not made for such images; whoever shows it images will hear of it
    one, other = logits
    if isinstance(one, Tensor) and not torch.allclose(one, other, atol=1e-5, equal_nan=True):
        raise FlownError(
            f"network '{architecture.net}': two builds with one state dict give different logits, so "
            "no file can hold it; keep what the constructor draws in a buffer (register_buffer)"
        )
    check_buffers_stay(builds[0], architecture.net, images)
    return found


def drawn_once(layout: WeightLayout, seed: int) -> dict[str, Tensor]:
    """The `drawn` buffers of a layout's network from a seed, for all networks of a zoo."""
    names = drawn(layout.architecture)
    if not names:
        return {}
    return {k: v for k, v in constants(build_seeded(layout, seed)).items() if k in names}


def check_buffers_stay(
    net: nn.Module, name: str, images: Tensor, frozen: Mapping[str, Tensor] | None = None
) -> None:
    """Raises FlownError where a forward pass, in the network's present mode, changes a buffer.

    Args:
        name: the network's.
        images: preprocessed, (B, c, H, W).
        frozen: as `stacked.forward`'s.
    """
    before = {key: buffer for key, buffer in net.named_buffers() if key not in (frozen or {})}
    if not before:
        return
    after = {key: buffer.clone() for key, buffer in before.items()}
    given = {**(frozen or {}), **after}
    _run(net, given, images)
    for key, buffer in before.items():
        if not (_same(buffer, after[key]) and _same(buffer, given[key])):
            mode = "training" if net.training else "evaluation"
            raise FlownError(
                f"network '{name}': {mode} changes its buffer '{key}', and buffers are kept once for "
                "all networks; use a layer without such a state (track_running_stats=False of "
                "instance norm, weight_norm for spectral_norm)"
            )


@torch.no_grad()
def _run(net: nn.Module, tensors: dict[str, Tensor], images: Tensor) -> Tensor:
    with seeded(0):  # of dropout
        logits: Tensor = torch.func.functional_call(net, tensors, (images,))
    return logits


def _same(one: Tensor, other: Tensor | None) -> bool:
    if other is None or one.shape != other.shape:
        return False
    return torch.allclose(one, other.to(one), rtol=0, atol=0, equal_nan=True)
