"""Which tensors of a network are generated: all, or a subset by name.

A subset is written as glob patterns of tensor names, or as `last-2-norms`: weight and bias of the
last two norm layers, p-diff's choice for big networks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from flown.base.errors import FlownError

_NORMS = _BatchNorm, nn.LayerNorm, nn.GroupNorm
_LAST_NORMS = re.compile(r"last-(\d+)-norms")


def last_norms(net: nn.Module, count: int) -> tuple[str, ...]:
    """Names of weight and bias of the last `count` norm layers that have any.

    Last in the order in which the network's modules were made, which is that of execution in
    ordinary networks.

    Raises:
        FlownError: the network has fewer.
    """
    found = [
        [f"{path}.{name}" for name, _ in layer.named_parameters()]
        for path, layer in net.named_modules()
        if isinstance(layer, _NORMS) and any(True for _ in layer.parameters())
    ]
    if not 0 < count <= len(found):
        raise FlownError(
            f"last-{count}-norms: {type(net).__name__} has {len(found)} norm layers with weights"
        )
    return tuple(name for names in found[-count:] for name in names)


def patterns(net: nn.Module, subset: str | Sequence[str]) -> tuple[str, ...]:
    """The patterns of a recipe's `subset`, for `WeightLayout.of`.

    Raises:
        FlownError: as `last_norms`.
    """
    if not isinstance(subset, str):
        return tuple(subset)
    match = _LAST_NORMS.fullmatch(subset)
    return last_norms(net, int(match[1])) if match else (subset,)
