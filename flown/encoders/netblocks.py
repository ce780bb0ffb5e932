"""The edges of a network's graph, layer by layer: a grid, and the nodes at its two ends.

All pairs of a layer's outputs and inputs lie in a grid (A, B), so that node values reach
their edges by broadcasting, and edges reach their nodes by a sum over an axis: no gather, no scatter.

Axes: n networks, V nodes, h heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class End:
    """The nodes `place` at one end of a block's edges; the grid's axes `axes` run over them."""

    place: slice
    axes: str
    grid: tuple[int, int]

    def of(self, nodes: Tensor) -> Tensor:
        """Node values (n, V, ...) at each edge, broadcasting over its grid (n, A, B, ...)."""
        values = nodes[:, self.place]
        if self.axes == "ab":
            values = values.unflatten(1, self.grid)
        elif self.axes == "a":
            values = values[:, :, None]
        else:
            values = values[:, None]
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Edge values (n, A, B, ...) summed for each node, (n, nodes, ...)."""
        return (
            values.flatten(1, 2) if self.axes == "ab" else values.sum(2 if self.axes == "a" else 1)
        )

    def dot(self, nodes: Tensor, edges: Tensor) -> Tensor:
        """Node values (n, V, h, f) times edge values (n, A, B, f), summed over f: (n, A, B, h)."""
        values = nodes[:, self.place]
        if self.axes == "ab":
            values = values.unflatten(1, self.grid)
        return torch.einsum(f"n{self.axes}hf,nabf->nabh", values, edges)

    def sum_products(self, a: Tensor, b: Tensor) -> Tensor:
        """Edge values (n, A, B, h) times (n, A, B, f), summed for each node: (n, nodes, h, f)."""
        products = torch.einsum(f"nabh,nabf->n{self.axes}hf", a, b)
        return products.flatten(1, 2) if self.axes == "ab" else products


@dataclass(frozen=True)
class Block:
    """Edges from nodes to nodes, laid out as a grid (A, B).

    All pairs: A targets, B sources. Diagonal: A sources, each with B targets beside each other (more
    than one where the targets' units are repeated).
    """

    layer: str  # the module's name, empty for a sum
    target: End
    source: End
    grid: tuple[int, int]

    @classmethod
    def of(cls, layer: str, targets: slice, sources: slice, diagonal: bool) -> Block:
        t, s = targets.stop - targets.start, sources.stop - sources.start
        grid = (s, t // s) if diagonal else (t, s)
        ends = ("ab", "a") if diagonal else ("a", "b")
        return cls(layer, End(targets, ends[0], grid), End(sources, ends[1], grid), grid)

    @property
    def edges(self) -> int:
        return self.grid[0] * self.grid[1]
