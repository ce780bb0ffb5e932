"""Layouts: exact round trips for every network, alone and padded to a joint space."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flown import nets
from flown.base.errors import FlownError
from flown.weights.layout import JointLayout, Standardizer, Task, WeightLayout


def layout(net: str, channels: int = 1, classes: int = 10) -> WeightLayout:
    task = Task(
        name=f"{net}-{channels}",
        channels=channels,
        size=nets.INPUT_SIZES[net],
        mean=0.5,
        std=0.5,
        classes=tuple(map(str, range(classes))),
        activation="tanh",
    )
    return WeightLayout.of(nets.build(net, channels, classes, "tanh"), net, task)


@pytest.mark.parametrize(
    ("net", "channels", "classes", "size"),
    [
        ("cnn-small", 1, 10, 2464),
        ("cnn-small", 3, 10, 2864),
        ("cnn-medium", 1, 10, 10565),
        ("cnn-medium", 3, 10, 10853),
        ("cnn-medium", 3, 100, 12743),
    ],
)
def test_published_parameter_counts(net: str, channels: int, classes: int, size: int) -> None:
    assert layout(net, channels, classes).size == size


@pytest.mark.parametrize("net", ["cnn-small", "cnn-medium"])
@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_is_exact(net: str, channels: int) -> None:
    key = layout(net, channels)
    vectors = torch.randn(3, key.size)
    assert torch.equal(key.pack(key.unpack(vectors)), vectors)
    module = nets.build(net, channels, 10, "tanh")
    packed = key.pack({k: v[None] for k, v in module.state_dict().items()})
    again = nets.build(net, channels, 10, "tanh")
    again.load_state_dict({k: v[0] for k, v in key.unpack(packed).items()})
    for mine, theirs in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@given(
    channels=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    classes=st.lists(st.integers(2, 12), min_size=4, max_size=4),
)
@settings(max_examples=20, deadline=None)
def test_joint_space_round_trip_and_mask(channels: list[int], classes: list[int]) -> None:
    layouts = [layout("cnn-small", c, k) for c, k in zip(channels, classes, strict=False)]
    joint = JointLayout.of(layouts)
    for task, key in enumerate(layouts):
        vectors = torch.randn(2, key.size)
        padded = joint.embed(vectors, task)
        assert torch.equal(joint.extract(padded, task), vectors)
        assert int(joint.masks[task].sum()) == key.size
        assert not padded[:, ~joint.masks[task]].any()


def test_one_position_means_one_thing() -> None:
    """A grey network's first channel lies where a colour network's first channel lies."""
    grey, colour = layout("cnn-small", 1), layout("cnn-small", 3)
    joint = JointLayout.of([grey, colour])
    tensors = {n: torch.rand(1, *s) for n, s in zip(colour.names, colour.shapes, strict=True)}
    cut = {n: t[:, :, :1] if n == "0.weight" else t for n, t in tensors.items()}
    both = joint.embed(grey.pack(cut), 0), joint.embed(colour.pack(tensors), 1)
    assert torch.equal(both[0][:, joint.masks[0]], both[1][:, joint.masks[0]])


def test_standardizer_uses_real_weights_only() -> None:
    joint = JointLayout.of([layout("cnn-small", 1), layout("cnn-small", 3)])
    tasks = torch.tensor([0] * 4 + [1] * 4)
    vectors = torch.cat(
        [joint.embed(3 + 10**i * torch.randn(4, x.size), i) for i, x in enumerate(joint.layouts)]
    )
    scaler = Standardizer(joint)
    scaler.fit([(vectors, tasks)])
    mask = joint.masks[tasks]
    standard = scaler(vectors, tasks)
    slot = slice(0, 8 * 3 * 25)  # conv1, padded for grey networks
    for task in (0, 1):  # each task has unit scale of its own, however small its weights are
        own = tasks == task
        values = standard[own, slot][mask[own, slot]]
        assert values.mean().abs() < 1e-5 and (values.std() - 1).abs() < 1e-2
    assert not standard[~mask].any()
    assert torch.allclose(scaler.invert(standard, tasks), vectors, atol=1e-5)


def test_refusals_name_the_tensor() -> None:
    key = layout("cnn-small")
    tensors = key.unpack(torch.zeros(1, key.size))
    with pytest.raises(FlownError, match=r"'9.bias' is missing"):
        key.pack({k: v for k, v in tensors.items() if k != "9.bias"})
    with pytest.raises(FlownError, match="unexpected tensor 'extra'"):
        key.pack({**tensors, "extra": torch.zeros(1)})
    with pytest.raises(FlownError, match=r"'0.weight' is \(8, 1, 3, 3\), expected \(8, 1, 5, 5\)"):
        key.pack({**tensors, "0.weight": torch.zeros(1, 8, 1, 3, 3)})
    with pytest.raises(FlownError, match="cannot share a vector space"):
        JointLayout.of([layout("cnn-small"), layout("cnn-medium")])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seen", [(2, 1, 8, 8), (2, 3, 32, 32), (2, 1, 28, 28)])
def test_preprocess_fits_any_image(channels: int, seen: tuple[int, ...]) -> None:
    task = layout("cnn-small", channels).task
    x = task.preprocess(torch.full(seen, 255, dtype=torch.uint8))
    assert x.shape == (2, channels, 28, 28)
    assert torch.allclose(x, torch.ones_like(x), atol=1e-5)  # (1 - 0.5) / 0.5
