"""Models of subset zoos: fit, keep, generate, measure; the frozen rest and BatchNorm are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import update_bn

import flown
from flown.base.errors import FlownError
from flown.context.tokens import ContextConfig
from flown.experiments import evaluation
from flown.flow import VelocityConfig
from flown.generator import files as modelfiles
from flown.generator.card import report_card
from flown.generator.config import FlownConfig
from flown.measure.baselines import SUBSET_BASELINES, fitting
from flown.nets.batched import batchnorm
from flown.tasks import ImageData
from flown.training import TrainConfig
from flown.weights.batch import WeightBatch
from flown.zoo import Zoo
from flown.zoo.train.train import train_zoo
from tests import examples
from tests.test_subsets import CONV, NORMS, TINY, Untouchable, drawn

BRIEF = TrainConfig(steps=120, batch_size=8, validate_every=120)
CONFIG = FlownConfig(
    epochs=(),
    encoder_training=BRIEF,
    flow_training=BRIEF,
    context=ContextConfig(mode="none"),
    velocity=VelocityConfig(channels=16, blocks=1),
)
OWN = {f"norm3.{kept}" for kept in ("running_mean", "running_var", "num_batches_tracked")}


def closed(images: ImageData) -> ImageData:
    return ImageData(images.name, images.classes, images.train, images.val, Untouchable())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """One network's trajectory of eight checkpoints, the last two held out."""
    steps = TINY.model_copy(update={"keep_steps": tuple(range(2, 17, 2))})
    return train_zoo(
        steps,
        1,
        tmp_path_factory.mktemp("lone") / "zoo",
        held_out=1 / 4,
        images=examples.images("digits"),
    )


@pytest.fixture(scope="module")
def run(lone: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model fitted with closed eyes for the test images."""
    out = tmp_path_factory.mktemp("fit") / "run"
    flown.Flown.fit(lone, CONFIG, out=out, images={"digits": closed(examples.images("digits"))})
    return out


@pytest.fixture(scope="module")
def model(run: Path) -> flown.Flown:
    return flown.Flown.from_pretrained(run / "model")


def test_generated_networks_are_the_rest_and_the_subset(model: flown.Flown, lone: Zoo) -> None:
    """Against the network built by hand: zoo's rest, generated norms, torch's own update_bn."""
    images = examples.images("digits")
    batch = model.generate(n=3, steps=10)
    with pytest.raises(FlownError, match=r"'norm3' are not known; use .calibrated"):
        batch.module(0)
    ready = batch.calibrated(images.train.images, batches=50, batch_size=16, seed=3)
    seen = [CONV.preprocess(some) for some in batchnorm.draw(images.train.images, 50, 16, 3)]
    x = CONV.preprocess(images.val.images)
    for i in range(3):
        by_hand = examples.ConvNorm()
        own = {name: tensor[i] for name, tensor in batch.layout.unpack(batch.vectors).items()}
        by_hand.load_state_dict(lone.frozen("digits") | own)
        update_bn(seen, by_hand)
        torch.testing.assert_close(ready.module(i)(x), by_hand.eval()(x), atol=1e-4, rtol=1e-4)


def test_generated_networks_are_as_good_as_the_zoos(model: flown.Flown, lone: Zoo) -> None:
    images = examples.images("digits")
    known = lone.batch("digits")
    batches = model.generate(n=8, steps=20), known, model.reconstruct(known)
    made, original, again = (
        flown.evaluate(b.calibrated(images.train.images), images.val.images, images.val.labels)
        for b in batches
    )
    assert made.mean() > original.mean() - 5 and again.mean() > original.mean() - 5


def test_a_kept_model_has_the_rest_once(model: flown.Flown, run: Path, tmp_path: Path) -> None:
    modelfiles.export(run / "model", tmp_path / "half")
    small = flown.Flown.from_pretrained(tmp_path / "half")
    frozen = model.generate(n=1, steps=1).frozen
    assert set(frozen) == set(examples.ConvNorm().state_dict()) - set(NORMS) - OWN
    for name, tensor in small.generate(n=1, steps=1).frozen.items():
        assert tensor.dtype == frozen[name].dtype, name
        torch.testing.assert_close(tensor, frozen[name], atol=1e-3, rtol=1e-3)


def test_history_has_reconstructions_of_late_checkpoints(run: Path) -> None:
    last = json.loads((run / "history.json").read_text())["encoder"][-1]
    assert last["held-out reconstructed"] > last["held-out"] - 10 > 10


def test_card_with_controls(model: flown.Flown, lone: Zoo) -> None:
    images = {"digits": examples.images("digits")}
    card = report_card(model, lone, images, n=3, top=1, shots=1, steps=4).tasks["digits"]
    assert set(SUBSET_BASELINES) < set(card.methods) and "random-init" not in card.methods
    assert len(card.methods["zoo"].test) == 6 and len(card.methods["zoo-held-out"].test) == 2
    calibrated = lone.batch("digits")[:6].calibrated(images["digits"].train.images)
    test = images["digits"].test
    expected = flown.evaluate(calibrated, test.images, test.labels)
    torch.testing.assert_close(card.methods["zoo"].test, expected)
    assert card.methods["subset-default"].test.std() == 0
    assert card.along is not None and len(card.along) == 5


def test_other_epochs_say_what_to_do(lone: Zoo, tmp_path: Path) -> None:
    images = {"digits": examples.images("digits")}
    with pytest.raises(FlownError, match=r"last checkpoints are held out: epochs \[\] takes all"):
        flown.Flown.fit(
            lone, CONFIG.model_copy(update={"epochs": (-1,)}), out=tmp_path / "run", images=images
        )


def test_two_tasks_have_a_rest_each(lone: Zoo, tmp_path: Path) -> None:
    turned = train_zoo(
        TINY.model_copy(update={"dataset": "turned"}),
        2,
        tmp_path / "turned",
        images=examples.images("turned"),
    )
    both, few = Zoo.join([lone, turned], tmp_path / "both"), {"steps": 5}
    images = {task: closed(examples.images(task)) for task in both.tasks}
    config = CONFIG.model_copy(
        update={
            "context": ContextConfig(draws=2, shots=2),
            "encoder_training": BRIEF.model_copy(update=few),
            "flow_training": BRIEF.model_copy(update=few),
        }
    )
    flown.Flown.fit(both, config, out=tmp_path / "run", images=images)
    model = flown.Flown.from_pretrained(tmp_path / "run" / "model")
    some = images["turned"].train[:60]
    for place, task in enumerate(both.tasks):
        assert both.place(task) == place, "equal layouts on other frozen tensors stay apart"
        batch = model.generate(some.images, some.labels, n=2, steps=2, layout=place)
        for name, tensor in batch.frozen.items():
            assert torch.equal(tensor, both.frozen(task)[name]), name


def test_files_of_generated_networks_are_measured(
    model: flown.Flown, lone: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = examples.images("digits")
    monkeypatch.setattr(evaluation.data, "load", lambda name: images)
    batch = model.generate(n=3, steps=4)
    ready = batch.calibrated(images.train.images)
    expected = flown.evaluate(ready, images.test.images, images.test.labels).mean()
    for name, some in (("bare", batch), ("ready", ready)):
        some.save(tmp_path / f"{name}.safetensors")
        lines = list(evaluation.evaluate_file(tmp_path / f"{name}.safetensors", "digits", None))
        assert lines[0].startswith(f"all 3: {float(expected):.1f}")


def test_controls_keep_what_they_say() -> None:
    batch, generator = drawn(NORMS, 4), torch.Generator().manual_seed(0)
    made = {name: draw(batch, 4, generator) for name, draw in SUBSET_BASELINES.items()}
    for name, tensor in batch.layout.unpack(made["subset-default"].vectors).items():
        assert (tensor == (1 if name.endswith("weight") else 0)).all(), name
    original = batch.layout.unpack(batch.vectors)
    for name, tensor in batch.layout.unpack(made["subset-shuffled"].vectors).items():
        same = (tensor.sort(dim=1).values[:, None] == original[name].sort(dim=1).values).all(-1)
        assert same.any(dim=1).all() and not torch.equal(tensor.sort().values, tensor), name
    for name, tensor in batch.layout.unpack(made["subset-mean"].vectors).items():
        assert tensor.std(dim=1).max() < 1e-6, name
        torch.testing.assert_close(tensor[:, 0].sort().values, original[name].mean(1).sort().values)
    assert all(set(x.frozen) == set(batch.frozen) for x in made.values())
    whole = WeightBatch(drawn(None).layout, drawn(None).vectors)
    assert "random-init" in fitting(whole) and "subset-mean" not in fitting(whole)
