"""Checkpoints of a zoo as standardised vectors of its joint space, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flown.weights.layout import JointLayout, Standardizer
from flown.zoo.store import Zoo

HELD = 1 << 27  # numbers (512 MB) up to which a population is held in memory
_BLOCK = 1024  # networks read at a time


class Networks:
    """Some checkpoints of a zoo; `networks[rows]` are their standardised vectors (b, D).

    Up to `HELD` numbers are read once and held; of a larger population only what is asked for ever
    is in memory, and every reading is checked again.
    """

    def __init__(self, zoo: Zoo, joint: JointLayout, places: Sequence[int]) -> None:
        self.zoo, self.joint, self.places = zoo, joint, list(places)
        index = {layout.task.name: i for i, layout in enumerate(joint.layouts)}
        self.tasks = torch.tensor([index[zoo.rows[i].task] for i in self.places], dtype=torch.int64)
        self.standardizer = Standardizer(joint)
        self.held: Tensor | None = None
        if len(self) * joint.size <= HELD:
            self.held = torch.cat([vectors for vectors, _ in self.blocks()] or [torch.empty(0)])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Standardised vectors (b, D) of the networks `rows` (b,)."""
        return self.standardizer(self.raw(rows), self.tasks[rows])  # type: ignore[no-any-return]

    def raw(self, rows: Tensor) -> Tensor:
        """Vectors (b, D) of the joint space as they are stored.

        Raises:
            FlownError: a checkpoint is damaged, or holds NaN or Inf (named).
        """
        if self.held is not None:
            return self.held[rows]
        vectors = torch.empty(len(rows), self.joint.size)
        for task in self.tasks[rows].unique().tolist():
            some = (self.tasks[rows] == task).nonzero().flatten()
            found = self.zoo.read([self.places[i] for i in rows[some].tolist()])
            vectors[some] = self.joint.embed(found, task)
        return vectors

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All networks as stored, in turn: vectors (b, D) and task indices (b,)."""
        for rows in torch.arange(len(self)).split(_BLOCK):
            yield self.raw(rows), self.tasks[rows]
