"""Networks with whatever people put into them, put together at random, for images (N, 1, 8, 8).

`made(parts)` is the name of a network for recipes and imports; it is built from its parts each time.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from flown.base import trust

WIDTH = 6


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 0.1), self.bias, self.stride)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Squared(nn.Tanh):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 2


class Backwards(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self):
            x = layer(x)
        return x


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Shift(nn.Module):
    """Adds a buffer that is drawn at random, is always the same, or counts the calls."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        start = {"drawn": torch.randn(WIDTH), "counted": torch.zeros(WIDTH)}
        shift = start.get(kind, torch.linspace(-1, 1, WIDTH))
        self.register_buffer("shift", shift, persistent=kind != "unsaved")
        self.drawn = torch.randn(WIDTH) if kind == "hidden" else torch.zeros(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "counted":
            self.shift += 1
        return x + self.shift + self.drawn


class Chosen(nn.Module):
    """Looks at values, which `vmap` cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return x if bool(x.mean() > 0) else -x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(), linear()
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Embedded(nn.Module):
    """Starting values of its own, none of them PyTorch's for a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((WIDTH,), 1e-3))
        self.place = nn.Parameter(torch.zeros(1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * x + self.place


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def hooked(layer: nn.Module, before: bool = False) -> nn.Module:
    if before:
        layer.register_forward_pre_hook(lambda module, inputs: (0.5 * inputs[0],))
    else:
        layer.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    return layer


def patched(layer: nn.Module) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda x: forward(x) + 0.3  # type: ignore[method-assign]
    return layer


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer)  # type: ignore[no-any-return]


# Parts keep WIDTH features. The first are of ordinary networks, for which there are fast loops.
PARTS: dict[str, Callable[[], list[nn.Module]]] = {
    "tanh": lambda: [nn.Tanh()],
    "linear": lambda: [linear(), nn.ReLU()],
    "gelu": lambda: [linear(), nn.GELU("tanh")],
    "same activation twice": lambda: [act := nn.Tanh(), linear(), act],
    "same layer twice": lambda: [layer := linear(), nn.Tanh(), layer],
    "tied": lambda: [Tied()],
    "subclass of linear": lambda: [Doubled(WIDTH, WIDTH)],
    "subclass of tanh": lambda: [Squared()],
    "subclass of sequential": lambda: [Backwards(linear(), nn.Tanh(), linear())],
    "hook": lambda: [hooked(linear())],
    "hook of an activation": lambda: [hooked(nn.Tanh())],
    "hook before": lambda: [hooked(linear(), before=True)],
    "patched": lambda: [patched(linear())],
    "weight norm": lambda: [parametrizations.weight_norm(linear())],
    "old weight norm": lambda: [old_weight_norm(linear())],
    "scalar": lambda: [Scale()],
    "own values": lambda: [Embedded(), nn.PReLU()],
    "values are looked at": lambda: [Chosen()],
    "same buffer": lambda: [Shift("same")],
    "unsaved buffer": lambda: [Shift("unsaved")],
    "batch norm": lambda: [nn.BatchNorm1d(WIDTH)],
    "layer norm": lambda: [nn.LayerNorm(WIDTH)],
    "dropout": lambda: [nn.Dropout(0.2)],
    "drawn buffer": lambda: [Shift("drawn")],
    "spectral norm": lambda: [parametrizations.spectral_norm(linear())],
    "counter": lambda: [Shift("counted")],
    "hidden draw": lambda: [Shift("hidden")],
}
ENTRIES: dict[str, Callable[[int], list[nn.Module]]] = {
    "conv": lambda c: [nn.Conv2d(c, 2, 3), nn.MaxPool2d(2), nn.Tanh()],
    "stride": lambda c: [nn.Conv2d(c, 2, 3, stride=2), nn.ReLU()],
    "standardised": lambda c: [Standardised(c, 2, 3, stride=2), nn.Tanh()],
    "hooked": lambda c: [hooked(nn.Conv2d(c, 2, 3, stride=2))],
    "weight norm": lambda c: [parametrizations.weight_norm(nn.Conv2d(c, 2, 3, stride=2))],
    "instance norm": lambda c: [
        nn.Conv2d(c, 2, 3, stride=2),
        nn.InstanceNorm2d(2, affine=True, track_running_stats=True),
    ],
}
# Networks with these may be refused: each has a state that weights do not hold.
WITH_STATE = {"drawn buffer", "spectral norm", "counter", "hidden draw", "instance norm"}
RANDOM = {"dropout", "batch norm", "instance norm"}  # training depends on more than one network
_module = types.ModuleType("odd_networks_made")
sys.modules[_module.__name__] = _module


def made(entry: str, parts: Sequence[str]) -> str:
    """The name of a network of these parts."""

    def net(channels: int, classes: int) -> nn.Module:
        layers = [*ENTRIES[entry](channels), nn.Flatten(), nn.LazyLinear(WIDTH)]
        with torch.no_grad(), torch.random.fork_rng():
            size = nn.Sequential(*layers[:-1]).eval()(torch.zeros(1, channels, 8, 8)).shape[1]
        layers[-1] = nn.Linear(size, WIDTH)
        for part in parts:
            layers += PARTS[part]()
        return nn.Sequential(*layers, nn.Linear(WIDTH, classes))

    name = f"net{len(vars(_module))}"
    setattr(_module, name, net)
    return trust.allow(f"{_module.__name__}:{name}")


def named(make: Callable[..., Any]) -> str:
    """The name of a network by its function."""
    name = f"net{len(vars(_module))}"
    setattr(_module, name, make)
    return trust.allow(f"{_module.__name__}:{name}")
