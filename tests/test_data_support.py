"""Support sets: what is drawn, and which of a user's tensors are taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flown import tasks as data
from flown.base.errors import FlownError
from tests.test_data_splits import distinct, rows


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_draw_support() -> None:
    split = distinct([9, 12, 7])
    support = data.draw_support(split, 3, 4, rng())
    assert support.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    label_of = dict(zip(rows(split), split.labels.tolist(), strict=True))
    drawn = [image.tobytes() for image in support.images.numpy()]
    assert [label_of[image] for image in drawn] == support.labels.tolist()
    assert len(set(drawn)) == 12
    assert torch.equal(data.draw_support(split, 3, 4, rng()).images, support.images)
    assert not torch.equal(data.draw_support(split, 3, 4, rng(1)).images, support.images)


def test_draw_support_of_some_classes() -> None:
    split = distinct([9, 12, 7])
    support = data.draw_support(split, 3, 2, rng(), classes_subset=[2, 0])
    assert support.labels.tolist() == [0, 0, 1, 1]
    numbers = support.images[:, 0, 0, 0]
    assert (numbers[:2] >= 21).all() and (numbers[2:] < 9).all()


@pytest.mark.parametrize(
    ("shots", "subset", "message"),
    [
        (0, None, "shots=0"),
        (8, None, "class 2 has 7 images, 8 are needed"),
        (1, [], "0 classes"),
        (1, [3], r"class 3 is out of range 0\.\.2"),
    ],
)
def test_support_sets_that_cannot_be(shots: int, subset: list[int] | None, message: str) -> None:
    with pytest.raises(FlownError, match=message):
        data.draw_support(distinct([9, 12, 7]), 3, shots, rng(), classes_subset=subset)


def test_load_support_draws_from_the_training_part() -> None:
    digits = data.load("digits")
    support, classes = data.load_support("digits", shots=3, seed=5)
    assert classes == digits.classes and support.labels.tolist() == sorted([*range(10)] * 3)
    drawn = {image.tobytes() for image in support.images.numpy()}
    assert drawn <= set(rows(digits.train)) and not drawn & set(rows(digits.test))
    support, names = data.load_support("digits", shots=2, classes=("7", "1"))
    assert names == ("7", "1") and support.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(FlownError, match="unknown class of digits: 'eleven'"):
        data.load_support("digits", classes=("eleven",))
    with pytest.raises(FlownError, match="no class"):
        data.load_support("digits", classes=())


def test_check_support_takes_bytes_and_floats() -> None:
    pixels = torch.randint(0, 256, (6, 3, 5, 4), dtype=torch.uint8, generator=rng())
    labels = torch.tensor([0, 1, 2, 2, 1, 0], dtype=torch.int32)
    for images in (pixels, pixels / 255, (pixels / 255).double()):
        checked = data.check_support(images, labels, 3)
        assert torch.equal(checked.images, pixels) and checked.images.dtype == torch.uint8
        assert checked.labels.tolist() == labels.tolist() and checked.labels.dtype == torch.int64
    grey = data.check_support(pixels[:, 0], labels, 3)
    assert torch.equal(grey.images, pixels[:, :1])


GOOD = torch.zeros(4, 1, 8, 8)
LABELS = torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (GOOD.masked_fill(torch.eye(8).bool(), float("nan")), LABELS, "NaN or Inf"),
        (GOOD + float("inf"), LABELS, "NaN or Inf"),
        (GOOD + 2, LABELS, r"\[0, 1\], got \[2, 2\]"),
        (GOOD.long(), LABELS, "expected uint8 or floats, got torch.int64"),
        (GOOD[:, 0, 0], LABELS, r"got \(4, 8\)"),
        (GOOD.expand(4, 2, 8, 8), LABELS, r"1 or 3.* got \(4, 2, 8, 8\)"),
        (GOOD[..., :0], LABELS, "too few"),
        (GOOD[:3], LABELS, r"expected 3, got \(4,\)"),
        (GOOD, LABELS[:, None], r"expected 4, got \(4, 1\)"),
        (GOOD, LABELS.float(), "expected integers, got torch.float32"),
        (GOOD, LABELS.bool(), "expected integers, got torch.bool"),
        (GOOD, LABELS + 1, r"2 is out of range 0\.\.1"),
        (GOOD, LABELS - 1, r"-1 is out of range 0\.\.1"),
        (GOOD, LABELS * 0, "class 1 of 2 has no image"),
        (GOOD[:0], LABELS[:0], "class 0 of 2 has no image"),
        (GOOD.numpy(), LABELS, "images: expected a tensor, got ndarray"),
        (GOOD, [0, 1, 0, 1], "labels: expected a tensor, got list"),
    ],
)
def test_check_support_refuses(images: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(FlownError, match=f"support .*{message}"):
        data.check_support(images, labels, 2)
