"""The graph encoder: permuting a network's hidden units does not change its latent (FLoWN A.2.2).

    encode: node and edge features -> layers -> mean of nodes that share a position -> mu, log sigma^2
    decode: z -> a draft w of the vector, by an MLP -> its graph, with a learned query for every node
            and edge -> layers -> w + their change

The graph and its positions: `flown.encoders.netgraph`; its layers: `flown.encoders.relational`.
It departs from the code of Kofinas et al. (2403.12143) in three things: layers normalise what they read,
not what they add to; only edges that exist have states, not all pairs of nodes; flattened units are
channel-major, as torch flattens them, where that code mixes two orders.

Theirs has no decoder. Ours writes networks in one order, that of its queries, so a zoo of independently
trained networks has to be aligned first (`flown zoo align`): the latent does not say which order a network
came in. The draft is there because states alone would be a bottleneck: a 5x5 kernel has more numbers than
an edge's state, and a readout that all layers share loses the zoo's mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flown.base.config import Size
from flown.base.errors import FlownError
from flown.encoders.latent import GaussianLatent, LatentConfig
from flown.encoders.netgraph import NetGraph
from flown.encoders.relational import RelationalLayer
from flown.weights.layout import JointLayout

_GROUP = 8  # networks at a time on a CPU: decoding is 2.5 times as fast as a hundred at once


class GraphConfig(LatentConfig):
    """Sizes of the graph encoder. The defaults are the CPU preset, `published()` is Table 7's.

    `node` and `edge` are the widths of their states; encoder and decoder have `depth` layers each,
    with `heads` attention heads.
    """

    kind: Literal["graph"] = "graph"
    node: Size = 32
    edge: Size = 16
    depth: Size = 2
    heads: Size = 4
    latent_shape: tuple[Size, Size, Size] = (4, 4, 4)

    @classmethod
    def published(cls) -> GraphConfig:
        """Table 7; the width of the edges is Kofinas et al.'s."""
        return cls(node=64, edge=32, depth=4, heads=8)


class GraphEncoder(GaussianLatent):
    """Standardised weight vectors (n, D) <-> latents (n, *latent_shape) by way of graphs."""

    def __init__(self, config: GraphConfig, joint: JointLayout, size: int) -> None:
        super().__init__(config, config.latent_shape)
        if config.node % config.heads:
            raise FlownError(f"graph: node {config.node} is not divisible by heads {config.heads}")
        self.config, self.graph = config, NetGraph.of(joint)
        latent, graph = math.prod(config.latent_shape), self.graph
        self.statistics = size - graph.size  # numbers behind the weights: every tensor's scale
        self.scale = nn.Linear(self.statistics, 2 * latent)
        self.embed_nodes = nn.Linear(1, config.node)
        self.embed_edges = nn.Linear(graph.kernel, config.edge)
        counts = torch.bincount(graph.positions)
        self.position = nn.Embedding(len(counts), config.node)
        self.encoder = _layers(config, last_edges=False)
        pooled = nn.Linear(len(counts) * config.node, 2 * latent)
        self.posterior = nn.Sequential(nn.LayerNorm(config.node), nn.Flatten(), pooled)
        self.draft = nn.Sequential(
            nn.Linear(latent, 4 * latent), nn.GELU(), nn.Linear(4 * latent, size)
        )
        self.node_queries = nn.Parameter(torch.randn(graph.nodes, config.node))
        self.edge_queries = nn.Parameter(torch.randn(graph.edges, config.edge))
        self.node_draft = nn.Linear(1, config.node)
        self.edge_draft = nn.Linear(graph.kernel, config.edge)
        self.node_latent = nn.Linear(latent, config.node)
        self.decoder = _layers(config, last_edges=True)
        self.biases = nn.Sequential(nn.LayerNorm(config.node), _zero(nn.Linear(config.node, 1)))
        self.weights = nn.Sequential(
            nn.LayerNorm(config.edge), _zero(nn.Linear(config.edge, graph.kernel))
        )
        share = torch.zeros(len(counts), graph.nodes)
        share[graph.positions, torch.arange(graph.nodes)] = 1 / counts[graph.positions]
        self.register_buffer("_share", share, persistent=False)

    def embed(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (n, D) to the layers' input: nodes (n, V, node), edges (n, E, edge)."""
        nodes, edges = self.graph.features(vectors[:, : self.graph.size])
        nodes = self.embed_nodes(nodes) + self.position(self.graph.positions)
        return nodes, self.embed_edges(edges)

    def approximate_posterior(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = in_groups(self._posterior, vectors).chunk(2, dim=1)
        return mean, logvar.clamp(-20, 4)

    def _posterior(self, vectors: Tensor) -> Tensor:
        nodes, _ = run(self.encoder, self.graph, *self.embed(vectors))
        pooled = torch.einsum("pv,nvd->npd", self._share, nodes)
        scale = self.scale(vectors[:, self.graph.size :])
        return self.posterior(pooled) + scale  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        return in_groups(self._decode, latents.flatten(1))

    def _decode(self, z: Tensor) -> Tensor:
        draft, scale = self.draft(z).split([self.graph.size, self.statistics], dim=1)
        nodes, edges = self.graph.features(draft)
        nodes = self.node_queries + self.node_draft(nodes) + self.node_latent(z)[:, None]
        edges = self.edge_queries + self.edge_draft(edges)
        nodes, edges = run(self.decoder, self.graph, nodes, edges)
        weights = draft + self.graph.vectors(self.biases(nodes), self.weights(edges))
        return torch.cat([weights, scale], dim=1)


def in_groups(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """A function of rows, on a CPU in small groups: the edges of many networks exceed the cache.

    For gradients a group is computed again when its turn comes, so that the memory is one group's.
    """
    if rows.device.type != "cpu" or len(rows) <= _GROUP:
        return function(rows)
    if torch.is_grad_enabled():
        function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([function(part) for part in rows.split(_GROUP)])


def run(
    layers: Iterable[nn.Module], graph: NetGraph, nodes: Tensor, edges: Tensor
) -> tuple[Tensor, Tensor]:
    """Nodes (n, V, node) and edges (n, E, edge) after all layers."""
    for layer in layers:
        nodes, edges = layer(graph, nodes, edges)
    return nodes, edges


def _zero(linear: nn.Linear) -> nn.Linear:
    """A layer whose output starts at zero: at first the draft is what is decoded."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _layers(config: GraphConfig, last_edges: bool) -> nn.ModuleList:
    """The stack; its last layer need not make edges that nothing reads."""
    ends = [last_edges or i + 1 < config.depth for i in range(config.depth)]
    return nn.ModuleList(RelationalLayer(config.node, config.edge, config.heads, e) for e in ends)
