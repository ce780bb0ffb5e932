"""Neuron tokens to weights: how one architecture is written.

A hidden neuron is a token x (m,); its layer's linear map D turns it into the neuron's incoming weights
and bias, around those of a base network that all tasks share:

    (w, b) = (w, b)_base + D x

A class is a token too. The row of the last layer that belongs to it is the ridge regression of the
class on what the written body computes on the support set, with a correction that the token writes:

    R = ridge(body(support; w), labels),   rows = s R + D x

Axes: n networks, N hidden neurons, C classes, K support images, F features, m numbers a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.anytask.ridge import left_out, ridge, with_one
from flown.nets import INPUT_SIZES
from flown.nets.architecture import Architecture
from flown.nets.batched import stacked
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout

_DOUBLINGS = torch.linspace(-3, 3, 37)  # of a head's confidence, that are tried


class Writer(nn.Module):
    """Writes networks of one kind, for colour images or grey ones, with any number of outputs.

    A network for grey images is the one for colour images whose channels are all the same: the first
    layer's weights are summed over its input channels.

    Args:
        net: a plain sequence of layers, a name of `flown.nets.NETS`.
        width: of the trunk's tokens. numbers: m.
    """

    def __init__(self, net: str, width: int, numbers: int) -> None:
        super().__init__()
        self.kind = architecture(net, 3, 2)
        bodies = {channels: architecture(net, channels, 2).build() for channels in (1, 3)}
        assert all(isinstance(module, nn.Sequential) for module in bodies.values())
        self.bodies = {c: nn.Sequential(*list(m.children())[:-1]) for c, m in bodies.items()}
        weights = dict(bodies[3].named_parameters())
        *self.names, self.last = [
            name.removesuffix(".weight") for name in weights if "weight" in name
        ]
        self.shapes = [tuple(weights[f"{name}.weight"].shape) for name in self.names]
        self.features = weights[f"{self.last}.weight"].shape[1]
        rows = [
            torch.cat([weights[f"{n}.weight"].flatten(1), weights[f"{n}.bias"][:, None]], dim=1)
            for n in self.names
        ]
        self.base = nn.ParameterList([row.detach().clone() for row in rows])
        self.neurons = nn.Parameter(torch.randn(sum(map(len, rows)), width) * 0.5)
        self.decoders = nn.ParameterList([torch.randn(numbers, row.shape[1]) for row in rows])
        self.head_decoder = nn.Parameter(torch.zeros(numbers, self.features + 1))
        self.ridge = nn.Linear(numbers, 2)  # how much the regression is shrunk, and scaled
        nn.init.zeros_(self.ridge.weight)
        self.ridge.bias.data.copy_(torch.tensor([-3.4, 3.0]))

    def write_body(self, x: Tensor, channels: int) -> dict[str, Tensor]:
        """Tensors of all layers but the last, by name, each (n, *shape), of tokens (n, N, m)."""
        tensors: dict[str, Tensor] = {}
        parts = x.split([len(base) for base in self.base], dim=1)
        layers = zip(self.names, self.shapes, self.base, self.decoders, parts, strict=True)
        for name, shape, base, decoder, part in layers:
            rows = base + _decoded(part, decoder)  # (n, out, in + 1)
            tensors[f"{name}.weight"] = rows[..., :-1].unflatten(2, shape[1:])
            tensors[f"{name}.bias"] = rows[..., -1]
        if channels == 1:
            first = f"{self.names[0]}.weight"
            tensors[first] = tensors[first].sum(dim=2, keepdim=True)
        return tensors

    def compute(self, tensors: dict[str, Tensor], images: Tensor) -> Tensor:
        """Features (n, K, F) of bodies, images (K, c, S, S) for all or (n, K, c, S, S)."""
        return stacked.forward(self.bodies[images.shape[-3]], tensors, images)

    def compute_base(self, images: Tensor) -> Tensor:
        """Features (K, F) of the base body, images (K, c, S, S)."""
        channels = images.shape[1]
        zero = self.base[0].new_zeros(1, len(self.neurons), len(self.decoders[0]))
        tensors = {name: x[0] for name, x in self.write_body(zero, channels).items()}
        images = images.contiguous(memory_format=torch.channels_last)
        found: Tensor = torch.func.functional_call(self.bodies[channels], tensors, (images,))
        return found

    def write_head(self, x: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """Rows of the last layer, weights and bias, (n, C, F + 1).

        Args:
            x: class tokens (n, C, m). features: of the support set, (n, K, F). labels: (n, K).
        """
        shrink, scale = self._regression(x)
        rows: Tensor = scale * ridge(features, labels, x.shape[1], shrink) + _decoded(
            x, self.head_decoder
        )
        return rows

    def temperature(self, x: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """By what a head's rows are multiplied so that its confidence is right, (n, 1, 1).

        The likeliest factor, given what heads that are written without an image say of it, and a
        normal prior of one doubling around 1. Images that are alone in their class say nothing.

        Args:
            as of `write_head`.
        """
        counts = F.one_hot(labels[0], x.shape[1]).sum(dim=0)
        telling = counts[labels[0]] > 1
        shrink, scale = self._regression(x)
        logits = scale * left_out(features, labels, x.shape[1], shrink)
        logits = (logits + with_one(features) @ _decoded(x, self.head_decoder).mT)[:, telling]
        asked = labels[:, telling, None]
        losses = []
        for doublings in _DOUBLINGS.tolist():
            log_p = (2**doublings * logits).log_softmax(-1).gather(2, asked)
            losses.append(doublings**2 / 2 - log_p.sum(dim=(1, 2)))
        best = torch.stack(losses).argmin(dim=0).to(_DOUBLINGS.device)
        return 2 ** _DOUBLINGS[best].to(x)[:, None, None]

    def _regression(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """How much the regression is shrunk, and scaled, each (n, 1, 1), of class tokens (n, C, m)."""
        shrink, scale = self.ridge(x.mean(dim=1)).exp()[..., None, None].unbind(1)
        return shrink, scale

    def pack(self, body: dict[str, Tensor], head: Tensor, kind: Architecture) -> WeightBatch:
        """Bodies and last layers as networks of that architecture."""
        layout = WeightLayout.of(kind.build(), kind)
        name = self.last
        tensors = body | {f"{name}.weight": head[..., :-1], f"{name}.bias": head[..., -1]}
        return WeightBatch(layout, layout.pack(tensors))


def _decoded(x: Tensor, decoder: Tensor) -> Tensor:
    """D x, small beside a base network's weights where x and the decoder are of unit size.

    A decoder of unit size is one that Adam changes slowly, in units of what noise does to a network.
    """
    found: Tensor = 0.1 * x @ decoder / decoder.numel() ** 0.5
    return found


def architecture(
    net: str, channels: int, outputs: int, mean: float = 0.0, std: float = 1.0
) -> Architecture:
    """A kind of network that is written: tanh for `cnn-small`, as in its zoos, else ReLU."""
    return Architecture(
        net=net,
        channels=channels,
        size=INPUT_SIZES[net],
        outputs=outputs,
        activation="tanh" if net == "cnn-small" else "relu",
        mean=mean,
        std=std,
    )
