"""One shard of a zoo, mapped into memory: a row is read from the disk when it is asked for."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from flown.base.errors import FlownError
from flown.base.files import load_tensors
from flown.weights.layout import WeightLayout


class Mapped:
    """The tensors of a shard, `(rows, *shape)` each, as they lie on the disk."""

    def __init__(self, path: Path, layout: WeightLayout) -> None:
        tensors, _ = load_tensors(path)  # safetensors maps the file, nothing is read yet
        try:
            layout.check(tensors)
        except FlownError as error:
            raise FlownError(f"{path}: {error}") from None
        self.path, self.layout, self.tensors = path, layout, tensors
        self.rows = len(tensors[layout.names[0]])
        if any(len(tensor) != self.rows for tensor in tensors.values()):
            raise FlownError(f"{path}: its tensors have different numbers of rows")

    def read(self, offsets: Tensor) -> Tensor:
        """Weight vectors (n, D) in float32 of the rows at `offsets` (n,)."""
        if int(offsets.max()) >= self.rows or int(offsets.min()) < 0:
            raise FlownError(f"{self.path}: has {self.rows} rows, the index asks for more")
        return self.layout.pack(
            {name: tensor[offsets].float() for name, tensor in self.tensors.items()}
        )
