"""The graph encoder: blind to the order of hidden units, and what a dense transformer computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flown import encoders
from flown.base.errors import FlownError
from flown.bench.encode import Case, dense, encode
from flown.encoders import GraphConfig, GraphEncoder
from flown.encoders.graph import run
from flown.encoders.netgraph import NetGraph
from flown.encoders.relational import RelationalLayer
from flown.nets.structure.symmetry import Group, groups
from flown.weights.layout import JointLayout, WeightLayout
from flown.zoo.align.align import permute
from tests.examples import architecture, layout
from tests.test_graph import norm_mlp, resnet

TINY = GraphConfig(node=8, edge=4, depth=2, heads=2, latent_shape=(1, 2, 2))


def norms_layout() -> WeightLayout:
    """An MLP with LayerNorms for images of 3 x 3."""
    shape = {"net": "tests.test_graph:norm_mlp", "outputs": 4, "size": 3}
    return WeightLayout.of(norm_mlp(3), architecture(channels=3).model_copy(update=shape))


def conv_norm_layout() -> WeightLayout:
    found = architecture().model_copy(update={"net": "tests.examples:ConvNorm"})
    return WeightLayout.of(found.build(), found)


LAYOUTS = {
    "cnn-small": lambda: layout(channels=3),
    "conv-norm": lambda: conv_norm_layout(),
    "norm-mlp": norms_layout,
}


def permuted(
    where: WeightLayout, vectors: Tensor, seed: int
) -> tuple[Tensor, list[tuple[Group, Tensor]]]:
    """Vectors (n, D) with the hidden units of all networks in one other order, and that order."""
    generator = torch.Generator().manual_seed(seed)
    example = torch.empty(1, *where.architecture.input_shape)
    found = groups(where.architecture.build(), example)
    orders = [
        torch.rand(1, g.size, generator=generator).argsort(dim=1).expand(len(vectors), -1)
        for g in found
    ]
    kept = [torch.ones(len(vectors), g.size, dtype=vectors.dtype) for g in found]
    tensors = where.unpack(vectors)
    named = [Group(g.size, tuple(a for a in g.axes if a[0] in tensors), g.signs) for g in found]
    changed = permute(tensors, named, orders, kept)
    return where.pack(changed), list(zip(found, [o[0] for o in orders], strict=True))


def scaled(where: WeightLayout, numbers: Tensor) -> Tensor:
    """Numbers (n, D) of unit scale with the scale of every tensor behind them, (n, D + 2 T)."""
    statistics = torch.linspace(-1, 1, 2 * len(where.names), dtype=numbers.dtype)
    return torch.cat([numbers, statistics.expand(len(numbers), -1)], dim=1)


def made(name: str) -> tuple[GraphEncoder, WeightLayout]:
    where = LAYOUTS[name]()
    torch.manual_seed(0)
    encoder = encoders.build(TINY, JointLayout.of([where]), where.size + 2 * len(where.names))
    assert isinstance(encoder, GraphEncoder)
    return encoder.double(), where


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_permuted_networks_have_one_latent_and_permuted_nodes(name: str, seed: int) -> None:
    encoder, where = made(name)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, where.size, generator=generator, dtype=torch.float64)
    other, orders = permuted(where, vectors, seed)
    assert not torch.equal(other, vectors)
    torch.testing.assert_close(
        encoder.encode(scaled(where, other)),
        encoder.encode(scaled(where, vectors)),
        rtol=1e-5,
        atol=1e-8,
    )

    before, after = (
        run(encoder.encoder, encoder.graph, *encoder.embed(v))[0] for v in (vectors, other)
    )
    place = torch.arange(encoder.graph.nodes)
    for group, order in orders:
        of = {tensor.removesuffix(".weight"): axis for tensor, axis, _ in group.axes if axis == 0}
        for block in encoder.graph.blocks:
            if block.layer in of:
                nodes = place[block.target.place].unflatten(0, (group.size, -1))
                place[block.target.place] = nodes[order].flatten()
    torch.testing.assert_close(after, before[:, place], rtol=1e-5, atol=1e-8)


def test_latents_tell_other_networks_apart() -> None:
    """Invariance alone would hold for a constant: units moved in one layer only are another network."""
    encoder, where = made("cnn-small")
    vectors = torch.randn(
        1, where.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    tensors = where.unpack(vectors)
    moved = where.pack(tensors | {"0.weight": tensors["0.weight"].flip(1)})
    turned = where.pack(tensors | {"9.weight": tensors["9.weight"].flip(2)})
    for other in (moved, turned):
        assert (
            encoder.encode(scaled(where, other)) - encoder.encode(scaled(where, vectors))
        ).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["cnn-small", "residual"])
def test_layers_compute_what_the_dense_transformer_does(name: str) -> None:
    """In float64, for networks with and without diagonal layers and sums, values and gradients."""
    if name == "residual":
        graph = NetGraph(resnet(), torch.empty(1, 3, 28, 28))
    else:
        graph = NetGraph.of(JointLayout.of([layout()]))
    torch.manual_seed(0)
    layers = nn.ModuleList(RelationalLayer(8, 4, 2, edges=i < 2) for i in range(3)).double()
    generator = torch.Generator().manual_seed(0)
    nodes = torch.randn(2, graph.nodes, 8, generator=generator, dtype=torch.float64)
    edges = torch.randn(2, graph.edges, 4, generator=generator, dtype=torch.float64)
    grads = []
    for compute in (run, lambda *a: (dense(*a), None)):
        out = compute(layers, graph, nodes, edges)[0]
        layers.zero_grad()
        out.square().sum().backward()
        grads.append((out.detach(), [p.grad.clone() for p in layers.parameters()]))
    (mine, mine_grads), (theirs, theirs_grads) = grads
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    for ours, reference in zip(mine_grads, theirs_grads, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-8, atol=1e-8)


def test_bench_candidates_agree() -> None:
    case = Case("cnn-small", 2, TINY)
    torch.testing.assert_close(
        case.call("flown", True), case.call("dense", True), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_the_dense_transformer_needs_more_than_twice_the_memory() -> None:
    rows = [row for row in encode(1, batch=4) if row["metric"] == "MB"]
    ratios = {row["method"]: row["ratio"] for row in rows}
    assert min(ratios["dense-forward"], ratios["dense-forward-backward"]) > 2, ratios


def test_published_sizes_and_refused_ones() -> None:
    config = GraphConfig.published()
    assert (config.node, config.edge, config.depth, config.heads) == (64, 32, 4, 8)
    with pytest.raises(FlownError, match="node 10 is not divisible by heads 4"):
        encoders.build(GraphConfig(node=10), JointLayout.of([layout()]), 2484)
    with pytest.raises(FlownError, match="layers"):
        encoders.from_values({"kind": "graph", "layers": "gnn"})
