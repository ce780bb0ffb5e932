"""The yardstick against a plain loop over networks, and every measurement of one batch alike."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flown
from flown.base.errors import FlownError
from flown.context.tokens import ContextConfig
from flown.encoders import IdentityConfig
from flown.experiments import evaluation, unconditional
from flown.flow import VelocityConfig
from flown.generator import card as cards
from flown.generator.config import FlownConfig
from flown.measure.reference import Evaluator, Measured, Reference, at_most, deviation
from flown.tasks import Split, load
from flown.training import TrainConfig
from flown.weights.batch import WeightBatch
from flown.zoo import Zoo
from tests import examples
from tests.conftest import DIGITS
from tests.test_subsets import drawn

DATA = examples.images("digits")


def by_hand(batch: WeightBatch, split: Split) -> torch.Tensor:
    """Accuracies (n,) in percent, network by network."""
    x, found = batch.preprocess(split.images), []
    with torch.no_grad():
        for i in range(len(batch)):
            right = batch.module(i)(x).argmax(dim=1) == split.labels
            found.append(100 * right.double().mean().float())
    return torch.stack(found)


def select(zoo: Zoo, split: str, *epochs: int) -> WeightBatch:
    return zoo.select("digits", split, epochs or None).batch("digits")


def test_accuracies_are_those_of_a_loop(zoo: Zoo) -> None:
    data, train = load("digits"), select(zoo, "train", -1)
    found = Reference(data, zoo, "digits").measure(train)
    torch.testing.assert_close(found.test, by_hand(train, data.test))
    torch.testing.assert_close(found.val, by_hand(train, data.val))
    assert found.test.min() > 50, "networks that were trained"


def test_batch_norm_is_estimated_on_training_images_or_kept() -> None:
    batch = drawn(None, 3)
    ready = batch.calibrated(DATA.train.images, batches=50, batch_size=64)
    expected = by_hand(ready, DATA.test)
    torch.testing.assert_close(Evaluator(DATA).measure(batch).test, expected)
    other = batch.calibrated(DATA.train.images, batches=1, batch_size=2)
    kept = Evaluator(DATA).measure(other).test
    torch.testing.assert_close(kept, by_hand(other, DATA.test))
    assert (kept - expected).abs().max() > 1, "an image is 1.7 points"


def test_equal_networks_have_equal_figures_in_their_places() -> None:
    batch = examples.networks(4)
    repeated = batch[[3, 0, 0, 2, 3]]
    found = Evaluator(DATA).measure(repeated)
    torch.testing.assert_close(found.test, by_hand(repeated, DATA.test))


def test_novelty_is_measured_against_all_epochs_that_were_fitted_on(zoo: Zoo) -> None:
    data = load("digits")
    early, late = select(zoo, "train", 8), select(zoo, "train", 10)
    held = select(zoo, "held-out", 8, 10).vectors
    whole = Reference(data, zoo, "digits")
    assert whole.measure(early).ratio.max() == 0 == whole.measure(late).ratio.max()  # type: ignore[union-attr]
    one = Reference(data, zoo, "digits", epochs=(-1,))
    assert one.measure(early).ratio.min() > 0  # type: ignore[union-attr]
    assert torch.equal(one.train.vectors, late.vectors) and one.epoch == 10
    vectors = torch.cat([early.vectors, late.vectors]).double()
    unit = torch.stack([(vectors - x).norm(dim=1).min() for x in held.double()]).mean()
    assert whole.unit == pytest.approx(float(unit), rel=1e-5)
    assert torch.equal(whole.train.vectors, late.vectors), "the last epoch stands for the zoo"
    every = Reference(data, zoo, "digits", every=True)
    assert len(every.train) == 20 and every.epoch is None
    assert float(every.zoo()["zoo-held-out"].ratio.mean()) == pytest.approx(1, abs=1e-5)  # type: ignore[union-attr]


def test_a_network_is_its_model_and_not_its_seed(tmp_path: Path) -> None:
    """Four networks of a grid share a seed: they are four, and compared with each other."""
    made = examples.make_zoo(tmp_path / "zoo", ("digits",), models=6, held_out=2)
    grid = Zoo(
        made.path, made.layouts, made.tasks, [r._replace(seed=0) for r in made.rows], made.about
    )
    for epochs in ((), (-1,)):
        one, other = (Reference(DATA, x, "digits", epochs=epochs) for x in (made, grid))
        assert one.unit == other.unit and not other.single
        for name, measured in one.zoo().items():
            again = other.zoo()[name]
            assert measured.ratio is not None and again.ratio is not None
            assert torch.equal(measured.ratio, again.ratio)
            assert torch.isfinite(again.ratio).all() and again.ratio.min() > 0.5


def test_a_lone_network_is_measured_beside_its_last_checkpoints(tmp_path: Path) -> None:
    made = examples.make_zoo(tmp_path / "zoo", ("digits",), models=1, held_out=0)
    rows = [r._replace(split="held-out" if r.epoch == 2 else "train") for r in made.rows]
    lone = Zoo(made.path, made.layouts, made.tasks, rows, made.about)
    reference = Reference(DATA, lone, "digits")
    found = reference.zoo()
    assert found["zoo"].ratio is None and found["zoo-held-out"].ratio is not None
    assert found["zoo-held-out"].ratio.tolist() == [1]
    with pytest.raises(FlownError, match=r"no training network in epochs \(-1,\)"):
        Reference(DATA, lone, "digits", epochs=(-1,))


def test_a_lone_training_is_evaluated_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = DIGITS.model_copy(update={"epochs": 2, "keep": (), "keep_steps": (10, 20, 30, 40)})
    lone = flown.train_zoo(steps, 1, tmp_path / "zoo", held_out=1 / 4)
    lone.select(split="train").batch("digits").save(tmp_path / "nets.safetensors")
    lines = list(evaluation.evaluate_file(tmp_path / "nets.safetensors", "digits", lone.path))
    assert lines[-3].startswith("zoo 'digits', 3 training networks: ")
    assert lines[-2] == "L2 to the nearest of them over held-out's own: 0.00"
    assert lines[-1] == "largest IoU of errors with one of them: 1.00"


def test_card_file_and_table_agree_on_one_batch(tmp_path: Path) -> None:
    """A generator's networks by `report_card`, `evaluate_file` and the cell of Table 1."""
    zoo = flown.train_zoo(
        DIGITS.model_copy(update={"epochs": 3, "keep": (2, 3)}), 5, tmp_path / "zoo"
    )
    data, brief = load("digits"), TrainConfig(steps=5, batch_size=8)
    fit = FlownConfig(
        epochs=(),
        encoder=IdentityConfig(),
        context=ContextConfig(mode="none"),
        velocity=VelocityConfig(channels=8, blocks=1),
        flow_training=brief,
    )
    model = flown.Flown.fit(zoo, fit, out=tmp_path / "run")
    n, steps = 7, 3
    report = cards.report_card(model, zoo, {"digits": data}, n=n, top=2, steps=steps, full=False)
    shown = report.tasks["digits"].methods
    sampler = cards._Sampler(model, {}, {"digits": 0}, n, 0, "euler", steps)
    batch = cards._joined(sampler.draw("digits", "digits", n))
    batch.save(tmp_path / "nets.safetensors")

    cell = unconditional.Cell(recipe=DIGITS, models=5, fit=fit)
    reference = unconditional._Originals(cell, zoo, data, 0, "cpu").reference
    table, carded = reference.measure(batch), shown["flown"]
    for name in ("val", "test", "ratio", "iou"):
        torch.testing.assert_close(getattr(table, name), getattr(carded, name))
    assert table.diversity == pytest.approx(carded.diversity)
    torch.testing.assert_close(carded.test, by_hand(batch, data.test))

    lines = list(evaluation.evaluate_file(tmp_path / "nets.safetensors", "digits", zoo.path, 2))
    numbers = [float(re.findall(r"-?\d+\.\d+", line)[0]) for line in lines]
    assert carded.ratio is not None and carded.iou is not None and carded.diversity is not None
    expected = [
        *(carded.test.mean(), carded.test.quantile(0.5), carded.top(2).mean()),
        *(carded.diversity, shown["zoo"].test.mean(), carded.ratio.mean(), carded.iou.mean()),
    ]
    for number, value in zip(numbers, expected, strict=True):
        assert number == pytest.approx(float(value), abs=0.0501)


def test_selection_is_on_validation_images() -> None:
    measured = Measured(val=torch.tensor([1.0, 9, 5]), test=torch.tensor([70.0, 20, 40]))
    assert measured.top(1).tolist() == [20]
    assert measured.top(2).tolist() == [20, 40]


def test_a_share_of_the_images_is_always_the_same() -> None:
    some, again = at_most(DATA.val, 9), at_most(DATA.val, 9)
    assert torch.equal(some.images, again.images) and len(some) == 9
    assert at_most(DATA.val, None) is DATA.val and len(at_most(DATA.val, 10**6)) == len(DATA.val)
    few = Evaluator(replace(DATA, val=DATA.val), most=20)
    assert (len(few.choice), len(few.test)) == (20, 20)


def test_deviation_is_of_a_sample() -> None:
    assert deviation(torch.tensor([1.0, 3.0])) == pytest.approx(2**0.5)
    assert deviation(torch.tensor([1.0])) is None
