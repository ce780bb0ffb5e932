"""Model retrieval (FLoWN 3.1, Table 2): one generator for several tasks, told apart by images.

Zoos are trained (or resumed) by recipe, joined, and one model is fitted on all of them; then the
report card is made. The demo and Table 2 differ in their settings alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flown import tasks as data
from flown import zoo
from flown.base.config import Config
from flown.base.files import file_name
from flown.base.provenance import Row
from flown.experiments.clock import Clock
from flown.generator import modelcard
from flown.generator.card import Card, report_card
from flown.generator.config import FlownConfig
from flown.generator.model import Flown
from flown.zoo import Recipe, Zoo


class RetrievalConfig(Config):
    """The settings of a retrieval experiment."""

    recipes: tuple[Recipe, ...]
    models: int
    fit: FlownConfig
    samples: int = 50
    top: int = 5
    steps: int = 100
    seed: int = 0


@dataclass
class Retrieval:
    """A finished experiment."""

    zoo: Zoo
    model: Flown
    card: Card
    about: dict[str, Any]


def present() -> set[str]:
    """Names of the installed data sets."""
    return {source.name for source in data.available() if source.present}


def build_zoo(recipes: Sequence[Recipe], models: int, out: Path, seed: int, resume: bool) -> Zoo:
    """Trains one zoo a recipe under `out/zoos` and joins them in `out/zoo`."""
    parts = [
        zoo.train_zoo(
            recipe, models, out / "zoos" / file_name(recipe.dataset), seed=seed, resume=resume
        )
        for recipe in recipes
    ]
    if resume and (out / "zoo" / "zoo.json").exists():
        return Zoo.open(out / "zoo")
    return Zoo.join(parts, out / "zoo", overwrite=True)


def run(config: RetrievalConfig, out: Path, *, resume: bool, device: str) -> Retrieval:
    """Zoo, fit, report card."""
    clock = Clock(out / "seconds.json")
    whole = build_zoo(config.recipes, config.models, out, config.seed, resume)
    clock.record("zoo")
    images = {task: data.load(task) for task in whole.tasks}
    model = Flown.fit(
        whole,
        config.fit,
        out=out / "run",
        images=images,
        resume=resume,
        overwrite=True,
        device=device,
    )
    clock.record("fit")
    card = report_card(
        model, whole, images, n=config.samples, top=config.top, seed=config.seed, steps=config.steps
    )
    counts = {**card.counts, "checkpoints": len(whole), "zoo": whole.identity}
    clock.record("measuring")
    about = clock.about(config, counts, device)
    model.card = {"rows": modelcard.kept(card.rows())}
    model.save_pretrained(str(out / "run" / "model"))
    return Retrieval(whole, model, card, about)


def paper_rows(rows: list[Row], figures: dict[tuple[str, str], float]) -> list[Row]:
    """The rows, with the paper's figure where it has one, by (dataset, method)."""
    return [
        {**row, "paper": figures.get((row["dataset"], row["method"]))}
        if row["metric"] == "accuracy"
        else row
        for row in rows
    ]
