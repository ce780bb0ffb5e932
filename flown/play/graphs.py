"""An any-task generator as four ONNX graphs, for the browser.

    see      images, members          -> class tokens, shares of the base networks
    end      x_t, t, class tokens     -> x_1 that x_t leads to
    write    x, shares, images        -> features of the images, what a head needs, layers
    compute  images, layers           -> features of other images

Images are (K, 3, 32, 32) in units of the support set, members (K, C) are 0 or 1. A head is the solution
of linear equations, for which ONNX has no operation: `page/heads.js` has it. The graphs hold no weights:
they point into the model's own `generator.safetensors`, in half precision.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from flown.anytask.model import AnyTask
from flown.anytask.writer import Writer
from flown.base.errors import FlownError
from flown.base.files import replacing, write_json

NET = "conv4-32"  # what the page writes
GRAPHS = ("see", "end", "write", "compute")
SIZES = "page.json"
WEIGHTS = "generator.safetensors"
_OPSET = 18


class See(nn.Module):
    """What the trunk sees of one support set."""

    def __init__(self, model: AnyTask) -> None:
        super().__init__()
        self.trunk = model.trunk

    def forward(self, images: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens (1, C, width) and shares (1, E)."""
        return self.trunk.tokens(images[None], members[None]), self.trunk.shares(images[None])


class End(nn.Module):
    """The end point of one network's latents."""

    def __init__(self, model: AnyTask, writer: Writer) -> None:
        super().__init__()
        self.trunk, self.writer = model.trunk, writer

    def forward(self, x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """x_1 (1, N + C, m)."""
        found: Tensor = self.trunk(x, t, self.writer.neurons, classes)
        return found


class Write(nn.Module):
    """One network's layers but the last, and what its head is computed from."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self.writer = writer

    def forward(self, x: Tensor, shares: Tensor, images: Tensor) -> tuple[Tensor, ...]:
        """Features (K, F), shrink and scale (1, 1), correction (C, F + 1), layers by order."""
        count = len(self.writer.neurons)
        neurons, classes = x[:, :count], x[:, count:]
        body, features = self.writer.write_body(neurons, shares, images)
        shrink, scale = self.writer.shrink_and_scale(classes, shares)
        head = (features, shrink, scale, self.writer.correction(classes))
        return tuple(part[0] for part in (*head, *body.values()))


class Compute(nn.Module):
    """What the layers of one network compute."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self.body = writer.bodies[3]
        self.names = [name for name, _ in self.body.named_parameters()]

    def forward(self, images: Tensor, *layers: Tensor) -> Tensor:
        """Features (Q, F)."""
        tensors = dict(zip(self.names, layers, strict=True))
        found: Tensor = torch.func.functional_call(self.body, tensors, (images,))
        return found


def write_graphs(folder: Path | str, out: Path | str) -> None:
    """Writes the graphs of a model's folder, and `page.json` with what the page must know.

    Raises:
        FlownError: no any-task generator, one that does not write `NET`, or onnx is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch asks for it late, with a long message
    except ImportError:
        raise FlownError(
            "the page needs onnx and onnxscript: pip install 'flown[export]'"
        ) from None
    folder, out = Path(folder), Path(out)
    model = AnyTask.from_pretrained(folder)
    writer, places = model.writer(NET), _places(folder / WEIGHTS)
    sizes = {
        "format": "flown-page-1",
        "weights": digest(folder),
        "neurons": len(writer.neurons),
        "numbers": model.config.numbers,
        "width": model.config.width,
        "features": writer.features,
        "views": model.config.views,
        "ways": model.config.tasks.ways,
        "layers": _layers(writer),
    }
    write_json(out / SIZES, sizes)
    for name, exported in _exported(model, writer).items():
        graph = _point(onnx, exported, places)
        with replacing(out / f"{name}.onnx") as scratch:
            scratch.write_bytes(graph.SerializeToString(deterministic=True))


def digest(folder: Path) -> str:
    """Which weights the folder of a model holds: the SHA-256 of their file."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def _layers(writer: Writer) -> list[str]:
    return [f"{name}.{part}" for name in writer.names for part in ("weight", "bias")]


def _exported(model: AnyTask, writer: Writer) -> dict[str, Any]:
    count, numbers, width = len(writer.neurons), model.config.numbers, model.config.width
    images, classes, queries = Dim("K"), Dim("C", min=2, max=model.config.tasks.ways), Dim("Q")
    x, seen, shares = (
        torch.randn(1, count + 3, numbers),
        torch.randn(7, 3, 32, 32),
        torch.ones(1, 2),
    )
    tokens, names = count + classes, _layers(writer)
    body, _ = writer.write_body(x[:, :count], shares / 2, seen)
    layers = tuple(tensor[0] for tensor in body.values())
    head = ["features", "shrink", "scale", "correction"]
    made: dict[str, tuple[nn.Module, tuple[Any, ...], tuple[Any, ...], list[str], list[str]]] = {
        "see": (
            See(model),
            (seen, torch.rand(7, 3)),
            ({0: images}, {0: images, 1: classes}),
            ["images", "members"],
            ["classes", "shares"],
        ),
        "end": (
            End(model, writer),
            (x, torch.zeros(1), torch.randn(1, 3, width)),
            ({1: tokens}, {}, {1: classes}),
            ["x", "t", "classes"],
            ["end"],
        ),
        "write": (
            Write(writer),
            (x, shares / 2, seen),
            ({1: tokens}, {}, {0: images}),
            ["x", "shares", "images"],
            [*head, *names],
        ),
        "compute": (
            Compute(writer),
            (seen, *layers),
            ({0: queries}, tuple({} for _ in layers)),
            ["images", *names],
            ["features"],
        ),
    }
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    found = {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for name, (module, given, free, inputs, outputs) in made.items():
            # What is not optimised keeps the names of weights.
            program = torch.onnx.export(
                module.eval(),
                given,
                dynamo=True,
                dynamic_shapes=free,
                opset_version=_OPSET,
                input_names=inputs,
                output_names=outputs,
                optimize=False,
                verbose=False,
            )
            assert program is not None
            found[name] = program.model_proto
    return found


def _places(file: Path) -> dict[str, tuple[int, int]]:
    """Where the bytes of each tensor lie in a safetensors file, from and to."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    if whole := [name for name, entry in header.items() if entry["dtype"] != "F16"]:
        raise FlownError(f"{file}: {whole[0]} is not in half precision")
    start = 8 + size
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in header.items()
    }


def _point(onnx: Any, graph: Any, places: dict[str, tuple[int, int]]) -> Any:
    """The graph, made small, with weights that are read from the model's file.

    What is folded into constants would be a copy of weights, so that weights are inputs meanwhile.
    """
    from onnxscript.optimizer import optimize

    helper, float32, half = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    del graph.graph.initializer[:]
    own = len(graph.graph.input)
    graph.graph.input.extend(
        helper.make_tensor_value_info(name, float32, shape) for name, shape in weights.items()
    )
    graph = optimize(graph)
    del graph.graph.input[own:]
    casts = []
    for name, shape in weights.items():
        start, end = places[name.replace("writer.", f"writers.{NET}.")]
        tensor = graph.graph.initializer.add(name=f"{name}.half", data_type=half, dims=shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": WEIGHTS, "offset": start, "length": end - start}.items():
            tensor.external_data.add(key=key, value=str(value))
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=float32))
    nodes = [*casts, *graph.graph.node]
    values = [*graph.graph.input, *graph.graph.output, *graph.graph.initializer]
    short = {value.name: value.name for value in values}
    for node in nodes:
        node.ClearField("name")
        del node.metadata_props[:]
        for names in (node.input, node.output):
            names[:] = [name and short.setdefault(name, f"v{len(short)}") for name in names]
    del graph.graph.node[:], graph.graph.metadata_props[:]
    graph.graph.node.extend(nodes)
    graph.graph.ClearField("value_info")
    return graph
