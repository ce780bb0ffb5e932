"""Three parts of a data set: a stratified partition, the same for a seed, with no image in two."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flown.base.errors import FlownError
from flown.tasks import Split, three_way


def rows(split: Split) -> list[bytes]:
    return [image.tobytes() for image in split.images.numpy()]


def distinct(counts: list[int], size: int = 4) -> Split:
    """Images that all differ (their number is in their first pixels), counts[i] of class i."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    numbers = torch.arange(len(labels))
    images = torch.zeros(len(labels), 1, size, size, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers % 256, numbers // 256
    return Split(images, labels)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(3, 60), min_size=2, max_size=5),
    seed=st.integers(0, 99),
    fraction=st.floats(0.01, 0.99),
)
def test_parts_are_a_stratified_partition(counts: list[int], seed: int, fraction: float) -> None:
    whole, classes = distinct(counts), tuple(map(str, range(len(counts))))
    split = three_way("x", classes, whole, None, seed=seed, val_fraction=fraction)
    three = (split.train, split.val, split.test)
    parts = [rows(part) for part in three]
    assert sorted(chain(*parts)) == sorted(rows(whole))
    label_of = dict(zip(rows(whole), whole.labels.tolist(), strict=True))
    for part, images in zip(three, parts, strict=True):
        assert part.labels.tolist() == [label_of[image] for image in images]
    for label, count in enumerate(counts):
        train, val, test = (int((part.labels == label).sum()) for part in three)
        assert min(train, val, test) >= 1
        assert test == min(max(1, round(0.2 * count)), count - 1)
        assert val == min(max(1, round(fraction * (count - test))), count - test - 1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_the_seed_alone_decides_the_parts(seed: int) -> None:
    whole = distinct([40, 40])
    first, again = (three_way("x", ("a", "b"), whole, None, seed=seed) for _ in range(2))
    other = three_way("x", ("a", "b"), whole, None, seed=seed + 1)
    assert torch.equal(first.test.images, again.test.images)
    assert torch.equal(first.val.images, again.val.images)
    assert not torch.equal(first.test.images, other.test.images)


@settings(max_examples=40, deadline=None)
@given(pixels=st.lists(st.integers(0, 30), min_size=30, max_size=60), seed=st.integers(0, 9))
def test_no_image_is_in_two_parts_however_often_repeated(pixels: list[int], seed: int) -> None:
    images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 1)
    labels = torch.arange(len(pixels)) % 2
    try:
        split = three_way("x", ("a", "b"), Split(images, labels), None, seed=seed)
    except FlownError as error:
        assert "too few images of class" in str(error)
        return
    train, val, test = (set(rows(part)) for part in (split.train, split.val, split.test))
    assert not (train & val or train & test or val & test)


def test_a_published_test_part_stays_whole() -> None:
    train, test = distinct([30, 30]), distinct([30, 30])[::3]
    assert set(rows(test)) < set(rows(train))
    split = three_way("x", ("a", "b"), train, test)
    assert torch.equal(split.test.images, test.images)
    assert len(split.train) + len(split.val) == len(train) - len(test)
    assert not set(rows(split.test)) & set(rows(split.train) + rows(split.val))


def test_repeats_within_a_part_stay() -> None:
    train = distinct([30, 30])
    test = Split(torch.full((4, 1, 4, 4), 255, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]))
    assert len(three_way("x", ("a", "b"), train, test).test) == 4


@pytest.mark.parametrize(
    ("counts", "test", "options", "message"),
    [
        ([5, 2], None, {}, "class 'b': 2 .* 3 or more"),
        ([5, 0], None, {}, "class 'b': 0"),
        ([5, 1], distinct([1, 1], size=4)[:0], {}, "expected both parts"),
        ([5, 5], distinct([2, 2], size=5), {}, r"\(10, 1, 4, 4\).*\(4, 1, 5, 5\)"),
        ([5, 5], distinct([5, 5]), {}, "class 'a': 0 that no other part"),
        ([5, 5], None, {"val_fraction": 0.0}, "val_fraction .* got 0"),
        ([5, 5], None, {"val_fraction": 1.5}, "val_fraction .* got 1.5"),
        ([5, 5], None, {"test_fraction": -1.0}, "test_fraction .* got -1"),
    ],
)
def test_what_cannot_be_split_is_refused(
    counts: list[int], test: Split | None, options: dict[str, float], message: str
) -> None:
    with pytest.raises(FlownError, match=f"^x: .*{message}"):
        three_way("x", ("a", "b"), distinct(counts), test, **options)
