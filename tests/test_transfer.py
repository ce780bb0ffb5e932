"""Classes matched by name, and controls that spend what they are given."""

from __future__ import annotations

from dataclasses import replace

import torch

import flown
from flown.experiments.transfer import from_best, from_default_init, match_classes, measure
from tests import fakes


def test_classes_are_matched_by_name() -> None:
    images = replace(fakes.images("digits"), classes=(*"abcdefghi", "car"))
    names = ("x", "automobile", "c", "b", *"uvwyz", "a")
    matched = match_classes(images, names)
    assert matched.classes == ("d", "car", "c", "b", "e", "f", "g", "h", "i", "a")
    for old, new in zip(images.test.labels, matched.test.labels, strict=True):
        assert matched.classes[int(new)] == images.classes[int(old)]
    assert match_classes(images, images.classes).train.labels.equal(images.train.labels)


def test_controls_learn_within_their_budget() -> None:
    images, static = fakes.images("digits"), fakes.networks(3)
    started = measure(static, images).test.mean()
    fresh = from_default_init(static, images, 2, 60, 32)
    assert len(fresh) == 2 and not torch.equal(fresh.vectors[0], fresh.vectors[1])
    assert measure(fresh, images).test.mean() > started + 20
    best = flown.evaluate(static, images.val.images, images.val.labels).argmax()
    near = from_best(static, images, 2, 1, 32)
    assert (near.vectors - static.vectors[best]).abs().max() < 0.02, "one step of Adam from there"
