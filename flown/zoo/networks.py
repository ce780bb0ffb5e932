"""Checkpoints of a zoo as scaled vectors of its joint space, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flown.weights.layout import JointLayout
from flown.weights.scale import NetworkScale
from flown.zoo.store import Zoo

HELD = 1 << 27  # numbers (512 MB) up to which a population is held in memory
_BLOCK = 1024  # networks read at a time


class Networks:
    """Some checkpoints of a zoo; `networks[rows]` are their scaled vectors (b, D + 2 T).

    `layouts` (n,) and `tasks` (n,) are each network's place among the joint space's layouts and the
    zoo's tasks. Up to `HELD` numbers are read once and kept in memory. A larger zoo stays on the
    disk; every reading is checked again.
    """

    def __init__(self, zoo: Zoo, joint: JointLayout, places: Sequence[int]) -> None:
        self.zoo, self.joint, self.places = zoo, joint, list(places)
        index = {task: i for i, task in enumerate(zoo.tasks)}
        rows = [zoo.rows[i] for i in self.places]
        self.tasks = torch.tensor([index[row.task] for row in rows], dtype=torch.int64)
        self.layouts = torch.tensor([row.layout for row in rows], dtype=torch.int64)
        self.scale = NetworkScale(joint)
        self.held: Tensor | None = None
        if len(self) * joint.size <= HELD:
            self.held = torch.cat([vectors for vectors, _ in self.blocks()] or [torch.empty(0)])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Scaled vectors (b, D + 2 T) of the networks `rows` (b,)."""
        return self.scale(self.raw(rows), self.layouts[rows])  # type: ignore[no-any-return]

    def raw(self, rows: Tensor) -> Tensor:
        """Vectors (b, D) of the joint space as they are stored.

        Raises:
            FlownError: a checkpoint is damaged, or holds NaN or Inf (named).
        """
        if self.held is not None:
            return self.held[rows]
        vectors = torch.empty(len(rows), self.joint.size)
        for layout in self.layouts[rows].unique().tolist():
            chosen = (self.layouts[rows] == layout).nonzero().flatten()
            found = self.zoo.read([self.places[i] for i in rows[chosen].tolist()])
            vectors[chosen] = self.joint.embed(found, layout)
        return vectors

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All networks as stored, in turn: vectors (b, D) and layouts (b,)."""
        for rows in torch.arange(len(self)).split(_BLOCK):
            yield self.raw(rows), self.layouts[rows]
