"""Neuron tokens to weights: how one architecture is written.

A hidden neuron is a token x (m,); its layer's linear map D turns it into the neuron's incoming
weights, gain and bias, around those of a base network:

    (w, g, b) = (v / |v|, g, b)_base + D x,   v of mean 0

The base network is a mixture of E, whose shares follow from what kind of images the support set has
(`trunk`): a network as small as these cannot see strokes and photographs equally well.

Gain and bias are in the units of the support set (`units`). That the base network's weights are
directions makes it train as networks with BatchNorm do (Qiao et al. 2019, 1903.10520). A class is a
token too. The row of the last layer that belongs to it is the ridge regression of the class on what the
written body computes on the support set, with a correction that the token writes:

    R = ridge(body(support; w), labels),   rows = s R + D x

Axes: n networks, N hidden neurons, C classes, K support images, F features, m numbers a token, E base
networks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.anytask.ridge import left_out, ridge, with_one
from flown.anytask.units import Units
from flown.nets import INPUT_SIZES
from flown.nets.architecture import Architecture
from flown.nets.batched import stacked
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout


class Writer(nn.Module):
    """Writes networks of one kind, for colour images or grey ones, with any number of outputs.

    A network for grey images is the one for colour images whose channels are all the same: the first
    layer's weights are summed over its input channels.

    Args:
        net: a plain sequence of layers, a name of `flown.nets.NETS`.
        width: of the trunk's tokens. numbers: m. experts: E.
    """

    def __init__(self, net: str, width: int, numbers: int, experts: int = 1) -> None:
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
            F.pad(F.pad(weights[f"{name}.weight"].flatten(1), (0, 1), value=1.0), (0, 1))
            for name in self.names
        ]
        self.base = nn.ParameterList([row.detach().repeat(experts, 1, 1) for row in rows])
        self.units = nn.ModuleList([Units(len(row), experts) for row in rows])
        self.neurons = nn.Parameter(torch.randn(sum(map(len, rows)), width) * 0.5)
        self.decoders = nn.ParameterList([torch.randn(numbers, row.shape[1]) for row in rows])
        self.head_decoder = nn.Parameter(torch.zeros(numbers, self.features + 1))
        # How much the regression is shrunk, and scaled: logarithms.
        self.regression = nn.Parameter(torch.tensor([-3.4, 3.0]).repeat(experts, 1))
        self.ridge = nn.Linear(numbers, 2, bias=False)
        nn.init.zeros_(self.ridge.weight)

    def write_body(
        self, x: Tensor, shares: Tensor, support: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Tensors of all layers but the last, by name, each (n, *shape), and features (n, K, F).

        Args:
            x: tokens (n, N, m). shares: of the base networks, (n, E) or (1, E) for all.
            support: images (K, c, S, S) for all or (n, K, c, S, S).
        """
        n, channels = len(x), support.shape[-3]
        h = support.transpose(0, 1).flatten(1, 2) if support.ndim == 5 else support
        h = stacked.channels_last(h)  # (K, c, S, S) or (K, n c, S, S)
        tensors: dict[str, Tensor] = {}
        written = iter(self._layers(x, shares))
        for layer in self.bodies[channels]:
            if isinstance(layer, nn.Flatten):
                h = h.unflatten(1, (n, -1)).transpose(0, 1).flatten(2)
                continue
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                h = stacked.alone(layer, h)
                continue
            name, weight, gain, bias, units = next(written)
            if isinstance(layer, nn.Conv2d):
                if not tensors and channels == 1:
                    weight = weight.sum(dim=2, keepdim=True)
                groups = h.shape[1] // weight.shape[2]
                kernel = weight.flatten(0, 1)
                z = F.conv2d(h, kernel, None, layer.stride, layer.padding, layer.dilation, groups)
                factor, lift = units(z, gain, bias, shares)
                h = torch.addcmul(lift.flatten()[:, None, None], z, factor.flatten()[:, None, None])
            else:
                z = torch.bmm(h, weight.mT)  # (n, K, out)
                factor, lift = units(z.transpose(0, 1).flatten(1), gain, bias, shares)
                h = torch.addcmul(lift[:, None], z, factor[:, None])
            tensors[f"{name}.weight"] = weight * factor.view(
                *factor.shape, *[1] * (weight.ndim - 2)
            )
            tensors[f"{name}.bias"] = lift
        return tensors, h

    def _layers(
        self, x: Tensor, shares: Tensor
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Units]]:
        """Each layer's name, weights (n, *shape), gains and biases (n, out), and its units."""
        parts = x.split([base.shape[1] for base in self.base], dim=1)
        layers = zip(self.names, self.shapes, self.base, self.decoders, self.units, strict=True)
        for (name, shape, base, decoder, units), part in zip(layers, parts, strict=True):
            mixed = torch.einsum("ne,eoi->noi", shares, base)
            v, other = mixed.split([mixed.shape[2] - 2, 2], dim=2)
            v = F.normalize(v - v.mean(dim=2, keepdim=True), dim=2)
            rows = torch.cat([v, other], dim=2) + _decoded(part, decoder)  # (n, out, in + 2)
            assert isinstance(units, Units)
            yield name, rows[..., :-2].unflatten(2, shape[1:]), rows[..., -2], rows[..., -1], units

    def compute(self, tensors: dict[str, Tensor], images: Tensor) -> Tensor:
        """Features (n, K, F) of bodies, images (K, c, S, S) for all or (n, K, c, S, S)."""
        return stacked.forward(self.bodies[images.shape[-3]], tensors, images)

    def write_head(
        self, x: Tensor, shares: Tensor, features: Tensor, labels: Tensor, views: float = 1.0
    ) -> Tensor:
        """Rows of the last layer, weights and bias, (n, C, F + 1).

        Args:
            x: class tokens (n, C, m). shares: as for `write_body`.
            features: of the support set, (n, K, F). labels: (n, K).
            views: how many of the K are of one image; they say no more than one.
        """
        shrink, scale = self.shrink_and_scale(x, shares)
        found = ridge(features, labels, x.shape[1], views * shrink)
        return scale * found + self.correction(x)

    def left_out(self, x: Tensor, shares: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """What heads that are written without images say of these, logits (n, K, C).

        Args:
            labels: (K,); others as of `write_head`.
        """
        shrink, scale = self.shrink_and_scale(x, shares)
        found = scale * left_out(features, labels, x.shape[1], shrink)
        logits: Tensor = found + with_one(features) @ self.correction(x).mT
        return logits

    def shrink_and_scale(self, x: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """How much the regression is shrunk, and scaled, each (n, 1, 1), of class tokens (n, C, m)."""
        logs = shares @ self.regression + self.ridge(x.mean(dim=1))
        shrink, scale = logs.exp()[..., None, None].unbind(1)
        return shrink, scale

    def correction(self, x: Tensor) -> Tensor:
        """What class tokens (n, C, m) add to the regression's rows, (n, C, F + 1)."""
        return _decoded(x, self.head_decoder)

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
