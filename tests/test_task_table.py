"""Tasks as values: their own images and labels, their table, random ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flown.base.errors import FlownError
from flown.tasks import ManyClass, Task, TaskDraw, TaskTable
from tests import examples

PAGES = ManyClass(
    name="pages",
    classes=tuple(f"c{i}" for i in range(12)),
    images=torch.arange(240, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone(),
    labels=torch.arange(240) % 12,
    class_split={
        "train": torch.arange(8),
        "val": torch.tensor([8, 9]),
        "test": torch.tensor([10, 11]),
    },
)


def task(**changes: object) -> Task:
    values: dict[str, object] = {"id": "t", "dataset": "digits", "classes": ("seven", "one")}
    return Task.parse(values | {"members": (7, 1)} | changes)


def test_a_data_set_is_a_task_with_all_its_images() -> None:
    images = examples.images("digits")
    found = Task.of(images).images(images)
    assert torch.equal(found.test.images, images.test.images) and found.classes == images.classes
    assert torch.equal(found.train.labels, images.train.labels)


def test_labels_are_places_among_the_members() -> None:
    images = examples.images("digits")
    found = task().images(images)
    for part, whole in ((found.train, images.train), (found.val, images.val)):
        for label, member in enumerate((7, 1)):
            chosen = whole.images[whole.labels == member]
            assert torch.equal(part.images[part.labels == label], chosen)


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_images_are_turned(rotation: int) -> None:
    images = examples.images("digits")
    found = task(rotation=rotation).images(images)
    plain = task().images(images)
    assert torch.equal(found.val.images, plain.val.images.rot90(rotation // 90, (2, 3)))


@given(number=st.integers(0, 10_000), seed=st.integers(0, 100), ways=st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_random_tasks(number: int, seed: int, ways: int) -> None:
    """Classes of one part, none twice; parts of a task share no image; the number decides it all."""
    draw = TaskDraw(ways=ways)
    drawn = draw.task(PAGES, number, seed)
    assert drawn == draw.task(PAGES, number, seed)
    assert drawn.members is not None and len(set(drawn.members)) == ways
    assert set(drawn.members) <= set(range(8)), "no class of another part"
    assert drawn.classes == tuple(f"c{member}" for member in drawn.members)
    found = drawn.images(PAGES)
    parts = [
        set(split.images[:, 0, 0, 0].tolist()) for split in (found.train, found.val, found.test)
    ]
    assert [len(part) for part in parts] == [14 * ways, 2 * ways, 4 * ways]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_a_share_of_random_tasks_is_held_out() -> None:
    splits = [TaskDraw(ways=2, held_out=0.25).task(PAGES, i).split for i in range(400)]
    assert 0.19 < splits.count("val") / 400 < 0.31 and set(splits) == {"train", "val"}


def test_the_table_round_trip(tmp_path: Path) -> None:
    table = TaskTable(TaskDraw(ways=3).task(PAGES, i) for i in range(5))
    table.write(tmp_path / "tasks.jsonl")
    again = TaskTable.read(tmp_path / "tasks.jsonl")
    assert list(again.items()) == list(table.items())
    with pytest.raises(FlownError, match=r"unknown task 'pages-000009'\. Did you mean"):
        again["pages-000009"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "dataset": "d", "classes": []}', "line 2: .*needs a class"),
        ('{"id": "a", "dataset": "d", "classes": ["x"], "members": [1, 2]}', "2 members for 1"),
        ('{"id": "a", "dataset": "d", "classes": ["x", "y"], "members": [1, 1]}', "none twice"),
        ('{"id": "a", "dataset": "d", "classes": ["x"], "members": [-1]}', "each a class number"),
        (
            '{"id": "a", "dataset": "d", "classes": ["x"], "split": "tran"}',
            "split: .*'train', 'val'",
        ),
        ('{"id": "a", "dataset": "d", "classes": ["x"], "rotation": 45}', "rotation"),
        ('{"id": "a", "dataset": "d", "clases": ["x"]}', "Did you mean 'classes'"),
        ('{"id": "t", "dataset": "d", "classes": ["x"]}', "two tasks have the id 't'"),
        ("[1, 2]", "expected keys and values"),
        ("{", "line 2: no valid JSON"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "tasks.jsonl").write_text(task().model_dump_json() + "\n" + line + "\n")
    with pytest.raises(FlownError, match=message) as error:
        TaskTable.read(tmp_path / "tasks.jsonl")
    assert "tasks.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_bad_tasks_are_named() -> None:
    images = examples.images("digits")
    with pytest.raises(FlownError, match=r"task 't': member 10 is out of range 0\.\.9"):
        task(members=(7, 10)).images(images)
    few = ManyClass("few", ("seven", "one"), PAGES.images[:3], torch.tensor([0, 0, 1]), {})
    with pytest.raises(FlownError, match="task 't': class 'one' has no image in its val part"):
        task(members=(0, 1)).images(few)
    with pytest.raises(FlownError, match="9 ways asked for, its part 'train' has 8 classes"):
        TaskDraw(ways=9).task(PAGES, 0)
