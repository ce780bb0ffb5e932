"""Few-shot tasks: what every draw must fulfil, whatever the sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from flown.base.errors import FlownError
from flown.heads.tasks import check_disjoint, draw_tasks, folder_tasks

SIZES = torch.tensor([9, 12, 7, 30, 8, 11, 9])  # images a class; classes 0 and 5 are not asked for
LABELS = torch.arange(7).repeat_interleave(SIZES)[torch.randperm(86, generator=torch.Generator())]
ROWS = torch.arange(86.0)[:, None]  # a feature that is the row's own number
ASKED = torch.tensor([6, 1, 2, 3, 4])


@given(
    ways=st.integers(1, 5),
    shots=st.integers(1, 4),
    queries=st.integers(1, 3),
    count=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_every_draw(ways: int, shots: int, queries: int, count: int, seed: int) -> None:
    tasks = draw_tasks(ROWS, LABELS, ASKED, ways, shots, queries, count, seed)
    assert tasks.support.shape == (count, ways * shots, 1)
    assert tasks.query.shape == (count, ways * queries, 1)
    assert set(tasks.classes.flatten().tolist()) <= set(ASKED.tolist())
    both = torch.cat([tasks.support, tasks.query], dim=1)[..., 0].long()
    for rows, classes in zip(both, tasks.classes, strict=True):
        assert len(rows.unique()) == len(rows), "an image stands twice in a task"
        assert len(classes.unique()) == ways
        own = torch.cat([classes[tasks.labels], classes[tasks.targets]])
        assert torch.equal(LABELS[rows], own)


def test_the_seed_decides_and_more_tasks_change_none() -> None:
    some = draw_tasks(ROWS, LABELS, ASKED, 3, 2, 2, 5, seed=4)
    more = draw_tasks(ROWS, LABELS, ASKED, 3, 2, 2, 1100, seed=4)
    assert torch.equal(some.support, more.part(slice(5)).support)
    assert torch.equal(some.query, more.part(torch.arange(5)).query)
    other = draw_tasks(ROWS, LABELS, ASKED, 3, 2, 2, 5, seed=5)
    assert not torch.equal(some.support, other.support)


def test_all_classes_and_images_come_equally_often() -> None:
    tasks = draw_tasks(ROWS, LABELS, ASKED, 2, 1, 1, 8000)
    share = torch.bincount(tasks.classes.flatten(), minlength=7)[ASKED] / 16000
    assert (share - 0.2).abs().max() < 0.02
    rows = tasks.support.flatten().long()
    of_three = torch.bincount(rows[LABELS[rows] == 3], minlength=86)[LABELS == 3]
    assert (of_three / of_three.sum() - 1 / 30).abs().max() < 0.012


def test_what_cannot_be_drawn_is_refused() -> None:
    for ways, shots, queries, count, message in (
        (6, 1, 1, 1, "6 ways asked for, there are 5 classes"),
        (5, 4, 4, 1, "class 2 has 7 images, 8 are needed"),
        (2, 0, 1, 1, "shots=0"),
        (2, 1, 1, 0, "count=0"),
    ):
        with pytest.raises(FlownError, match=message):
            draw_tasks(ROWS, LABELS, ASKED, ways, shots, queries, count)
    with pytest.raises(FlownError, match="86 rows of features, 85 labels"):
        draw_tasks(ROWS, LABELS[1:], ASKED, 2, 1, 1, 1)


def test_parts_that_share_a_class_are_refused() -> None:
    parts = {"train": torch.arange(5), "val": torch.arange(5, 8), "test": torch.arange(8, 12)}
    check_disjoint(parts)
    with pytest.raises(FlownError, match="class 4 is in both 'train' and 'test'"):
        check_disjoint(parts | {"test": torch.tensor([9, 4])})


def test_tasks_from_a_folder(tmp_path: Path) -> None:
    for i, name in enumerate(("a cat", "ein Hund", "Öl")):
        (tmp_path / name).mkdir()
        for j in range(4):
            Image.new("L", (4, 4), 10 * i + j).save(tmp_path / name / f"{j}.png")

    class Mean(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean(dim=(2, 3))

    tasks, names = folder_tasks(tmp_path, Mean(), 3, 2, 2, 6)
    assert names == ("a cat", "ein Hund", "Öl")
    assert torch.equal((tasks.query[..., 0] / 10).long(), tasks.classes[:, tasks.targets])
