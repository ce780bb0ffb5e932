"""Table 4: generators asked for another data set's networks, adapted, beside their controls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flown.context.tokens import ContextConfig
from flown.encoders import VAEConfig
from flown.experiments import table4
from flown.experiments.unconditional import Cell
from flown.flow import VelocityConfig
from flown.generator.adapt import AdaptConfig
from flown.generator.config import FlownConfig
from flown.tasks import load
from flown.training import TrainConfig
from flown.zoo import Recipe
from flown.zoo.train.train import train_zoo
from tests import examples
from tests.conftest import DIGITS

_WORDS = ("zero", "bird", "two", "three", "car", "five", "six", "seven", "eight", "nine")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A FLOWN_DATA with digits, and digits turned under other names in part."""
    out = tmp_path / "data"
    out.mkdir()
    for name, names in (
        ("plain", [str(i) for i in range(10)]),
        ("turned", [*"98765", *_WORDS[:5]]),
    ):
        some = examples.images("turned") if name == "turned" else load("digits")
        arrays = {
            f"{part}_{kind}": getattr(getattr(some, part), kind).numpy()
            for part in ("train", "test")
            for kind in ("images", "labels")
        }
        arrays |= {key: value[:, 0] for key, value in arrays.items() if value.ndim == 4}
        np.savez(out / f"{name}.npz", class_names=np.array(names), **arrays)
    monkeypatch.setenv("FLOWN_DATA", str(out))
    return out


def test_the_ceiling_of_a_lone_training(tmp_path: Path) -> None:
    how = DIGITS.model_copy(update={"epochs": 5, "keep": (1, 2, 3, 4, 5)})
    lone = train_zoo(how, 1, tmp_path / "zoo", seed=0)
    assert {row.epoch for row in lone.select(split="held-out").rows} == {5.0}
    found = table4.last_trained(lone)
    assert torch.equal(found.vectors, lone.select(epochs=[4]).batch("digits").vectors)


def test_the_table(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def generator(dataset: str) -> Cell:
        how = Recipe(
            name=dataset, dataset=dataset, learning_rate=5e-3, batch_size=32, epochs=8, keep=(7, 8)
        )
        fit = FlownConfig(
            epochs=(-2, -1),
            encoder=VAEConfig(),
            context=ContextConfig(mode="none"),
            encoder_training=TrainConfig(steps=60, batch_size=8, learning_rate=4e-3),
            velocity=VelocityConfig(channels=16, blocks=1, attention=False),
            flow_training=TrainConfig(steps=60, batch_size=8),
        )
        return Cell(recipe=how, models=4, fit=fit)

    training = TrainConfig(steps=3, batch_size=16, warmup=0, learning_rate=1e-3)
    adaptation = AdaptConfig(networks=2, steps=4, validated=2, training=training)
    exchange = table4.Exchange(
        generators=(generator("plain"), generator("turned")),
        samples=4,
        controls=1,
        adaptations={
            "fine-tuned": adaptation,
            "adjoint": adaptation.model_copy(update={"method": "adjoint"}),
        },
    )
    settings = table4.Table4Config(exchanges=(exchange,), steps=5)
    monkeypatch.setattr(
        table4, "METHODS", tuple(x for x in table4.METHODS if x != "fine-tuned-decoder")
    )
    monkeypatch.setattr(table4, "config", lambda scale, seed: settings)
    out = tmp_path / "out"
    table4.table4(out, "smoke")
    found = json.loads((out / "results.json").read_text())
    rows = {
        (r["source"], r["dataset"], r["method"], r["metric"], r["selection"]): r["value"]
        for r in found["rows"]
    }
    for way in (("plain", "turned"), ("turned", "plain")):
        zoo = rows[(*way, "zoo", "accuracy", "all")]
        assert zoo > 60 and rows[(*way, "static", "accuracy", "all")] < zoo - 20
        for method in ("fine-tuned", "adjoint"):
            assert rows[(*way, method, "seconds", "all")] > 0
            assert 0 <= rows[(*way, method, "diversity-iou", "all")] <= 1
            own, start = (rows[(*way, m, "accuracy", "all")] for m in (method, "static"))
            assert rows[(*way, method, "points over static", "all")] == pytest.approx(own - start)
    page = (out / "report.html").read_text()
    assert "plain to turned" in page and "6 gradient evaluations" in page
    before = {key: value for key, value in rows.items() if key[3] != "seconds"}
    table4.table4(out, "smoke", resume=True)
    again = {
        (r["source"], r["dataset"], r["method"], r["metric"], r["selection"]): r["value"]
        for r in json.loads((out / "results.json").read_text())["rows"]
    }
    assert {key: again[key] for key in before} == before
