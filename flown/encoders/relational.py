"""Relational transformer layers on a network's graph (Diao & Loynd 2023, 2210.05062).

    score_ij = (q_i + Q e) . (k_j + K e) / sqrt(c)      every node i attends to every node j
    value_ij = v_j * (1 + M e) + V e                    modulated, as Kofinas et al. have it
    e       += MLP(e, x_target, x_source),  then an MLP of its own

A weight has one edge and one state e, which both of its ends read: the target with Q, K = P, R, the
source with R, P, each with its own M and V. Where there is no weight, e = 0, which
leaves plain attention. So only scores exist for all pairs, one a head; feature vectors exist at edges
alone, block by block. The product of the scores is expanded, (P e).(R e) serves both ends, and
sum_j a_ij V e = V sum_j a_ij e needs no value per edge. The result is the dense transformer's
(`flown bench encode` compares them).

Axes: n networks, V nodes, E edges, h heads, c numbers a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.encoders.netgraph import NetGraph


class RelationalLayer(nn.Module):
    """Nodes (n, V, node) and edges (n, E, edge) to new ones; `edges=False` keeps edges."""

    def __init__(self, node: int, edge: int, heads: int, edges: bool = True) -> None:
        super().__init__()
        self.node_norm, self.edge_norm = nn.LayerNorm(node), nn.LayerNorm(edge)
        self.attention = RelationalAttention(node, edge, heads)
        self.mlp = mlp(node)
        self.update = EdgeUpdate(node, edge) if edges else None

    def forward(self, graph: NetGraph, nodes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        nodes = nodes + self.attention(graph, self.node_norm(nodes), self.edge_norm(edges))
        nodes = nodes + self.mlp(nodes)
        if self.update is not None:
            edges = self.update(graph, nodes, edges)
        return nodes, edges


class RelationalAttention(nn.Module):
    """Multi-head attention of all nodes (n, V, node) to all, with edges (n, E, edge): new nodes."""

    def __init__(self, node: int, edge: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(node, 3 * node, bias=False)
        self.edge_target = nn.Linear(edge, node, bias=False)  # P
        self.edge_source = nn.Linear(edge, node, bias=False)  # R
        self.edge_gain = nn.Linear(edge, 2 * node, bias=False)  # M of targets, of sources
        self.edge_value = nn.Linear(edge, 2 * node, bias=False)
        self.out = nn.Linear(node, node)

    def forward(self, graph: NetGraph, nodes: Tensor, edges: Tensor) -> Tensor:
        q, k, v = self.qkv(nodes).unflatten(2, (3, self.heads, -1)).unbind(2)  # (n, V, h, c)
        scores = torch.einsum("nihc,njhc->nhij", q, k).flatten(2)
        to_targets, to_sources = self._related(graph, q, k, edges)
        target, source = graph.ends.unbind(1)
        pairs = torch.cat([target * graph.nodes + source, source * graph.nodes + target])
        scores = scores.index_add(
            2, pairs, torch.cat([to_targets, to_sources], dim=1).transpose(1, 2)
        )
        attention = (scores * q.shape[-1] ** -0.5).unflatten(2, (graph.nodes, -1)).softmax(-1)
        weights = attention.flatten(2)[:, :, pairs].transpose(1, 2)  # (n, 2 E, h)
        mixed = torch.einsum("nhij,njhc->nihc", attention, v)
        for i, along in enumerate(weights.chunk(2, dim=1)):
            gains = self.edge_gain.weight.chunk(2)[i]
            values = self.edge_value.weight.chunk(2)[i].unflatten(0, (self.heads, -1))
            parts = (
                graph.by_block(along),
                graph.by_block(F.linear(edges, gains)),
                graph.by_block(edges),
            )
            for block, a, gain, e in zip(graph.blocks, *parts, strict=True):
                to, of = (block.source, block.target) if i else (block.target, block.source)
                modulated = to.sum(a[..., None] * (of.of(v) * gain.unflatten(3, (self.heads, -1))))
                plain = torch.einsum("nihe,hce->nihc", to.sum_products(a, e), values)
                mixed[:, to.place] += modulated + plain
        return self.out(mixed.flatten(2))  # type: ignore[no-any-return]

    def _related(
        self, graph: NetGraph, q: Tensor, k: Tensor, edges: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The edges' terms in the scores of their targets and of their sources, (n, E, h) each."""
        split = (self.heads, -1)
        p, r = (
            linear.weight.unflatten(0, split) for linear in (self.edge_target, self.edge_source)
        )
        square = (self.edge_target(edges) * self.edge_source(edges)).unflatten(2, split).sum(-1)
        qp, qr, kp, kr = (torch.einsum("nihc,hce->nihe", x, w) for x in (q, k) for w in (p, r))
        to_targets, to_sources = [], []
        for block, e in zip(graph.blocks, graph.by_block(edges), strict=True):
            to_targets.append((block.target.dot(qr, e) + block.source.dot(kp, e)).flatten(1, 2))
            to_sources.append((block.source.dot(qp, e) + block.target.dot(kr, e)).flatten(1, 2))
        return torch.cat(to_targets, dim=1) + square, torch.cat(to_sources, dim=1) + square


class EdgeUpdate(nn.Module):
    """New edges (n, E, edge) from the old and the nodes at both ends."""

    def __init__(self, node: int, edge: int) -> None:
        super().__init__()
        self.norm, self.edge = nn.LayerNorm(edge), nn.Linear(edge, 2 * edge)
        self.target = nn.Linear(node, 2 * edge, bias=False)
        self.source = nn.Linear(node, 2 * edge, bias=False)
        self.out = nn.Linear(2 * edge, edge)
        self.mlp = mlp(edge)

    def forward(self, graph: NetGraph, nodes: Tensor, edges: Tensor) -> Tensor:
        targets, sources = self.target(nodes), self.source(nodes)
        blocks = graph.by_block(self.edge(self.norm(edges)))
        hidden = torch.cat(
            [
                (part + block.target.of(targets) + block.source.of(sources)).flatten(1, 2)
                for block, part in zip(graph.blocks, blocks, strict=True)
            ],
            dim=1,
        )
        edges = edges + self.out(F.gelu(hidden))
        return edges + self.mlp(edges)  # type: ignore[no-any-return]


def mlp(width: int) -> nn.Sequential:
    """LayerNorm -> Linear -> GELU -> Linear, twice as wide inside."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
    )
