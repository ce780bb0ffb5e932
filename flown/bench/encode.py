"""Relational layers on the existing edges, against a dense transformer over all pairs of nodes."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flown import encoders
from flown.base.provenance import Row
from flown.base.seeding import seeded
from flown.bench.timing import medians, timed_rows
from flown.encoders import GraphConfig, GraphEncoder
from flown.encoders.graph import in_groups, run
from flown.encoders.netgraph import NetGraph
from flown.encoders.relational import EdgeUpdate, RelationalAttention, RelationalLayer
from flown.nets import INPUT_SIZES
from flown.nets.architecture import Architecture
from flown.weights.layout import JointLayout, WeightLayout

NET, BATCH = "cnn-medium", 32


def dense(layers: list[RelationalLayer], graph: NetGraph, nodes: Tensor, edges: Tensor) -> Tensor:
    """The same layers as tensors of all pairs, (n, V, V, ...), as Kofinas et al. compute them.

    Queries, keys and values are made for every pair, (n, V, V, h, c), from the states of their edge
    and of its reverse, concatenated; without an edge they are zero.
    """
    target, source = graph.ends.unbind(1)
    size = (len(nodes), graph.nodes, graph.nodes)
    exists = nodes.new_zeros(*size[1:], 1)
    exists[target, source] = 1
    states = nodes.new_zeros(*size, edges.shape[2])
    states[:, target, source] = edges
    for layer in layers:
        normed = layer.edge_norm(states) * exists
        nodes = nodes + _attend(layer.attention, layer.node_norm(nodes), normed)
        nodes = nodes + layer.mlp(nodes)
        if layer.update is not None:
            states = _update(layer.update, nodes, states) * exists
    return nodes


def _attend(of: RelationalAttention, nodes: Tensor, edges: Tensor) -> Tensor:
    heads = (of.heads, -1)
    q, k, v = of.qkv(nodes).chunk(3, dim=2)
    p, r = of.edge_target.weight, of.edge_source.weight
    (gain, gain_back), (value, value_back) = (
        of.edge_gain.weight.chunk(2),
        of.edge_value.weight.chunk(2),
    )
    along = torch.cat([p, r, gain, value])
    back = torch.cat([r, p, gain_back, value_back])
    pairs = torch.cat([edges, edges.transpose(1, 2)], dim=-1)  # (n, V, V, 2 edge)
    eq, ek, em, ev = F.linear(pairs, torch.cat([along, back], dim=1)).chunk(4, dim=-1)
    queries = (q[:, :, None] + eq).unflatten(-1, heads)
    keys = (k[:, None] + ek).unflatten(-1, heads)
    values = (v[:, None] * (1 + em) + ev).unflatten(-1, heads)
    scores = torch.einsum("nijhc,nijhc->nijh", queries, keys) * queries.shape[-1] ** -0.5
    mixed = torch.einsum("nijh,nijhc->nihc", scores.softmax(2), values)
    return of.out(mixed.flatten(2))  # type: ignore[no-any-return]


def _update(of: EdgeUpdate, nodes: Tensor, edges: Tensor) -> Tensor:
    ends = of.target(nodes)[:, :, None] + of.source(nodes)[:, None]
    edges = edges + of.out(F.gelu(of.edge(of.norm(edges)) + ends))
    return edges + of.mlp(edges)  # type: ignore[no-any-return]


class Case:
    """Both candidates on the same networks; `dtype` for tests."""

    def __init__(
        self, net: str, batch: int, config: GraphConfig, dtype: torch.dtype = torch.float32
    ) -> None:
        architecture = Architecture(
            net=net,
            channels=3,
            size=INPUT_SIZES[net],
            outputs=10,
            activation="gelu",
            mean=0.5,
            std=0.5,
        )
        layout = WeightLayout.of(architecture.build(), architecture)
        with seeded(0):
            encoder = encoders.build(
                config, JointLayout.of([layout]), layout.size + 2 * len(layout.names)
            )
        assert isinstance(encoder, GraphEncoder)
        self.encoder, self.layers = encoder.to(dtype), encoder.encoder
        generator = torch.Generator().manual_seed(0)
        self.vectors = torch.randn(batch, layout.size, generator=generator).to(dtype)

    def candidates(self) -> dict[str, Callable[[], Tensor]]:
        """From vectors (n, D) to nodes (n, V, node), ours in groups as the encoder has them."""
        embed, graph, layers = self.encoder.embed, self.encoder.graph, list(self.layers)

        def sparse(vectors: Tensor) -> Tensor:
            return run(layers, graph, *embed(vectors))[0]

        return {
            "flown": lambda: in_groups(sparse, self.vectors),
            "dense": lambda: dense(layers, graph, *embed(self.vectors)),  # type: ignore[arg-type]
        }

    def call(self, candidate: str, backward: bool) -> Tensor:
        """A forward pass, and with `backward` the gradients of its mean square."""
        if not backward:
            with torch.no_grad():
                return self.candidates()[candidate]()
        result = self.candidates()[candidate]()
        result.square().mean().backward()
        self.encoder.zero_grad()
        return result


def encode(repeats: int, net: str = NET, batch: int = BATCH) -> list[Row]:
    """Seconds and peak memory of the encoder's layers, forward and with backward, side by side.

    The layers have the published sizes, the networks three input channels.

    Raises:
        RuntimeError: their outputs differ.
    """
    config = GraphConfig.published()
    case = Case(net, batch, config)
    layers, dense = case.call("flown", False), case.call("dense", False)
    if not torch.allclose(layers, dense, rtol=1e-4, atol=1e-4):
        worst = float((layers - dense).abs().max())
        raise RuntimeError(f"bench encode: layers and dense reference differ by {worst:.2g}")
    rows: list[Row] = []
    for backward, what in ((False, "forward"), (True, "forward-backward")):
        candidates = {
            f"{name}-{what}": partial(case.call, name, backward) for name in case.candidates()
        }
        rows += timed_rows(medians(candidates, repeats), f"flown-{what}", batch)
        memory = {
            name: peak_memory(name, backward, net, batch, config) for name in case.candidates()
        }
        for name, value in memory.items():
            rows.append(
                {
                    "dataset": None,
                    "method": f"{name}-{what}",
                    "metric": "MB",
                    "value": value,
                    "std": None,
                    "n": batch,
                    "selection": "largest",
                    "epoch": None,
                    "paper": None,
                    "ratio": value / memory["flown"],
                }
            )
    return [{**row, "net": net} for row in rows]


def peak_memory(candidate: str, backward: bool, net: str, batch: int, config: GraphConfig) -> float:
    """Megabytes that the call adds to the memory of its own process, at the peak."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (candidate, backward, net, batch, config))


def _peak(candidate: str, backward: bool, net: str, batch: int, config: GraphConfig) -> float:
    small, case = Case(net, 1, config), Case(net, batch, config)
    small.call(candidate, backward)  # libraries load things once
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here (Linux)
    before = _held("VmRSS")
    case.call(candidate, backward)
    return _held("VmHWM") - before


def _held(what: str) -> float:
    """A figure of this process's resident memory in megabytes."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024
