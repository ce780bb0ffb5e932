"""Symmetries: read off a graph, and true: permuted networks compute what they did."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flown import nets
from flown.base.errors import FlownError
from flown.nets.structure.symmetry import Group, groups
from flown.zoo.align.align import permute

IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block; with a stride, the shortcut is a convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        out += self.down(x)
        return torch.relu(out)


class Small(nn.Module):
    """A small ResNet with a depthwise layer, a gate and other norms on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.PReLU(5))
        self.blocks = nn.Sequential(Block(5, 5), Block(5, 7, 2), Block(7, 7))
        self.depthwise = nn.Conv2d(7, 14, 3, groups=7)
        self.gate = nn.Linear(14, 14)
        self.head = nn.Sequential(nn.Linear(14, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.blocks(self.stem(x)))
        return self.head(self.gate(x.mean((2, 3))) / 2)


def cnn(activation: str) -> nn.Module:
    return nets.build("cnn-small", 3, 10, activation)


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(3 * 28 * 28, 9), nn.Tanh(), nn.Dropout(0.5)),
        *(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)),
    )


MAKERS = {"tanh": lambda: cnn("tanh"), "gelu": lambda: cnn("gelu"), "mlp": mlp, "resnet": Small}


def roused(net: nn.Module, seed: int) -> nn.Module:
    """The network in eval mode with every number drawn: fresh norms are alike in all units."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            scale = 0.3 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
            if "var" in name:
                tensor.abs_().add_(0.5)
    return net.eval()


def drawn(found: tuple[Group, ...], n: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """A random element of every group for n networks."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.rand(n, g.size, generator=generator).argsort(dim=1) for g in found]
    flips = [torch.randint(2, (n, g.size), generator=generator) * 2.0 - 1 for g in found]
    return orders, [f if g.signs else torch.ones_like(f) for f, g in zip(flips, found, strict=True)]


@torch.no_grad()
def difference(net: nn.Module, images: Tensor, seed: int) -> float:
    """How far a randomly permuted copy's logits lie from the network's, relative to their size."""
    found = groups(net, images)
    before = net(images)
    stacked = {name: tensor[None] for name, tensor in net.state_dict().items()}
    changed = permute(stacked, found, *drawn(found, 1, seed))
    net.load_state_dict({name: tensor[0] for name, tensor in changed.items()})
    return float((net(images) - before).abs().max() / before.abs().max())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
@pytest.mark.parametrize("name", MAKERS)
def test_a_permuted_network_computes_the_same(name: str, seed: int) -> None:
    assert difference(roused(MAKERS[name](), seed), IMAGES, seed + 1) < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision_networks_permute(name: str) -> None:
    net = roused(getattr(torchvision.models, name)(num_classes=10), 0)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert difference(net, images, 1) < 1e-4


def test_groups_are_the_layers_between_input_and_output() -> None:
    found = groups(cnn("tanh"), IMAGES)
    assert [group.size for group in found] == [8, 6, 4, 20]
    assert found[2].axes == (("6.weight", 0, 1), ("6.bias", 0, 1), ("9.weight", 1, 9))


def test_max_pooling_and_even_activations_take_the_signs() -> None:
    """The first two blocks are conv -> max-pool -> tanh: max(-a, -b) is not -max(a, b)."""
    assert [group.signs for group in groups(cnn("tanh"), IMAGES)] == [False, False, True, True]
    assert not any(group.signs for group in groups(cnn("gelu"), IMAGES))
    layers = [nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(676, 2)]
    assert [group.signs for group in groups(nn.Sequential(*layers), IMAGES)] == [True]
    layers[1:1] = [nn.BatchNorm2d(4)]
    assert [group.signs for group in groups(nn.Sequential(*layers), IMAGES)] == [False]


def test_a_flipped_sign_before_max_pooling_would_be_wrong() -> None:
    """The refusal has a reason: claim signs for the first layer, and the function changes."""
    net = roused(cnn("tanh"), 0)
    first = groups(net, IMAGES)[0]
    claimed = Group(first.size, first.axes, signs=True)
    tensors = {name: tensor[None] for name, tensor in net.state_dict().items()}
    orders, flips = [torch.arange(8)[None]], [-torch.ones(1, 8)]
    with pytest.raises(FlownError, match="cannot flip"):
        permute(tensors, [first], orders, flips)
    with torch.no_grad():
        before = net(IMAGES)
        changed = permute(tensors, [claimed], orders, flips)
        net.load_state_dict({name: tensor[0] for name, tensor in changed.items()})
        assert (net(IMAGES) - before).abs().max() > 1e-2


def test_residual_streams_share_a_group() -> None:
    found = groups(torchvision.models.resnet18(), torch.zeros(1, 3, 64, 64))
    streams = [{name for name, _, _ in group.axes} for group in found]
    first = next(names for names in streams if "conv1.weight" in names)
    assert {"layer1.0.conv2.weight", "layer1.1.bn2.running_var", "layer2.0.conv1.weight"} <= first
    assert len(found) == 12  # a stream for each stage, and one within each of eight blocks


def test_a_residual_of_the_input_is_never_permuted() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.conv(x)).mean((2, 3)))

    assert groups(Net(), IMAGES) == ()


def test_the_network_is_left_as_it_is() -> None:
    net = Small().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    groups(net, IMAGES)
    assert net.training and net.blocks[0].bn1.training
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


class Cat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x)], dim=1)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gamma = nn.Conv2d(3, 2, 1), nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.gamma


def tied() -> nn.Module:
    net = nn.Sequential(nn.Flatten(), nn.Linear(2352, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[3].weight = net[2].weight
    return net


REFUSED = {
    "cat": (Cat, "operation 'cat'"),
    "trace": (Branching, "Branching cannot be traced"),
    "tensor": (Scaled, "'mul' uses a tensor that belongs to no layer"),
    "tied": (tied, "'3.weight' has a second name"),
    "groups": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2)),
        r"module '1' \(Conv2d\) groups its channels",
    ),
    "module": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelShuffle(2)),
        r"module '1' \(PixelShuffle\) is not known",
    ),
    "shape": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1)),
        r"cannot run on an input \(2, 3, 28, 28\)",
    ),
    "axis": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(28, 5)),
        r"module '1' \(Linear\) reads along another axis",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(FlownError, match=message):
        groups(make(), IMAGES)


def test_permuting_without_one_of_the_tensors_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    found = groups(net, IMAGES)
    parameters = {name: p.detach()[None] for name, p in net.named_parameters()}
    with pytest.raises(FlownError, match=r"1\.running_mean"):
        permute(parameters, found, [torch.arange(4)[None]])
