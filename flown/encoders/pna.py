"""Message passing by principal neighbourhood aggregation (Corso et al. 2020, 2004.05718).

Each node takes mean, minimum, maximum and standard deviation of its edges' messages, scaled by its
degree in three ways: the graph encoder's alternative to attention. The convolution is
torch-geometric's; edges are updated as the relational transformer's are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.encoders.netgraph import NetGraph
from flown.encoders.relational import EdgeUpdate, mlp

_AGGREGATORS = ["mean", "min", "max", "std"]
_SCALERS = ["identity", "amplification", "attenuation"]


class PNALayer(nn.Module):
    """Nodes (n, V, node) and edges (n, E, edge) to new ones; `edges=False` keeps edges.

    Raises:
        FlownError: torch-geometric is not installed.
    """

    def __init__(self, node: int, edge: int, graph: NetGraph, edges: bool = True) -> None:
        super().__init__()
        try:
            from torch_geometric.nn import PNAConv
        except ImportError:
            raise FlownError(
                "graph: layers 'pna' need torch-geometric: pip install 'flown[graph]', or choose "
                "layers 'relational'"
            ) from None
        degrees = torch.bincount(graph.ends.flatten(), minlength=graph.nodes)
        self.norm, self.back = nn.LayerNorm(node), nn.Linear(edge, edge)
        self.conv = PNAConv(node, node, _AGGREGATORS, _SCALERS, torch.bincount(degrees), edge)
        self.mlp = mlp(node)
        self.update = EdgeUpdate(node, edge) if edges else None

    def forward(self, graph: NetGraph, nodes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        n = len(nodes)
        ends = torch.cat([graph.ends.flip(1), graph.ends])  # (2 E, 2): from, to
        apart = graph.nodes * torch.arange(n, device=nodes.device)[:, None, None]
        index = (ends + apart).flatten(0, 1).T  # (2, n * 2 E): the n networks as one graph
        states = torch.cat([edges, self.back(edges)], dim=1).flatten(0, 1)
        mixed = self.conv(self.norm(nodes).flatten(0, 1), index, states)
        nodes = nodes + mixed.unflatten(0, (n, -1))
        nodes = nodes + self.mlp(nodes)
        if self.update is not None:
            edges = self.update(graph, nodes, edges)
        return nodes, edges
