"""Networks as graphs: the graph alone computes what the network does, and gives its weights back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown import nets
from flown.base.errors import FlownError
from flown.encoders.netgraph import Block, NetGraph
from flown.weights.layout import JointLayout, WeightLayout
from tests.examples import ConvNorm, layout
from tests.test_symmetry import Block as Residual
from tests.test_symmetry import mlp, roused


def norm_cnn() -> nn.Module:
    return nn.Sequential(
        *(
            nn.Conv2d(3, 5, 3),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 4, (3, 2)),
            nn.MaxPool2d(8),
        ),
        *(nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(36, 6), nn.Linear(6, 4)),
    )


def norm_mlp(size: int = 28) -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(3 * size**2, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5)),
        *(nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4)),
    )


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        Residual(5, 5),
        Residual(5, 7, 2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(28, 4),
    )


CHAINS = {
    "mlp": mlp,
    "cnn-small": lambda: nets.build("cnn-small", 3, 10, "tanh"),
    "cnn-medium": lambda: nets.build("cnn-medium", 3, 10, "gelu"),
    "norm-cnn": norm_cnn,
    "norm-mlp": norm_mlp,
}
MAKERS = CHAINS | {"resnet": resnet, "conv-norm": lambda: ConvNorm(3)}


@pytest.fixture(params=MAKERS)
def net(request: pytest.FixtureRequest) -> nn.Module:
    return roused(MAKERS[request.param](), 0).double()


def images(net: nn.Module) -> Tensor:
    side = 32 if any(getattr(p, "shape", ()) == (20, 60) for p in net.parameters()) else 28
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 3, side, side, generator=generator, dtype=torch.float64)


def vector(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])[None]


def kernels(graph: NetGraph, block: Block, edges: Tensor) -> Tensor:
    """A block's features as a matrix of nodes by nodes, read off the edges' ends: (T, S, K)."""
    start = sum(b.edges for b in graph.blocks[: graph.blocks.index(block)])
    rows = slice(start, start + block.edges)
    t, s = block.target.place, block.source.place
    matrix = edges.new_zeros(t.stop - t.start, s.stop - s.start, graph.kernel)
    matrix[graph.ends[rows, 0] - t.start, graph.ends[rows, 1] - s.start] = edges[0, rows]
    return matrix


def own_position(maps: Tensor, size: int) -> Tensor:
    """Maps (B, V, ...) of repeated nodes, each reduced to the position that is its own: (B, V)."""
    flat = maps.flatten(2)
    return flat[:, torch.arange(size), torch.arange(size) % flat.shape[2]]


@pytest.mark.parametrize("name", CHAINS)
@torch.no_grad()
def test_node_and_edge_features_alone_compute_the_network(name: str) -> None:
    """Every node holds a map of activations; flattening leaves each of its copies one number."""
    net = roused(CHAINS[name](), 0).double()
    x = images(net)
    graph = NetGraph(net, x)
    nodes, edges = graph.features(vector(net))
    blocks = {block.layer: block for block in graph.blocks}
    side = round(graph.kernel**0.5)
    first = graph.blocks[0].source.place
    state = x.repeat_interleave((first.stop - first.start) // 3, dim=1)
    for layer, module in net.named_children():
        block = blocks.get(layer)
        if block is None:
            one = isinstance(module, nn.Flatten)
            state = own_position(state, state.shape[1]) if one else module(state)
            continue
        weight, bias = kernels(graph, block, edges), nodes[0, block.target.place, 0]
        if isinstance(module, nn.Conv2d):
            pads = [((side - k) // 2, side - k - (side - k) // 2) for k in module.kernel_size]
            padded = F.pad(state, (*pads[1], *pads[0]))
            state = F.conv2d(padded, weight.unflatten(2, (side, side)), bias)
        else:
            matrix = weight[..., graph.kernel // 2]
            if isinstance(module, nn.BatchNorm2d):
                state = F.batch_norm(state, module.running_mean, module.running_var)
            elif isinstance(module, nn.LayerNorm):
                state = F.layer_norm(state, module.normalized_shape)
            state = torch.einsum("bs...,ts->bt...", state, matrix)
            state = state + bias.reshape(-1, *(1,) * (state.ndim - 2))
    torch.testing.assert_close(state, net(x), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_weights_read_off_the_graph_run_the_network(net: nn.Module) -> None:
    """Sums too: their edges are ones on the diagonal. The output is the same to the last bit."""
    x = images(net)
    expected = net(x)
    graph = NetGraph(net, x)
    nodes, edges = graph.features(vector(net))
    read = {name: torch.full_like(p, torch.nan) for name, p in net.named_parameters()}
    sums = 0
    for block in graph.blocks:
        matrix = kernels(graph, block, edges)
        if not block.layer:
            sums += 1
            ones = torch.eye(matrix.shape[1]).repeat_interleave(
                len(matrix) // matrix.shape[1], dim=0
            )
            assert torch.equal(matrix[..., graph.kernel // 2], ones.double())
            continue
        weight = read[f"{block.layer}.weight"]
        copies = len(matrix) // len(weight)
        matrix, bias = matrix[::copies], nodes[0, block.target.place, 0][::copies]
        if weight.ndim == 1:
            matrix = matrix[torch.arange(len(weight)), torch.arange(len(weight))]
        side = round(graph.kernel**0.5)
        window = [
            slice((side - k) // 2, (side - k) // 2 + k)
            for k in (weight.shape[2:] if weight.ndim > 2 else (1, 1))
        ]
        own = matrix.unflatten(-1, (side, side))[(..., *window)]
        read[f"{block.layer}.weight"] = own.reshape(weight.shape)
        if f"{block.layer}.bias" in read:
            read[f"{block.layer}.bias"] = bias
    assert sums == sum(isinstance(m, Residual) for m in net.modules()) * 2
    # Aligned and contiguous, as the network's own: kernels choose their order of summation by it.
    read = {name: tensor.contiguous().clone() for name, tensor in read.items()}
    assert torch.equal(torch.func.functional_call(net, read, (x,)), expected)


def test_vectors_survive_the_round_trip(net: nn.Module, generator: torch.Generator) -> None:
    """Exactly, in either precision: the mean of equal copies is the number itself."""
    graph = NetGraph(net, images(net))
    for dtype in (torch.float32, torch.float64):
        vectors = torch.randn(5, graph.size, generator=generator, dtype=dtype)
        assert torch.equal(graph.vectors(*graph.features(vectors)), vectors)


def test_copies_that_differ_are_averaged_and_padding_is_dropped() -> None:
    graph = NetGraph.of(JointLayout.of([layout()]))
    nodes, edges = graph.features(torch.zeros(1, graph.size))
    third = graph.blocks[2]
    assert third.layer == "6" and third.grid == (36, 6), "nine positions of four channels"
    nodes[0, third.target.place, 0] = torch.arange(36.0)
    edges[0, :, 0] = 7  # a corner of 5 x 5: only the 5 x 5 kernels have a number there
    tensors = layout().unpack(graph.vectors(nodes, edges))
    assert tensors["6.bias"].tolist() == [[4, 13, 22, 31]]
    assert (tensors["0.weight"][..., 0, 0] == 7).all() and not tensors["6.weight"].any()


def test_positions_are_own_at_both_ends_and_shared_between() -> None:
    graph = NetGraph.of(JointLayout.of([layout()]))
    sizes = [1, 8, 6, 36, 20, 10]
    ids = [part.unique() for part in graph.positions.split(sizes)]
    assert [len(part) for part in ids] == [1, 1, 1, 9, 1, 10]
    assert len(torch.cat(ids).unique()) == 23


def test_one_graph_serves_tasks_of_other_channels_and_classes(generator: torch.Generator) -> None:
    joint = JointLayout.of([layout(channels=3), layout("parity")])
    graph = NetGraph.of(joint)
    assert graph.size == joint.size
    grey = joint.embed(torch.randn(4, layout("parity").size, generator=generator), 1)
    nodes, edges = graph.features(grey)
    assert torch.equal(graph.vectors(nodes, edges), grey)
    assert not edges.unflatten(1, (-1,))[:, : 8 * 3].unflatten(1, (8, 3))[:, :, 1:].any()


class Gate(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x)) * self[2](self[0](x))  # type: ignore[no-any-return]


REFUSED = {
    "'0' .*groups its channels": nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 2, 26)),
    "'1.weight' has no place": nn.Sequential(nn.Conv2d(3, 2, 3), nn.PReLU(2), nn.Conv2d(2, 2, 26)),
    "not a sum": Gate(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_has_no_graph_is_refused(why: str) -> None:
    with pytest.raises(FlownError, match=why):
        NetGraph(REFUSED[why], torch.randn(1, 3, 28, 28))


def test_subsets_and_other_sizes_are_refused() -> None:
    net = nets.build("cnn-small", 1, 10, "tanh")
    part = WeightLayout.of(net, layout().architecture, subset=["9.*"])
    with pytest.raises(FlownError, match=r"'0\.weight' is not among those that vary"):
        NetGraph.of(JointLayout.of([part]))
    conv = layout().architecture.model_copy(update={"net": "tests.examples:ConvNorm"})
    wide = WeightLayout.of(ConvNorm(width=9), conv)
    with pytest.raises(
        FlownError, match=r"'conv1\.weight'.*\(9, 1, 3, 3\).*fit each task by itself"
    ):
        NetGraph.of(JointLayout.of([wide]))
