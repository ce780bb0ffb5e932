"""Accuracies of many networks at once are those of the networks one by one."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flown import FlownError
from flown.measure.evaluate import evaluate, predictions
from flown.weights.batch import WeightBatch
from tests.examples import images, layout, networks

NETS = [("cnn-small", 1), ("cnn-small", 3), ("cnn-medium", 3)]


@pytest.mark.parametrize(("net", "channels"), NETS)
def test_equals_a_loop_over_modules(net: str, channels: int) -> None:
    batch, test = networks(19, net=net, channels=channels), images("digits").test
    x = batch.preprocess(test.images)
    with torch.no_grad():
        expected = torch.stack([batch.module(i)(x) for i in range(19)])  # (n, N, C)
        torch.testing.assert_close(batch.logits(x), expected, atol=1e-5, rtol=1e-5)
    hits = (expected.argmax(-1) == test.labels).float().mean(dim=1)
    torch.testing.assert_close(evaluate(batch, test.images, test.labels), 100 * hits)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, test = networks(3), images("digits").test
    whole = predictions(batch, test.images)
    monkeypatch.setattr(importlib.import_module("flown.measure.evaluate"), "_IMAGES", 7)
    assert torch.equal(predictions(batch, test.images), whole)


def test_a_network_that_always_says_three() -> None:
    where, test = layout(), images("digits").test
    tensors = where.unpack(torch.zeros(1, where.size))
    tensors[where.names[-1]] = torch.nn.functional.one_hot(torch.tensor([3]), 10).float()
    constant = WeightBatch(where, where.pack(tensors))
    share = 100 * (test.labels == 3).float().mean()
    assert evaluate(constant, test.images, test.labels).item() == pytest.approx(share.item())


def test_colour_images_reach_a_grey_network() -> None:
    test = images("digits").test
    colour = test.images.expand(-1, 3, -1, -1)
    assert torch.equal(predictions(networks(2), colour), predictions(networks(2), test.images))


def test_no_network_gives_no_accuracy() -> None:
    test = images("digits").test
    assert evaluate(networks(2)[:0], test.images, test.labels).shape == (0,)


def test_no_gradient_is_kept() -> None:
    batch, test = networks(2), images("digits").test
    batch.vectors.requires_grad_()
    assert not evaluate(batch, test.images, test.labels).requires_grad


_TEST = images("digits").test
_BAD = {
    "no images": (_TEST.images[:0], _TEST.labels[:0], "N > 0"),
    "fewer labels": (_TEST.images, _TEST.labels[:-1], "59"),
    "label matrix": (_TEST.images, _TEST.labels[:, None], r"\(60, 1\)"),
    "label too large": (_TEST.images, _TEST.labels + 1, "label 10 is out of range 0..9"),
    "label negative": (_TEST.images, _TEST.labels - 1, "label -1"),
    "float labels": (_TEST.images, _TEST.labels.float(), "integer labels"),
    "floats beyond 1": (_TEST.images.float(), _TEST.labels, r"must lie in \[0, 1\]"),
    "one image axis": (_TEST.images[:, 0, 0], _TEST.labels, r"\(60, 8\)"),
    "two channels": (_TEST.images.expand(-1, 2, -1, -1), _TEST.labels, "1 or 3"),
}


@pytest.mark.parametrize("case", _BAD)
def test_bad_input_is_named(case: str) -> None:
    pixels, labels, message = _BAD[case]
    with pytest.raises(FlownError, match=message):
        evaluate(networks(2), pixels, labels)


def test_broken_weights_are_refused() -> None:
    batch = networks(2)
    batch.vectors[1, 5] = torch.nan
    with pytest.raises(FlownError, match="NaN or Inf"):
        evaluate(batch, _TEST.images, _TEST.labels)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(5)), count=st.integers(1, 60))
def test_order_of_networks_and_images_is_kept(order: list[int], count: int) -> None:
    batch = networks(5)
    whole = predictions(batch, _TEST.images)
    assert torch.equal(predictions(batch[order], _TEST.images[:count]), whole[order, :count])


def test_floats_and_grey_images_without_channels_are_the_same_images() -> None:
    batch = networks(3)
    wanted = evaluate(batch, _TEST.images, _TEST.labels)
    for given_images in (_TEST.images / 255, _TEST.images[:, 0], _TEST.images.double() / 255):
        assert torch.equal(evaluate(batch, given_images, _TEST.labels), wanted)
