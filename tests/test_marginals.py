"""Flows through the epochs of a zoo: which checkpoints, stopping at an epoch, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import flown
from flown.base.errors import FlownError
from flown.context.tokens import ContextConfig
from flown.encoders import VAEConfig
from flown.flow import VelocityConfig, integrate
from flown.flow.marginals import PathName, time_of, trajectories
from flown.generator.config import FlowConfig, FlownConfig
from flown.generator.data import TrainingSet
from flown.training import TrainConfig
from tests import examples

BRIEF = TrainConfig(steps=2, batch_size=4)


def config(path: PathName = "spline", epochs: tuple[int, ...] = (1, 2)) -> FlownConfig:
    return FlownConfig(
        epochs=epochs,
        encoder=VAEConfig(side=8, width=8, multipliers=(1, 2)),
        encoder_training=BRIEF,
        velocity=VelocityConfig(channels=8, blocks=1),
        context=ContextConfig(mode="none"),
        flow=FlowConfig(path=path),
        path_training=BRIEF,
        flow_training=BRIEF,
    )


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> flown.Zoo:
    return examples.make_zoo(
        tmp_path_factory.mktemp("zoo"), ("digits", "turned"), models=4, held_out=1
    )


def fit(zoo: flown.Zoo, how: FlownConfig, out: Path, resume: bool = False) -> flown.Flown:
    images = {task: examples.images(task) for task in zoo.tasks}
    return flown.Flown.fit(zoo, how, out=out, images=images, resume=resume)


def test_a_training_is_one_networks_checkpoints_in_order(zoo: flown.Zoo) -> None:
    networks = TrainingSet.of(zoo, (1, 2)).train
    places, epochs = trajectories(networks, (1, 2))
    assert places.shape == (6, 2)
    assert epochs == (1, 2)
    assert sorted(places.flatten().tolist()) == list(range(12))
    for own in places:
        rows = [zoo.rows[networks.places[i]] for i in own]
        assert [row.epoch for row in rows] == [1, 2]
        assert len({(row.task, row.model) for row in rows}) == 1
        assert torch.allclose(networks.raw(own[1:]), 1.01 * networks.raw(own[:1])), (
            "the examples' epochs"
        )


def test_epochs_counted_from_the_last_may_differ(zoo: flown.Zoo) -> None:
    rows = [row._replace(epoch=5 * row.epoch) if row.task == "turned" else row for row in zoo.rows]
    longer = flown.Zoo(zoo.path, zoo.layouts, zoo.tasks, rows, zoo.about)
    counted = TrainingSet.of(longer, (-1, -2)).train
    places, epochs = trajectories(counted, (-1, -2))
    assert epochs == (-2, -1)
    same, _ = trajectories(TrainingSet.of(zoo, (1, 2)).train, (1, 2))
    assert torch.equal(places, same)
    assert trajectories(TrainingSet.of(zoo, (-1, -2)).train, (-1, -2))[1] == (1, 2), "epochs of all"
    with pytest.raises(FlownError, match="no checkpoint of epoch"):
        trajectories(TrainingSet.of(longer, ()).train, ())
    rows = [row for row in rows if row.task == "turned" or row.epoch == 2]
    fewer = flown.Zoo(zoo.path, zoo.layouts, zoo.tasks, rows, zoo.about)
    with pytest.raises(FlownError, match="'digits' has no checkpoint of epoch -2"):
        trajectories(TrainingSet.of(fewer, (-1, -2)).train, (-1, -2))


@pytest.mark.parametrize("path", ["piecewise", "spline", "metric"])
def test_stops_at_an_epoch_and_resumes(path: PathName, zoo: flown.Zoo, tmp_path: Path) -> None:
    model = fit(zoo, config(path), tmp_path / "run")
    torch.nn.init.normal_(model.velocity.out.weight, std=0.1)
    assert model.epochs == (1, 2)
    whole = model.sample(n=3, steps=8, trajectory=True)
    early = model.sample(n=3, steps=8, until=1)
    assert whole.path is not None
    assert torch.allclose(early.latents, whole.path[4], atol=1e-6), "its share of the steps"
    assert early.nfe == 4
    assert early.batch.provenance["until"] == 1
    assert torch.equal(model.generate(n=3, steps=8, until=2).vectors, whole.batch.vectors)
    few = integrate(model.velocity.bind(), early.source, steps=1, t1=0.5).x
    assert torch.allclose(model.sample(n=3, steps=1, until=1).latents, few), "one step at least"
    model.save_pretrained(str(tmp_path / "model"))
    again = flown.Flown.from_pretrained(tmp_path / "model")
    assert torch.equal(again.generate(n=3, steps=8, until=1).vectors, early.batch.vectors)
    one = flown.Flown.from_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "model" / "config.json").unlink()
    two = fit(zoo, config(path), tmp_path / "run", resume=True)
    assert torch.equal(one.generate(n=1, steps=2).vectors, two.generate(n=1, steps=2).vectors)


def test_a_linear_flow_has_no_epochs(zoo: flown.Zoo, tmp_path: Path) -> None:
    model = fit(zoo, config("linear"), tmp_path / "run")
    assert model.epochs == ()
    with pytest.raises(FlownError, match=r"no epoch 1; it passes through none: its path is linear"):
        model.generate(n=1, until=1)


def test_models_of_before_are_linear(zoo: flown.Zoo, tmp_path: Path) -> None:
    fit(zoo, config("linear"), tmp_path / "run")
    file = tmp_path / "run" / "model" / "config.json"
    values = json.loads(file.read_text())
    del values["epochs"], values["config"]["path_training"], values["config"]["flow"]["path"]
    file.write_text(json.dumps(values))
    assert flown.Flown.from_pretrained(file.parent).epochs == ()


def test_refusals(zoo: flown.Zoo, tmp_path: Path) -> None:
    with pytest.raises(FlownError, match=r"epoch 7 was not kept; there are 1, 2"):
        fit(zoo, config(epochs=(1, 2, 7)), tmp_path / "a")
    with pytest.raises(FlownError, match=r"needs several epochs, there is 2 only"):
        fit(zoo, config(epochs=(-1,)), tmp_path / "b")
    with pytest.raises(FlownError, match=r"no epoch 3; it passes through 1, 2"):
        time_of(3, (1, 2))
    with pytest.raises(FlownError, match=r"leave them\s+out"):
        FlownConfig.parse({"flow": {"process": "diffusion", "path": "spline"}})
    networks = TrainingSet.of(zoo, (1, 2)).train
    networks.places = networks.places[:-1]
    with pytest.raises(FlownError, match="no checkpoint of epoch"):
        trajectories(networks, ())
    networks.zoo.rows = [row._replace(epoch=1.0) for row in networks.zoo.rows]
    with pytest.raises(FlownError, match="two checkpoints of epoch 1"):
        trajectories(networks, ())
