"""A batch of networks of one layout: n weight vectors, their file, and running them all at once.

File: one safetensors file, `(n, *shape)` per tensor under its state_dict name; the header's
metadata holds the layout (`layout`) and where the weights come from (`provenance`), both JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flown import nets
from flown.errors import FlownError
from flown.files import check_finite, load_tensors, save_tensors
from flown.layout import WeightLayout
from flown.nets import stacked


class WeightBatch:
    """n networks of one layout as one tensor of weight vectors (n, D)."""

    def __init__(
        self, layout: WeightLayout, vectors: Tensor, provenance: Mapping[str, Any] | None = None
    ) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != layout.size:
            got = tuple(vectors.shape)
            raise FlownError(f"{layout.net}: expected weights (n, {layout.size}), got {got}")
        self.layout = layout
        self.vectors = vectors
        self.provenance = dict(provenance or {})

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: slice | list[int] | Tensor) -> WeightBatch:
        return WeightBatch(self.layout, self.vectors[rows], self.provenance)

    def __repr__(self) -> str:
        task = self.layout.task.name
        return f"WeightBatch({len(self)} x {self.layout.net} for {task}, D={self.layout.size})"

    @cached_property
    def architecture(self) -> nn.Module:
        """The network these weights are for, with weights of its own that mean nothing."""
        return nets.build_for(self.layout)

    def state_dict(self, i: int) -> dict[str, Tensor]:
        """The i-th network's state dict; a copy."""
        tensors = self.layout.unpack(self.vectors[i][None])
        return {name: tensor[0].clone() for name, tensor in tensors.items()}

    def module(self, i: int) -> nn.Module:
        """The i-th network as an `nn.Module` in eval mode, for `layout.task.preprocess`ed images."""
        net = nets.build_for(self.layout)
        net.load_state_dict(self.state_dict(i))
        return net.eval().to(self.vectors.device)

    def logits(self, images: Tensor) -> Tensor:
        """Logits (n, B, C) of all networks for preprocessed images (B, c, H, W)."""
        return stacked.forward(self.architecture, self.layout.unpack(self.vectors), images)

    def save(self, path: Path | str) -> None:
        """Writes the safetensors file whole.

        Raises:
            FlownError: a weight is NaN or Inf, or the file cannot be written.
        """
        tensors = self.layout.unpack(self.vectors)
        check_finite(tensors, path)
        metadata = {
            "format": "flown-weights-1",
            "layout": self.layout.model_dump_json(),
            "provenance": json.dumps(self.provenance),
        }
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path | str) -> WeightBatch:
        """Reads what `save` wrote.

        Raises:
            FlownError: missing, truncated or foreign file, other tensors than the layout's, NaN.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != "flown-weights-1":
            raise FlownError(f"{path}: a safetensors file without flown's layout in its header")
        layout = WeightLayout.parse(json.loads(metadata["layout"]), where=str(path))
        check_finite(tensors, path)
        try:
            vectors = layout.pack(tensors)
        except FlownError as error:
            raise FlownError(f"{path}: {error}") from None
        return cls(layout, vectors, json.loads(metadata.get("provenance", "{}")))

    def to(self, device: torch.device | str) -> WeightBatch:
        """The same networks on another device."""
        return WeightBatch(self.layout, self.vectors.to(device), self.provenance)
