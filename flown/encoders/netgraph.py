"""A network as a graph: neurons are nodes, weights are edges (Kofinas et al. 2403.12143; FLoWN A.2.2).

    y = W x + b      each pair (y_i, x_j) is an edge with feature W_ij, y_i a node with feature b_i
    convolution      a node a channel; the feature is the kernel, zero-padded to the largest, flattened
    y = m * x + b    a norm layer is a linear layer diag(m): y has nodes of its own, one edge each
    y = f(x) + x     the sum has nodes of its own, joined to both terms by edges of the constant 1
    flattening       a unit's node is repeated for each position, channel-major as torch.flatten does

Which number of the weight vector goes to which feature is an index map, read once off the network's
traced graph: from vectors to features is a gather, and back another. Permuting hidden units permutes
nodes and edges and nothing else.

Axes: V nodes, E edges, K numbers of an edge (the largest kernel's).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import batchnorm, conv, instancenorm

from flown.base.errors import FlownError
from flown.encoders.netblocks import Block
from flown.nets import build
from flown.nets.structure.symmetry import Units, Walk, trace
from flown.weights.layout import JointLayout

_NORMS = batchnorm._BatchNorm, instancenorm._InstanceNorm, nn.GroupNorm, nn.LayerNorm


class NetGraph(nn.Module):
    """The graph of a network of D numbers: V nodes, E edges, block by block, K numbers an edge.

    `positions` (V,) says which nodes share a positional embedding: each input and output has its own,
    the hidden units of a layer share one, or one for each position where flattening repeats them.
    `ends` (E, 2) are the edges' targets and sources.
    """

    positions: Tensor
    ends: Tensor
    _biases: Tensor
    _weights: Tensor
    _order: Tensor

    def __init__(
        self, net: nn.Module, example: Tensor, subset: Sequence[str] | None = None
    ) -> None:
        """Reads the graph off a network; of the example (1, ...) only the shape matters.

        Args:
            subset: names of the tensors that the vectors hold; all of the network's are needed.

        Raises:
            FlownError: the network cannot be traced, holds an operation whose effect on units is not
                known, a tensor that has no place in a graph or none in the vectors.
        """
        super().__init__()
        walk = _GraphWalk(net, example)
        shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
        if missing := [name for name in shapes if subset is not None and name not in subset]:
            raise FlownError(
                f"graph: tensor '{missing[0]}' is not among those that vary; a graph connects "
                "layers and needs whole networks: use the encoder 'vae' for subsets"
            )
        self.size = sum(math.prod(shape) for shape in shapes.values())
        maps = _Maps(walk, shapes)
        self.blocks, self.kernel = tuple(maps.blocks), math.prod(maps.kernel)
        self.nodes, self.edges = len(maps.biases), len(maps.weights)
        self.register_buffer("positions", maps.positions, persistent=False)
        self.register_buffer("ends", maps.ends, persistent=False)
        # Numbers D and D + 1 of a padded vector are the constants 0 and 1.
        self.register_buffer("_biases", maps.biases, persistent=False)
        self.register_buffer("_weights", maps.weights, persistent=False)
        self._invert(torch.cat([maps.biases, maps.weights.flatten()]))

    @classmethod
    def of(cls, joint: JointLayout) -> NetGraph:
        """The graph of the largest network of a joint layout; smaller ones are zero beyond theirs.

        Raises:
            FlownError: as the constructor, or the layouts differ in more than channels and classes.
        """
        first = joint.layouts[0]
        architectures = [layout.architecture for layout in joint.layouts]
        channels, classes = (
            max(a.channels for a in architectures),
            max(a.outputs for a in architectures),
        )
        size = max(a.size for a in architectures)
        net = build(first.net, channels, classes, architectures[0].activation, size)
        shapes = dict(zip(first.names, joint.shapes, strict=True))
        for name, p in net.named_parameters():
            if name in shapes and shapes[name] != tuple(p.shape):
                raise FlownError(
                    f"graph: tensor '{name}' of '{first.net}' has {shapes[name]} in this zoo and "
                    f"{tuple(p.shape)} in a network of {channels} channels, {classes} classes; one "
                    "graph serves tasks that differ in these only: fit each task by itself"
                )
        return cls(net, torch.empty(1, channels, size, size, device="meta"), first.names)

    def by_block(self, edges: Tensor) -> list[Tensor]:
        """Edge values (n, E, f) as one (n, A, B, f) a block: views, no copies."""
        parts = edges.split([block.edges for block in self.blocks], dim=1)
        return [part.unflatten(1, b.grid) for part, b in zip(parts, self.blocks, strict=True)]

    def features(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (n, D) to node features (n, V, 1) and edge features (n, E, K)."""
        constants = vectors.new_tensor([0.0, 1.0]).expand(len(vectors), 2)
        padded = torch.cat([vectors, constants], dim=1)
        return padded[:, self._biases, None], padded[:, self._weights]

    def vectors(self, nodes: Tensor, edges: Tensor) -> Tensor:
        """The inverse of `features`: each number is the mean of its copies, padding is dropped."""
        slots = torch.cat([nodes.flatten(1), edges.flatten(1)], dim=1)
        parts = []
        for count in self._counts:
            copies = slots[:, getattr(self, f"_copies{count}")]  # (n, numbers, count)
            first = copies[..., 0]
            # The mean of equal numbers is that number, whatever rounding does to their sum.
            parts.append(first if count == 1 else first + (copies - first[..., None]).mean(-1))
        return torch.cat(parts, dim=1)[:, self._order]

    def _invert(self, numbers: Tensor) -> None:
        """Notes for every number of the vector in which slots it stands; equal counts together."""
        slots = numbers.argsort(stable=True)
        counts = torch.bincount(numbers, minlength=self.size + 2)[: self.size]
        starts = counts.cumsum(0) - counts
        self._counts = counts.unique().tolist()
        order = []
        for count in self._counts:
            numbered = (counts == count).nonzero()[:, 0]
            copies = slots[starts[numbered, None] + torch.arange(count)]
            self.register_buffer(f"_copies{count}", copies, persistent=False)
            order.append(numbered)
        self.register_buffer("_order", torch.cat(order).argsort(), persistent=False)


@dataclass(frozen=True)
class _Connection:
    layer: str
    source: Units
    target: int  # a space, as in `Units`
    diagonal: bool


class _GraphWalk(Walk):
    """Follows units through a network, the inputs' too, and notes which units each layer connects."""

    remedy = "such a network has no graph: use another encoder"

    def __init__(self, net: nn.Module, example: Tensor) -> None:
        super().__init__(*trace(net, example))
        self.connections: list[_Connection] = []
        self.inputs: set[int] = set()
        self.outputs: list[Units] = []
        for node in self.graph.nodes:
            self.visit(node)

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.inputs.add(self._space(node, 1))
        elif node.op == "output":
            self.outputs = [self.units[n] for n in node.all_input_nodes if n in self.units]
        else:
            super().visit(node)

    def _layer(self, node: fx.Node, parent: fx.Node, at: int, out: int) -> None:
        self._connect(node, parent, at, out, diagonal=False)

    def _convolve(self, node: fx.Node, parent: fx.Node, module: conv._ConvNd) -> None:
        if module.groups == 1:
            return super()._convolve(node, parent, module)
        if not module.groups == module.in_channels == module.out_channels:
            raise self._refusal(node, "groups its channels; only one channel a group is supported")
        at = len(self.shapes[node]) - 1 - len(module.kernel_size)
        self._connect(node, parent, at, at, diagonal=True)

    def _scale(self, node: fx.Node, parent: fx.Node, at: int, tensors: dict[str, int]) -> None:
        module = self.modules[str(node.target)]
        weight = getattr(module, "weight", None)
        if isinstance(module, _NORMS) and isinstance(weight, Tensor) and weight.ndim == 1:
            self._connect(node, parent, at, at, diagonal=True)
        else:
            self._pass(node, parent, odd=False)

    def _combine(self, node: fx.Node, product: bool) -> None:
        both = [a for a in node.args[:2] if isinstance(a, fx.Node) and a in self.shapes]
        if len(both) == 1:
            return super()._combine(node, product)
        if product or "sub" in str(node.target) or both[0] is both[1]:
            raise self._refusal(node, "is not a sum of two values")
        for parent in both:
            if parent not in self.units or self.shapes[parent] != self.shapes[node]:
                raise self._refusal(node, "adds values whose units do not correspond")
        axis = self.units[both[0]].axis
        space = self._space(node, axis)
        self.connections += [_Connection("", self.units[parent], space, True) for parent in both]

    def _connect(self, node: fx.Node, parent: fx.Node, at: int, out: int, diagonal: bool) -> None:
        units = self.units.get(parent)
        if units is None or units.axis != at:
            raise self._refusal(node, "reads along another axis than that of the units")
        self.connections.append(
            _Connection(str(node.target), units, self._space(node, out), diagonal)
        )

    def _space(self, node: fx.Node, axis: int) -> int:
        """Gives a value new units along an axis."""
        self.parents.append(len(self.parents))
        self.sizes.append(self.shapes[node][axis])
        self.units[node] = Units(len(self.sizes) - 1, axis, 1)
        return len(self.sizes) - 1


class _Maps:
    """Lays out nodes and edges, and says which number of the vector goes where."""

    def __init__(self, walk: _GraphWalk, shapes: dict[str, tuple[int, ...]]) -> None:
        self.walk, self.shapes = walk, shapes
        self.numbers: dict[str, Tensor] = {}
        self.size = 0
        for name, shape in shapes.items():
            grid = torch.arange(self.size, self.size + math.prod(shape)).reshape(shape)
            self.numbers[name], self.size = grid, self.size + math.prod(shape)
        kernels = [(1,), *(shape[2:] for shape in shapes.values() if len(shape) > 2)]
        rank = max(map(len, kernels))
        self.kernel = tuple(
            map(max, zip(*((1,) * (rank - len(k)) + k for k in kernels), strict=True))
        )
        self.copies = self._copies()
        extents = [s * c for s, c in zip(walk.sizes, self.copies, strict=True)]
        stops = torch.tensor(extents).cumsum(0).tolist()
        self.places = [slice(b - e, b) for b, e in zip(stops, extents, strict=True)]
        self.biases = torch.full((stops[-1],), self.size)
        self.positions = self._positions()
        made = [self._block(connection) for connection in walk.connections]
        self.blocks = [block for block, _, _ in made]
        self.weights = torch.cat([weights for _, weights, _ in made])
        self.ends = torch.cat([ends for _, _, ends in made])
        self._check()

    def _copies(self) -> list[int]:
        """How often flattening repeats each space's units: as often as it is read."""
        copies: list[int] = [1] * len(self.walk.sizes)
        reads = [(connection.layer, connection.source) for connection in self.walk.connections]
        reads += [("output", units) for units in self.walk.outputs]
        for _, units in reads:
            copies[units.space] = max(copies[units.space], units.inner)
        for layer, units in reads:
            if units.inner != copies[units.space]:
                raise FlownError(
                    f"graph: layer '{layer}' and another read the same units, one position by "
                    "position; only one of the two has a graph: use another encoder"
                )
        return copies

    def _positions(self) -> Tensor:
        outputs = {units.space for units in self.walk.outputs}
        found, count = [], 0
        for space, place in enumerate(self.places):
            extent, copies = place.stop - place.start, self.copies[space]
            distinct = extent if space in self.walk.inputs | outputs else copies
            found.append(count + torch.arange(extent) % distinct)
            count += distinct
        return torch.cat(found)

    def _block(self, connection: _Connection) -> tuple[Block, Tensor, Tensor]:
        """A layer's block, its numbers (edges, K) and its edges' ends (edges, 2)."""
        copies = self.copies[connection.target]
        targets, sources = self.places[connection.target], self.places[connection.source.space]
        count = sources.stop - sources.start
        block = Block.of(connection.layer, targets, sources, connection.diagonal)
        weight = self.numbers.get(f"{connection.layer}.weight")
        if weight is None:  # a sum
            numbers = torch.full((count, 1), self.size + 1)
        elif connection.diagonal:
            numbers = weight.reshape(count, 1, *weight.shape[2:])
        else:
            numbers = weight
        features = self._pad(numbers).repeat_interleave(copies, dim=1 if connection.diagonal else 0)
        bias = self.numbers.get(f"{connection.layer}.bias")
        if bias is not None:
            self.biases[targets] = bias.repeat_interleave(copies)
        nodes = torch.arange(len(self.biases))[None]
        ends = [
            end.of(nodes)[0].expand(block.grid).flatten() for end in (block.target, block.source)
        ]
        pairs = torch.stack(ends, dim=1)
        return block, features.reshape(block.edges, -1), pairs

    def _pad(self, numbers: Tensor) -> Tensor:
        """Numbers (A, B, *kernel) of a layer, its kernels amid the largest one: (A, B, K)."""
        kernel = (1,) * (len(self.kernel) - numbers.ndim + 2) + tuple(numbers.shape[2:])
        padded = torch.full((*numbers.shape[:2], *self.kernel), self.size)
        window = [
            slice((k - o) // 2, (k - o) // 2 + o) for k, o in zip(self.kernel, kernel, strict=True)
        ]
        padded[(slice(None), slice(None), *window)] = numbers.reshape(*numbers.shape[:2], *kernel)
        return padded.flatten(2)

    def _check(self) -> None:
        placed = torch.zeros(self.size + 2, dtype=torch.bool)
        placed[self.weights] = placed[self.biases] = True
        for name, numbers in self.numbers.items():
            if not placed[numbers].all():
                raise FlownError(
                    f"graph: tensor '{name}' has no place in a graph; use another encoder"
                )
