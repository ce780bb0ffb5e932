"""A batch of networks of one layout: n weight vectors, their file, and running them all at once.

File: one safetensors file, `(n, *shape)` per tensor under its state_dict name; the header's
metadata holds the layout (`layout`) and where the weights come from (`provenance`), both JSON. Where
networks have them, `rest/<name>` holds a tensor they share, `(*shape)`, and `buffers/<name>`
BatchNorm statistics of their own, `(n, *shape)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flown.base.config import check_plain
from flown.base.errors import FlownError
from flown.base.files import check_finite, load_tensors, parse_json, save_tensors
from flown.nets.batched import batchnorm, stacked
from flown.tasks.task import Task
from flown.weights import construction
from flown.weights.layout import WeightLayout

FORMAT = "flown-weights-2"


class WeightBatch:
    """n networks of one layout as one tensor of weight vectors (n, D).

    Args:
        vectors: (n, D).
        frozen: what the layout leaves out and all networks share, by state_dict name, `(*shape)`:
            frozen parameters, and buffers that a fresh network does not have.
        buffers: BatchNorm statistics of each network's own, `(n, *shape)`; see `calibrated`.
        task: what the networks are for, where they are for one thing and it is known.
    """

    def __init__(
        self,
        layout: WeightLayout,
        vectors: Tensor,
        provenance: Mapping[str, Any] | None = None,
        frozen: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        task: Task | None = None,
    ) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != layout.size:
            got = tuple(vectors.shape)
            raise FlownError(f"{layout.net}: expected weights (n, {layout.size}), got {got}")
        self.layout = layout
        self.vectors = vectors
        self.provenance = dict(provenance or {})
        self.task = task
        self.frozen = {name: tensor.to(vectors.device) for name, tensor in (frozen or {}).items()}
        self.buffers = {k: tensor.to(vectors.device) for k, tensor in (buffers or {}).items()}

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: slice | list[int] | Tensor) -> WeightBatch:
        buffers = {name: tensor[rows] for name, tensor in self.buffers.items()}
        return self._like(self.vectors[rows], self.frozen, buffers)

    def __repr__(self) -> str:
        return f"WeightBatch({len(self)} x {self.name}, D={self.layout.size})"

    def _like(
        self, vectors: Tensor, frozen: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> WeightBatch:
        return WeightBatch(self.layout, vectors, self.provenance, frozen, buffers, self.task)

    @property
    def name(self) -> str:
        """What messages call the networks: `cnn-small for mnist`."""
        return self.layout.net + (f" for {self.task.id}" if self.task else "")

    @cached_property
    def network(self) -> nn.Module:
        """The network these weights are for, in eval mode, with weights that mean nothing."""
        return self.layout.architecture.build().eval().to(self.vectors.device)

    def _check_parameters(self) -> None:
        known = {*self.layout.names, *self.frozen}
        missing = [name for name, _ in self.network.named_parameters() if name not in known]
        if missing:
            raise FlownError(
                f"{self.name}: a subset of the network, {len(missing)} of its tensors "
                f"('{missing[0]}', ...) are missing; pass the frozen rest: "
                "WeightBatch(..., frozen=zoo.frozen(task))"
            )

    @cached_property
    def _constants(self) -> dict[str, Tensor]:
        """Buffers that the architecture alone decides; raises where anything else is unknown."""
        self._check_parameters()
        known = {*self.frozen, *self.buffers}
        for name in sorted(construction.drawn(self.layout.architecture) - known):
            raise FlownError(
                f"{self.name}: its constructor draws buffer "
                f"'{name}' at random, and these networks' is not known; pass it: "
                "WeightBatch(..., frozen={name: buffer})"
            )
        for name in batchnorm.layers(self.network):
            if f"{name}.running_mean" not in known:
                raise FlownError(
                    f"{self.name}: the statistics of BatchNorm layer '{name}' are not known; use "
                    ".calibrated(training images)"
                )
        kept = self.network.state_dict()
        buffers = self.network.named_buffers(remove_duplicate=False)
        return {k: v for k, v in buffers if k in kept and k not in known}

    def preprocess(self, images: Tensor) -> Tensor:
        """The networks' input (N, channels, size, size) from uint8 images (N, c, H, W)."""
        return self.layout.architecture.preprocess(images)

    def on(self, vectors: Tensor) -> WeightBatch:
        """Other networks (m, D) of the same layout on the same frozen rest."""
        return WeightBatch(self.layout, vectors, frozen=self.frozen, task=self.task)

    def bare(self) -> WeightBatch:
        """The same networks without the BatchNorm statistics that depend on their weights."""
        if not batchnorm.layers(self.network):
            return self
        shape = self.layout.architecture.input_shape
        images = torch.zeros(2, *shape, device=self.vectors.device)
        own = batchnorm.influenced(self.network, self.layout.names, images)
        frozen = {name: tensor for name, tensor in self.frozen.items() if name not in own}
        return self._like(self.vectors, frozen, {})

    def state_dict(self, i: int) -> dict[str, Tensor]:
        """The i-th network's state dict; a copy.

        Raises:
            FlownError: the frozen rest, BatchNorm statistics or a buffer that the constructor draws
                at random are missing.
        """
        own = self.layout.unpack(self.vectors[i][None])
        tensors = self._constants | self.frozen | {name: tensor[0] for name, tensor in own.items()}
        tensors |= {name: tensor[i] for name, tensor in self.buffers.items()}
        for name, first in construction.second_names(self.network).items():
            tensors[name] = tensors[first]  # of one weight under two names
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def module(self, i: int) -> nn.Module:
        """The i-th network as an `nn.Module` in eval mode.

        Its input are images as `preprocess` makes them.

        Raises:
            FlownError: as `state_dict`.
        """
        net = self.layout.architecture.build()
        net.load_state_dict(self.state_dict(i))
        return net.eval().to(self.vectors.device)

    def logits(self, images: Tensor) -> Tensor:
        """Logits (n, B, C) of all networks for preprocessed images (B, c, H, W).

        Raises:
            FlownError: as `state_dict`.
        """
        _ = self._constants  # whatever is missing is named
        own = self.layout.unpack(self.vectors) | self.buffers
        return stacked.forward(self.network, own, images, self.frozen)

    def calibrated(
        self, images: Tensor, batches: int = 50, batch_size: int = 64, seed: int = 0
    ) -> WeightBatch:
        """The same networks with BatchNorm statistics estimated anew; unchanged without BatchNorm.

        Statistics that generated weights have no influence on are the same in all networks and
        become part of `frozen`.

        Args:
            images: uint8 (N, c, H, W) *training* images; labels are not needed, test images must
                never be among them.
            batches: how many random batches the statistics are the mean of.

        Raises:
            FlownError: the frozen rest is missing, or too few images.
        """
        if not len(self) or not batchnorm.layers(self.network):
            return self
        self._check_parameters()
        architecture, device = self.layout.architecture, self.vectors.device
        chosen = batchnorm.draw(images, batches, batch_size, seed)
        own, shared = batchnorm.statistics(
            self.network,
            self.layout.unpack(self.vectors),
            self.frozen,
            (architecture.preprocess(some.to(device)) for some in chosen),
        )
        frozen = {name: tensor for name, tensor in self.frozen.items() if name not in own}
        return self._like(self.vectors, frozen | shared, own)

    def save(self, path: Path | str) -> None:
        """Writes the safetensors file whole.

        Raises:
            FlownError: a weight is NaN or Inf, or the file cannot be written.
        """
        tensors = self.layout.unpack(self.vectors)
        tensors |= {f"rest/{name}": tensor for name, tensor in self.frozen.items()}
        tensors |= {f"buffers/{name}": tensor for name, tensor in self.buffers.items()}
        check_finite(tensors, path)
        metadata = {
            "format": FORMAT,
            "layout": self.layout.model_dump_json(),
            "provenance": json.dumps(self.provenance),
        } | ({"task": self.task.model_dump_json()} if self.task else {})
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path | str) -> WeightBatch:
        """Reads what `save` wrote.

        Raises:
            FlownError: missing, truncated or foreign file, other tensors than the layout's, NaN.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") == "flown-weights-1":
            raise FlownError(f"{path}: written by flown 0.1, which 0.2 cannot read; make it again")
        if metadata.get("format") != FORMAT:
            raise FlownError(f"{path}: a safetensors file without flown's layout in its header")
        layout = WeightLayout.parse(_parsed(metadata, "layout", path), where=str(path))
        check_finite(tensors, path)
        parts: dict[str, dict[str, Tensor]] = {"": {}, "rest": {}, "buffers": {}}
        for name, tensor in tensors.items():
            part, _, own = name.partition("/")
            if part in parts:
                parts[part][own] = tensor
            else:
                parts[""][name] = tensor
        try:
            vectors = layout.pack(parts[""])
        except FlownError as error:
            raise FlownError(f"{path}: {error}") from None
        provenance = _parsed(metadata, "provenance", path)
        task = None
        if "task" in metadata:
            task = Task.parse(_parsed(metadata, "task", path), where=str(path))
        return cls(layout, vectors, provenance, parts["rest"], parts["buffers"], task)

    def to_onnx(self, path: Path | str) -> None:
        """Writes all networks as one ONNX graph, uint8 images (N, c, H, W) to mean probabilities (N, C).

        Raises:
            FlownError: as `flown.weights.export.onnx.write_onnx`.
        """
        from flown.weights.export.onnx import write_onnx

        write_onnx(self, path)

    def to(self, device: torch.device | str) -> WeightBatch:
        """The same networks on another device."""
        return self._like(self.vectors.to(device), self.frozen, self.buffers)


def _parsed(metadata: Mapping[str, str], key: str, path: Path | str) -> dict[str, Any]:
    """An entry of a header that is a JSON object; empty where there is none."""
    found = parse_json(metadata.get(key, "{}"), f"{path}: {key}")
    if not isinstance(found, dict):
        raise FlownError(f"{path}: {key}: expected an object, got {type(found).__name__}")
    check_plain(found, f"{path}: {key}")
    return found
