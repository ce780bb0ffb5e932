"""Layouts: exact round trips for every network, alone and padded to a joint space."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flown import nets
from flown.base.errors import FlownError
from flown.nets.architecture import Architecture
from flown.weights.batch import WeightBatch
from flown.weights.layout import JointLayout, WeightLayout


def layout(net: str, channels: int = 1, classes: int = 10) -> WeightLayout:
    architecture = Architecture(
        net=net,
        channels=channels,
        size=nets.INPUT_SIZES[net],
        outputs=classes,
        activation="tanh",
        mean=0.5,
        std=0.5,
    )
    return WeightLayout.of(architecture.build(), architecture)


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


def test_classes_change_places_in_the_last_layer_alone(generator: torch.Generator) -> None:
    """The k-th output of the permuted network is the given one's orders[k]-th."""
    joint = JointLayout.of([layout("cnn-small", 1, 10), layout("cnn-small", 3, 4)])
    for place, key in enumerate(joint.layouts):
        vectors = 0.1 * torch.randn(2, key.size, generator=generator)
        count = key.architecture.outputs
        orders = torch.stack(
            [
                torch.cat([torch.randperm(count, generator=generator), torch.arange(count, 10)])
                for _ in range(2)
            ]
        )
        moved = joint.extract(joint.permute_classes(joint.embed(vectors, place), orders), place)
        x = torch.randn(3, *key.architecture.input_shape, generator=generator)
        before, after = (WeightBatch(key, v).logits(x) for v in (vectors, moved))
        for i in range(2):
            torch.testing.assert_close(after[i], before[i][:, orders[i, :count]])


def test_a_subset_without_a_head_has_no_classes_to_permute() -> None:
    key = layout("cnn-small")
    body = WeightLayout.of(key.architecture.build(), key.architecture, ["0.*", "3.*"])
    with pytest.raises(FlownError, match="its last layer '3' has no row for each of its 10"):
        _ = JointLayout.of([body]).head_rows


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
    architecture = layout("cnn-small", channels).architecture
    x = architecture.preprocess(torch.full(seen, 255, dtype=torch.uint8))
    assert x.shape == (2, channels, 28, 28)
    assert torch.allclose(x, torch.ones_like(x), atol=1e-5)  # (1 - 0.5) / 0.5
