"""Networks as one self-contained C99 file: a classifier for what has no Python, or no memory.

Weights are floats, or 8-bit integers with a scale for each row, w = s q; the inputs of a layer are then
integers of 12 bits, in units of their own largest, and sums are integers of 32 bits.
"""

from __future__ import annotations

import functools
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.base.files import write_text
from flown.nets import plain
from flown.nets.architecture import PerChannel
from flown.version import __version__
from flown.weights.batch import WeightBatch


class CSize(NamedTuple):
    """Bytes that a classifier takes: of constants, and of working memory."""

    constants: int
    memory: int


class _Array(NamedTuple):
    """A constant of the C file, the networks' parts one after another."""

    name: str
    type: str
    length: int
    values: str


def write_c(batch: WeightBatch, path: Path | str, int8: bool = False) -> CSize:
    """Writes all networks of a batch as one C file, whose function gives their mean prediction.

    Args:
        int8: weights and sums as integers, a quarter of the size.

    Raises:
        FlownError: no networks, or not plain sequences of known layers (`flown.nets.plain`).
    """
    if not len(batch):
        raise FlownError(f"{path}: no networks to export")
    found = plain.layers(batch.network)
    if found is None or batch.frozen or batch.buffers:
        raise FlownError(
            f"{batch.name}: only convolutions, max-pooling, activations and linear layers can be "
            "written as C; take --to onnx"
        )
    kind, count = batch.layout.architecture, len(batch)
    name = identifier(Path(path).stem)
    writer = _Writer(batch.to("cpu"), int8)
    x = torch.zeros(1, *kind.input_shape)
    steps = list(writer.steps(found, x))
    mean, std = (writer.units(key, getattr(kind, key), kind.size**2) for key in ("mean", "std"))
    arrays = writer.arrays
    width = {"float": 4, "int8_t": 1}
    constants = sum(array.length * width[array.type] for array in arrays)
    size = CSize(constants, writer.largest * (10 if int8 else 8))
    classes = batch.task.classes if batch.task else [str(i) for i in range(kind.outputs)]
    text = (
        _environment()
        .get_template("network.c")
        .render(
            title=_comment(f"{count} x {batch.name}, written by flown {__version__}"),
            about=_about(batch),
            name=name,
            channels=kind.channels,
            size=kind.size,
            pixels=kind.channels * kind.size**2,
            outputs=kind.outputs,
            count=count,
            classes=[_string(c) for c in classes],
            mean=mean,
            std=std,
            quantised=int8,
            arrays=arrays,
            steps=steps,
            kinds=writer.kinds,
            buffer=writer.largest,
            constants=size.constants,
            memory=size.memory,
            scale_argument=", const float *scale, float unit" if int8 else "",
            scaled="scale[o] * unit * " if int8 else "",
        )
    )
    write_text(path, text)
    return size


class _Writer:
    """The calls of layers, and the constants that they need."""

    def __init__(self, batch: WeightBatch, int8: bool) -> None:
        self.tensors, self.int8 = batch.layout.unpack(batch.vectors), int8
        self.arrays: list[_Array] = []
        self.kinds: set[str] = set()
        self.largest = 0

    def units(self, name: str, value: PerChannel, pixels: int) -> str:
        """The mean or deviation of pixel i of an image with so many pixels a channel."""
        if not isinstance(value, tuple):
            return _number(value)
        self.arrays.append(
            _Array(f"pixel_{name}", "float", len(value), _listed(torch.tensor(value)))
        )
        return f"pixel_{name}[i / {pixels}]"

    def steps(self, layers: list[tuple[str, nn.Module]], x: Tensor) -> Iterator[str]:
        """Lines of C that lead from work_a, which holds x (1, *shape), to the logits."""
        self.largest = x.numel()
        for name, layer in layers:
            before, x = x, layer(x)
            self.largest = max(self.largest, x.numel())
            if isinstance(layer, nn.Conv2d | nn.Linear):
                yield from self._weighted(name, layer, before, x)
            elif isinstance(layer, nn.MaxPool2d):
                self.kinds.add("pool")
                sizes = [before.shape[1], *before.shape[2:], *x.shape[2:], *_window(layer)]
                yield f"pool(&(pooling){_braced(sizes)}, x, y);"
                yield _SWAP
            elif not isinstance(layer, nn.Flatten):
                yield f"for (int i = 0; i < {x.numel()}; i++) x[i] = {_activation(layer)};"

    def _weighted(
        self, name: str, layer: nn.Conv2d | nn.Linear, before: Tensor, after: Tensor
    ) -> Iterator[str]:
        given, arguments = "x", self._constants(name)
        if self.int8:
            yield f"const float unit_{identifier(name)} = integers(x, work_q, {before.numel()});"
            given, arguments = "work_q", f"{arguments}, unit_{identifier(name)}"
        if isinstance(layer, nn.Linear):
            self.kinds.add("linear")
            call = f"linear({layer.in_features}, {layer.out_features}"
        else:
            self.kinds.add("conv")
            sizes = [*before.shape[1:], *after.shape[1:], *_window(layer)]
            call = f"conv(&(convolution){_braced(sizes)}"
        yield f"{call}, {given}, y, {arguments});"
        yield _SWAP

    def _constants(self, name: str) -> str:
        """Arguments of the call: this network's part of the layer's arrays."""
        weight = self.tensors[f"{name}.weight"].flatten(2)  # (n, out, in)
        bias = self.tensors.get(f"{name}.bias", weight.new_zeros(weight.shape[:2]))
        parts: list[tuple[str, Tensor]] = [("weight", weight), ("bias", bias)]
        if self.int8:
            scale = weight.abs().amax(dim=2) / 127
            scale = torch.where(scale > 0, scale, 1.0)
            integers = (weight / scale[..., None]).round().to(torch.int8)
            parts = [("weight", integers), ("bias", bias), ("scale", scale)]
        arguments = []
        for part, tensor in parts:
            array = f"{part}_{identifier(name)}"
            kind = "int8_t" if tensor.dtype == torch.int8 else "float"
            self.arrays.append(_Array(array, kind, tensor.numel(), _listed(tensor)))
            arguments.append(f"{array} + network * {tensor[0].numel()}")
        return ", ".join(arguments)


_SWAP = "other = x, x = y, y = other;"


def _window(layer: nn.Conv2d | nn.MaxPool2d) -> list[int]:
    """Kernel, stride, padding at top and left, and dilation, each as height and width."""
    if isinstance(layer.padding, str):
        left, _, top, _ = layer._reversed_padding_repeated_twice
        padding: tuple[int, int] = (top, left)
    else:
        padding = _pair(layer.padding)
    return [
        *_pair(layer.kernel_size),
        *_pair(layer.stride),
        *padding,
        *_pair(layer.dilation),
    ]


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    high, wide = value if isinstance(value, tuple) else (value, value)
    return high, wide


def _activation(layer: nn.Module) -> str:
    if isinstance(layer, nn.GELU):
        if layer.approximate == "tanh":
            inner = "0.7978845608f * (x[i] + 0.044715f * x[i] * x[i] * x[i])"
            return f"0.5f * x[i] * (1 + tanhf({inner}))"
        return "0.5f * x[i] * (1 + erff(x[i] * 0.7071067812f))"
    if isinstance(layer, nn.LeakyReLU):
        return f"x[i] > 0 ? x[i] : {_number(layer.negative_slope)} * x[i]"
    return {
        nn.Tanh: "tanhf(x[i])",
        nn.ReLU: "x[i] > 0 ? x[i] : 0",
        nn.SiLU: "x[i] / (1 + expf(-x[i]))",
        nn.Sigmoid: "1 / (1 + expf(-x[i]))",
    }[type(layer)]


def _braced(numbers: list[int]) -> str:
    return "{" + ", ".join(map(str, numbers)) + "}"


def _listed(tensor: Tensor) -> str:
    """The numbers of an array, in lines."""
    flat = tensor.flatten().tolist()
    shown = map(str, flat) if tensor.dtype == torch.int8 else map(_number, flat)
    return textwrap.fill(", ".join(shown), 100, initial_indent="    ", subsequent_indent="    ")


def _number(value: float) -> str:
    """A float of C with nine digits, which name any float of 32 bits."""
    text = f"{value:.9g}"
    return text + ("f" if "." in text or "e" in text else ".0f")


def identifier(name: str) -> str:
    """A name that C allows."""
    plain_name = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return plain_name if plain_name[:1].isalpha() else f"net_{plain_name}".rstrip("_")


def _string(text: str) -> str:
    """A literal of C; all but plain letters, digits and blanks as octal bytes."""
    signs = text.encode("utf-8", "surrogateescape")
    plain_signs = re.compile(rb"[A-Za-z0-9 _.,:+-]")
    shown = (chr(s) if plain_signs.match(bytes([s])) else f"\\{s:03o}" for s in signs)
    return '"' + "".join(shown) + '"'


def _about(batch: WeightBatch) -> str:
    lines = [f"{key}: {json.dumps(value)}" for key, value in batch.provenance.items()]
    return (
        _comment("\n".join(textwrap.shorten(line, 400) for line in lines)) or "   of unknown origin"
    )


def _comment(text: str) -> str:
    """Text that cannot end the comment it stands in."""
    shown = (
        text.encode("ascii", "backslashreplace").decode().replace("*/", "* /").replace("??", "? ?")
    )
    return textwrap.fill(shown, 96, initial_indent="   ", subsequent_indent="   ").strip()


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,  # C, not HTML: `_string` and `_comment` make text from outside harmless
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
