"""A zoo of random tasks: each network its own label map, shards of any tasks, split by task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import flown
from flown.base.errors import FlownError
from flown.tasks import ManyClass, TaskDraw, draw_support, load
from flown.zoo import Zoo
from flown.zoo.train.lessons import RandomTasks
from tests.conftest import RANDOM


@pytest.fixture(scope="module")
def zoo(random_tasks: Zoo) -> Zoo:
    return random_tasks


def test_every_network_has_its_own_task_and_a_shard_holds_many(zoo: Zoo) -> None:
    assert len(zoo.tasks) == len(zoo) == 24 and len({row.shard for row in zoo.rows}) == 1
    assert len({task.members for task in zoo.tasks.values()}) > 15
    assert len(zoo.layouts) == 1 and zoo.layouts[0].architecture.outputs == 3
    for row in zoo.rows:
        held_out = zoo.tasks[row.task].split != "train"
        assert row.split == ("held-out" if held_out else "train"), "the split is by task"
    assert {row.split for row in zoo.rows} == {"train", "held-out"}


def test_networks_learn_their_own_labels(zoo: Zoo, glyphs: ManyClass) -> None:
    """Recorded accuracies are those of the modules on their own tasks' images; others' are worse."""
    test, elsewhere = [], []
    for place, row in enumerate(zoo.rows):
        images = zoo.tasks[row.task].images(glyphs)
        batch = zoo.batch(row.task)
        x = batch.preprocess(images.val.images)
        found = (batch.module(0)(x).argmax(1) == images.val.labels).float().mean()
        assert row.val_accuracy == pytest.approx(100 * float(found), abs=1e-2)
        test.append(float(flown.evaluate(batch, images.test.images, images.test.labels)))
        other = zoo.tasks[zoo.rows[place - 1].task].images(glyphs)
        elsewhere.append(float(flown.evaluate(batch, other.test.images, other.test.labels)))
    assert sum(test) / len(test) > 80, test
    assert sum(elsewhere) / len(elsewhere) < 50, elsewhere


def test_the_pool_shows_each_network_its_tasks_images(glyphs: ManyClass) -> None:
    lessons = RandomTasks(RANDOM, glyphs, seed=0)
    for model in range(6):
        images = lessons.task(model).images(glyphs)
        for part, split in (("train", images.train), ("val", images.val)):
            rows, labels = lessons.lesson(model, part)
            pool = lessons.images(part)
            seen = {
                (label, image.numpy().tobytes())
                for label, image in zip(labels.tolist(), pool[rows], strict=True)
            }
            given = {
                (label, image.numpy().tobytes())
                for label, image in zip(split.labels.tolist(), split.images, strict=True)
            }
            assert seen <= given and len(seen) > 0.9 * len(given)


def test_several_networks_a_task(glyphs: ManyClass, tmp_path: Path) -> None:
    recipe = RANDOM.model_copy(update={"per_task": 3, "epochs": 1, "keep": (1,)})
    zoo = flown.train_zoo(recipe, 7, tmp_path / "zoo", images=glyphs)
    assert [len(zoo.places[task]) for task in zoo.tasks] == [3, 3, 1]
    vectors = zoo.batch(next(iter(zoo.tasks))).vectors
    assert not torch.equal(vectors[0], vectors[1]), "each from a seed of its own"


def test_networks_are_generated_for_tasks_that_are_in_no_row(
    zoo: Zoo, glyphs: ManyClass, model_of_random_tasks: flown.Flown, tmp_path: Path
) -> None:
    """From many tasks to one that nobody trained on."""
    model = model_of_random_tasks
    model.save_pretrained(str(tmp_path / "model"))
    again = flown.Flown.from_pretrained(tmp_path / "model")
    assert list(again.tasks) == list(zoo.tasks)
    new = TaskDraw(ways=2, part="train").task(glyphs, 999)
    images = new.images(glyphs)
    support = draw_support(images.train, 2, 3, torch.Generator().manual_seed(0))
    with pytest.raises(FlownError, match="has 2 classes, the model generates networks of 3"):
        model.generate(*support, n=2, steps=2)
    three = TaskDraw(ways=3, part="train").task(glyphs, 1000)
    assert three.id not in zoo.tasks
    images = three.images(glyphs)
    support = draw_support(images.train, 3, 3, torch.Generator().manual_seed(0))
    batch = model.generate(*support, n=2, steps=2)
    assert torch.equal(batch.vectors, again.generate(*support, n=2, steps=2).vectors)
    assert flown.evaluate(batch, images.test.images, images.test.labels).shape == (2,)


def test_wrong_images_are_refused(glyphs: ManyClass, tmp_path: Path) -> None:
    with pytest.raises(FlownError, match="a set of many classes, 'digits' is none"):
        flown.train_zoo(RANDOM, 4, tmp_path / "a", images=load("digits"))
    plain = RANDOM.model_copy(update={"tasks": None})
    with pytest.raises(FlownError, match="name `tasks` to draw from it"):
        flown.train_zoo(plain, 4, tmp_path / "b", images=glyphs)
    many = RANDOM.model_copy(update={"tasks": TaskDraw(ways=9)})
    with pytest.raises(FlownError, match="9 ways asked for, its part 'train' has 8 classes"):
        flown.train_zoo(many, 4, tmp_path / "c", images=glyphs)
    norms = RANDOM.model_copy(update={"net": "resnet20", "size": 16})
    with pytest.raises(FlownError, match="has BatchNorm"):
        flown.train_zoo(norms, 4, tmp_path / "d", images=glyphs)
    assert not (tmp_path / "d" / "zoo.json").exists()
