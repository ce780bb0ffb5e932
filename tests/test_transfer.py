"""Classes matched by name, and controls that spend what they are given."""

from __future__ import annotations

from dataclasses import replace

import torch

from flown.experiments.transfer import from_best, from_default_init, match_classes
from flown.measure.evaluate import evaluate
from flown.tasks import load
from flown.weights.batch import WeightBatch
from flown.zoo import Zoo


def test_classes_are_matched_by_name() -> None:
    images = replace(
        load("digits"),
        classes=(
            *("cat", "car", "two", "three", "dog"),
            *("five", "six", "seven", "eight", "nine"),
        ),
    )
    known = ("six", "automobile", "bird", "cat", "deer", "dog", *"abcd")
    found = match_classes(images, known)
    assert sorted(found.classes) == sorted(images.classes)
    for shared in ("six", "cat", "dog"):
        assert found.classes.index(shared) == known.index(shared)
    assert found.classes[1] == "car", "an automobile by another name"
    own = [images.classes[int(label)] for label in images.test.labels]
    assert [found.classes[int(label)] for label in found.test.labels] == own
    same = match_classes(images, images.classes)
    assert torch.equal(same.train.labels, images.train.labels)


def test_controls_learn_and_start_where_they_say(zoo: Zoo) -> None:
    images, batch = load("digits"), zoo.select(epochs=[-1]).batch("digits")
    test = images.test
    fresh = from_default_init(batch, images, 2, 200, 32)
    assert len(fresh) == 2 and float(evaluate(fresh, test.images, test.labels).min()) > 50
    again = from_default_init(batch, images, 2, 200, 32)
    assert torch.equal(fresh.vectors, again.vectors)
    val = evaluate(batch, images.val.images, images.val.labels)
    worse = WeightBatch(batch.layout, torch.cat([batch.vectors[:1] * 0, batch.vectors]))
    best = from_best(worse, images, 2, 1, 32)
    moved = (best.vectors - batch.vectors[int(val.argmax())]).abs().max(dim=1).values
    assert (moved > 0).all() and (moved < 0.01).all(), "one step of Adam away from the best"
