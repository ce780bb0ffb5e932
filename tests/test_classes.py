"""Labels follow class names, not the order that names happen to stand in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import flown
from flown.base.errors import FlownError
from flown.cli import app
from flown.generator.support import sample_for
from flown.measure.finetune import FinetuneConfig, finetune
from flown.tasks import ImageData, Split, Support, TaskTable, in_order, labels_in
from flown.tasks.classes import places, support_in_order
from flown.zoo import Recipe

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SORTED = tuple(sorted(WORDS))


def save(folder: Path, name: str, classes: tuple[str, ...]) -> None:
    """The digits as a named data set whose labels stand for WORDS, numbered as in `classes`."""
    data = flown.load_data("digits")
    table = np.array([classes.index(word) for word in WORDS])
    train, test = data.train, data.test
    np.savez(
        folder / f"{name}.npz",
        train_images=train.images[:, 0].numpy(),
        train_labels=table[train.labels.numpy()],
        test_images=test.images[:, 0].numpy(),
        test_labels=table[test.labels.numpy()],
        class_names=np.array(classes),
    )


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same images three times: counted, in alphabetical order, and with a class of another name."""
    save(tmp_path, "counted", WORDS)
    save(tmp_path, "sorted", SORTED)
    monkeypatch.setenv("FLOWN_DATA", str(tmp_path))
    other = dict(np.load(tmp_path / "counted.npz")) | {"class_names": np.array((*WORDS[:9], "ten"))}
    np.savez(tmp_path / "other.npz", **other)
    return tmp_path


def called(batch: flown.WeightBatch, classes: tuple[str, ...]) -> flown.WeightBatch:
    """The same networks, whose outputs are called `classes`."""
    task = flown.Task(id="digits", dataset="digits", classes=classes)
    return flown.WeightBatch(batch.layout, batch.vectors, batch.provenance, task=task)


def test_places_of_names() -> None:
    assert places(("a", "b"), ("a", "b")) == [0, 1]
    assert places(("b", "c", "a"), ("a", "b", "c")) == [1, 2, 0]
    assert places(("0", "1", "10", "2"), ("0", "1", "2", "10")) == [0, 1, 3, 2]
    assert places(("caf\u00e9", "b"), ("b", "cafe\u0301")) == [1, 0]
    assert places(("a", "b"), ("a", "c")) is None
    assert places(("a", "a"), ("a", "a")) is None


def test_labels_follow_names() -> None:
    labels = torch.tensor([0, 0, 2, 1])
    assert labels_in(labels, ("b", "c", "a"), ("a", "b", "c"), "x").tolist() == [1, 1, 0, 2]
    for given, wanted in ((("0", "1", "2"), ("a", "b", "c")), (("a", "b", "c"), ("0", "1", "2"))):
        assert labels_in(labels, given, wanted, "x").tolist() == labels.tolist()
    with pytest.raises(
        FlownError, match="x: classes differ, the networks know 'c' where the data h"
    ):
        labels_in(labels, ("a", "b", "d"), ("a", "b", "c"), "x")
    with pytest.raises(FlownError, match="x: 2 classes, the networks have 3"):
        labels_in(labels, ("a", "b"), ("a", "b", "c"), "x")


def test_a_data_set_in_order() -> None:
    part = Split(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 2]))
    data = ImageData("x", ("b", "c", "a"), part, part, part)
    made = in_order(data, ("a", "b", "c"), "zoo")
    assert made.classes == ("a", "b", "c") and made.name == "x"
    assert all(x.labels.tolist() == [1, 2, 0] for x in (made.train, made.val, made.test))
    assert in_order(made, ("a", "b", "c"), "zoo") is made
    assert in_order(data, ("a", "b", "d"), None) is data
    with pytest.raises(FlownError, match="zoo: 'x': classes differ, the networks know 'd'"):
        in_order(data, ("a", "b", "d"), "zoo")


def test_a_support_set_in_order() -> None:
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
    support = Support(images, torch.tensor([0, 0, 1, 1]))
    made, names = support_in_order(support, ("b", "a"), [("x", "y"), ("a", "b")])
    assert names == ("a", "b") and made.labels.tolist() == [0, 0, 1, 1]
    assert made.images[:, 0, 0, 0].tolist() == [2, 3, 0, 1]
    same, names = support_in_order(support, ("b", "a"), [("x", "y")])
    assert same is support and names == ("b", "a")


def test_evaluation_by_name(zoo: flown.Zoo) -> None:
    batch, data = called(zoo.batch("digits"), WORDS), flown.load_data("digits")
    straight = flown.evaluate(batch, data.test.images, data.test.labels)
    turned = labels_in(data.test.labels, WORDS, SORTED, "x")
    assert (
        float(flown.evaluate(batch, data.test.images, turned).mean()) < 30 < float(straight.mean())
    )
    named = flown.evaluate(batch, data.test.images, turned, SORTED)
    assert torch.equal(named, straight)
    assert torch.equal(
        flown.evaluate(batch, data.test.images, data.test.labels, data.classes), straight
    )
    with pytest.raises(FlownError, match="the networks know 'nine' where the data has 'ten'"):
        flown.evaluate(batch, data.test.images, turned, (*WORDS[:9], "ten"))


def test_the_command_compares_names(sets: Path, zoo: flown.Zoo) -> None:
    file = sets / "nets.safetensors"
    called(zoo.batch("digits"), WORDS).save(file)
    run = CliRunner().invoke
    lines = [run(app, ["evaluate", str(file), "--data", x]).stdout for x in ("counted", "sorted")]
    first = [
        line.partition("\n")[0] for line in lines
    ]  # validation images are drawn class by class
    assert first[0] == first[1] and "% of 359 test images" in first[0]
    refused = run(app, ["evaluate", str(file), "--data", "other"])
    assert isinstance(refused.exception, FlownError)
    assert "nets.safetensors: 'other': classes differ" in str(refused.exception)


def test_finetuning_keeps_the_networks_order(zoo: flown.Zoo) -> None:
    data = flown.load_data("digits")
    named = replace(data, classes=WORDS)
    batch = called(zoo.batch("digits")[:2], WORDS)
    config = FinetuneConfig(epochs=1, max_train_images=64)
    straight = finetune(batch, named, config)
    turned = in_order(named, SORTED, None)
    again = finetune(batch, turned, config)
    assert again.networks.task is not None and again.networks.task.classes == WORDS
    assert torch.equal(again.networks.vectors, straight.networks.vectors)
    other = replace(data, classes=tuple(f"x{word}" for word in WORDS))
    renamed = finetune(batch, other, config).networks.task
    assert renamed is not None and renamed.classes == other.classes


def test_a_zoo_goes_on_in_the_order_that_it_was_begun_in(sets: Path, tmp_path: Path) -> None:
    recipe = Recipe(name="n", dataset="counted", batch_size=32, epochs=1, keep=(1,))
    whole = flown.train_zoo(recipe, 2, tmp_path / "zoo")
    begun = tmp_path / "begun"

    class Stop(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flown.zoo.train.train.Shard.epochs", lambda _: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            flown.train_zoo(recipe, 2, begun)
    turned = in_order(flown.load_data("counted"), SORTED, None)
    resumed = flown.train_zoo(recipe, 2, begun, images=turned, resume=True)
    assert resumed.tasks["counted"].classes == WORDS
    assert torch.equal(resumed.batch("counted").vectors, whole.batch("counted").vectors)


def test_fitting_compares_names(zoo: flown.Zoo, tmp_path: Path) -> None:
    data = flown.load_data("digits")
    tasks = TaskTable([flown.Task(id="digits", dataset="digits", classes=WORDS)])
    named = flown.Zoo(zoo.path, zoo.layouts, tasks, zoo.rows, zoo.about)
    images = {"digits": replace(data, classes=(*WORDS[:9], "ten"))}
    with pytest.raises(FlownError, match="task 'digits': 'digits' has no class 'nine'"):
        flown.Flown.fit(named, out=tmp_path / "run", images=images)


def test_generating_for_named_classes(model: flown.Flown, sets: Path) -> None:
    samples, warning = sample_for(model, "digits", 2, steps=2)
    assert warning is None and samples.batch.task.classes == tuple(map(str, range(10)))
    samples, warning = sample_for(model, "sorted", 2, steps=2)
    assert warning is not None and "has classes called 'eight', 'five', ..." in warning
    assert samples.batch.task.classes == SORTED
    assert samples.batch.provenance["classes"] == list(SORTED)


def test_generating_in_the_tasks_own_order(run: Path, sets: Path, tmp_path: Path) -> None:
    model = flown.Flown.from_pretrained(run / "model")
    model.tasks = TaskTable([flown.Task(id="digits", dataset="digits", classes=WORDS)])
    samples, warning = sample_for(model, "sorted", 2, shots=5, steps=2)
    assert warning is None and samples.batch.task.classes == WORDS
    assert samples.batch.provenance["classes"] == list(WORDS)


def support() -> Support:
    data = flown.load_data("digits")
    rows = torch.cat([(data.train.labels == c).nonzero().flatten()[:2] for c in range(10)])
    return Support(data.train.images[rows], data.train.labels[rows])
