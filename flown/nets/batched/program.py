"""A plain sequence of layers as a table of integers, for compiled loops to run.

The table says what each layer is, and where its numbers lie in the flat vectors of activations and
weights. Flattening leaves no trace: a linear layer is a convolution over all that it is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flown.nets import plain
from flown.nets.batched import kernels
from flown.nets.batched.kernels import TILE

Integers = NDArray[np.int64]
WEIGHTED, ACTIVATION = range(2)


class At(IntEnum):
    """Columns of a program's table. Places and lengths count numbers an image."""

    KIND = 0
    X = 1  # place of the input among the activations, and of its gradient (-1: not wanted)
    GX = 2
    X_ROW = 3  # from one row of the input to the next
    X_PLANE = 4  # from one plane to the next
    X_PLANES = 5
    Y = 6  # the output's
    GY = 7
    Y_PLANE = 8
    Y_PLANES = 9
    ROWS = 10  # of the output
    COLUMNS = 11
    INPUTS = 12  # taps: inputs of one output
    TAPS = 13  # place of their offsets
    WEIGHT = 14  # places in the weight vector; a bias that is not there is -1
    BIAS = 15
    TILE = 16  # place of weights and biases with zeros added
    WHICH = 17  # place of the pooling's choices; -1: the convolution is not pooled
    ROWS_OF_TWO = 18  # place of the two rows that are pooled while they are in the cache
    CONVOLVED = 19  # columns before pooling
    FUNCTION = 20


# Positions between two planes: planes whose distance is a multiple of 4096 bytes share cache sets.
GAP = 3


@dataclass(frozen=True)
class Program:
    """A network as integers, for images of one size."""

    layers: Integers  # (L, columns of `At`)
    taps: Integers  # offsets in an image's activations
    activations: int  # numbers an image
    tiles: int
    choices: int

    @classmethod
    def of(cls, net: nn.Module, shape: tuple[int, int, int]) -> Program | None:
        """The program of a plain sequence of layers for images (c, H, W); None for other networks."""
        layers = plain.layers(net)
        if layers is None or not all(_is_known(layer) for _, layer in layers):
            return None
        builder = _Builder(shape)
        fits = all(builder.add(layer) for _, layer in layers)
        if not fits or not builder.rows:
            return None
        program = builder.program()
        return program if plain.agrees(net, shape, "compiled", program._logits) else None

    def _logits(self, tensors: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits (n, B, C) of networks by their tensors (n, *shape), in the program's order."""
        from flown.nets.batched import compiled

        vectors = torch.cat([tensor.flatten(1) for tensor in tensors.values()], dim=1)
        return torch.from_numpy(compiled.logits(self, images.numpy(), vectors.numpy(), 1))


def _is_known(layer: nn.Module) -> bool:
    """Whether a layer of a plain network has the settings that loops are compiled for."""
    if isinstance(layer, nn.Conv2d):
        plain = layer.stride == (1, 1) and layer.dilation == (1, 1) and layer.groups == 1
        return plain and layer.padding in ((0, 0), "valid")
    if isinstance(layer, nn.MaxPool2d):
        sizes = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        return sizes in ((2, 2, 0, 1), ((2, 2), (2, 2), (0, 0), (1, 1))) and not layer.ceil_mode
    if isinstance(layer, nn.GELU):
        return layer.approximate == "none"
    if isinstance(layer, nn.LeakyReLU):
        return layer.negative_slope == 0.01
    return True


class _Builder:
    """Lays out a network's numbers, layer by layer."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.planes, self.height, self.width = shape
        self.plane = self.height * self.width  # the images' planes touch
        self.x, self.gx = 0, -1
        self.activations = math.prod(shape)
        self.weights = self.tiles = self.choices = 0
        self.rows: list[dict[At, int]] = []
        self.taps: list[int] = []

    def add(self, layer: nn.Module) -> bool:
        """Adds a layer's row; False when that cannot be done."""
        if isinstance(layer, nn.Flatten):  # a linear layer's taps find its inputs where they are
            return True
        row = {
            At.X: self.x,
            At.GX: self.gx,
            At.X_ROW: self.width,
            At.X_PLANE: self.plane,
            At.X_PLANES: self.planes,
            At.WHICH: -1,
        }
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            if not self._weights(row, layer):
                return False
        elif isinstance(layer, nn.MaxPool2d):
            return self._pool()
        else:
            row |= {At.KIND: ACTIVATION, At.FUNCTION: _function(layer)}
        self._place(row)
        self.rows.append(row)
        return True

    def _place(self, row: dict[At, int]) -> None:
        """Gives a layer's output and its gradient their places."""
        if row[At.KIND] == WEIGHTED:
            self.plane = self.height * self.width + GAP
        places = _up(self.planes) * self.plane
        self.x, self.gx = self.activations, self.activations + places
        self.activations += 2 * places
        row |= {
            At.Y: self.x,
            At.GY: self.gx,
            At.Y_PLANE: self.plane,
            At.Y_PLANES: self.planes,
            At.ROWS: self.height,
            At.COLUMNS: self.width,
        }

    def _pool(self) -> bool:
        """Pools what the last layer, a convolution, computes: only two rows of it ever exist."""
        if not self.rows or self.rows[-1][At.KIND] != WEIGHTED or self.rows[-1][At.WHICH] >= 0:
            return False
        row = self.rows[-1]
        if min(self.height, self.width) < 2:
            return False
        self.activations = row[At.Y]
        row |= {At.ROWS_OF_TWO: self.activations, At.WHICH: self.choices}
        self.activations += _up(self.planes) * (2 * self.width + GAP)
        row[At.CONVOLVED] = self.width
        self.height, self.width = self.height // 2, self.width // 2
        self._place(row)
        self.choices += self.planes * self.plane
        return True

    def _weights(self, row: dict[At, int], layer: nn.Conv2d | nn.Linear) -> bool:
        if isinstance(layer, nn.Conv2d):
            height, width = layer.kernel_size
            fits = layer.in_channels == self.planes
            out = layer.out_channels
        else:  # a convolution with one position
            height, width = self.height, self.width
            fits = layer.in_features == self.planes * height * width
            out = layer.out_features
        if not fits or height > self.height or width > self.width:
            return False
        taps = [
            plane * self.plane + y * self.width + x
            for plane in range(self.planes)
            for y in range(height)
            for x in range(width)
        ]
        row |= {At.KIND: WEIGHTED, At.INPUTS: len(taps), At.TAPS: len(self.taps)}
        row |= {At.WEIGHT: self.weights, At.TILE: self.tiles, At.BIAS: -1}
        self.weights += out * len(taps)
        if layer.bias is not None:
            row[At.BIAS] = self.weights
            self.weights += out
        self.tiles += _up(out) * (_up(len(taps)) + 1)
        self.taps += taps + [0] * (_up(len(taps)) - len(taps))
        self.planes, self.height = out, self.height - height + 1
        self.width = self.width - width + 1
        return True

    def program(self) -> Program:
        table = np.array([[row.get(at, 0) for at in At] for row in self.rows], dtype=np.int64)
        taps = np.array(self.taps, dtype=np.int64)
        return Program(table, taps, self.activations, self.tiles, self.choices)


def _up(count: int) -> int:
    return -(-count // TILE) * TILE


def _function(layer: nn.Module) -> int:
    functions: list[tuple[type[nn.Module], int]] = [
        (nn.Tanh, kernels.TANH),
        (nn.GELU, kernels.GELU),
        (nn.ReLU, kernels.RELU),
        (nn.LeakyReLU, kernels.LEAKY_RELU),
        (nn.SiLU, kernels.SILU),
        (nn.Sigmoid, kernels.SIGMOID),
    ]
    return next(code for kind, code in functions if isinstance(layer, kind))
