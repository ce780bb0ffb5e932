"""The demo, in two acts, on real images that dependencies ship.

First: for each of three tasks some fifty small networks are trained; a weight encoder and one
conditional flow are fitted on all of them; fifty networks a task are generated and measured. Then:
`flown-any` writes networks for digits, which it never saw, from five images each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from flown.base.provenance import write_results
from flown.context.tokens import ContextConfig
from flown.encoders import VAEConfig
from flown.experiments.anytask import AnyTaskStudy, measure
from flown.experiments.begin import begin
from flown.experiments.retrieval import Retrieval, RetrievalConfig, present, run
from flown.experiments.unseen import Unseen
from flown.flow import VelocityConfig
from flown.generator.config import FlownConfig
from flown.generator.model import Flown
from flown.report import write_report
from flown.report.anytask import write_study
from flown.training import TrainConfig
from flown.zoo import recipe

LEAD = (
    "Small image classifiers whose weights were generated from noise, conditioned on five labelled "
    "images a class. One generator serves every task below."
)


def tasks() -> tuple[str, ...]:
    """Digits, MNIST, and Fashion-MNIST if it is installed, otherwise MNIST turned by 90 degrees."""
    third = "fashion_mnist" if "fashion_mnist" in present() else "mnist5k-rot90"
    return "digits", "mnist5k", third


def config(seed: int = 0) -> RetrievalConfig:
    """Sized for two cores and a few minutes."""
    fit = FlownConfig(
        encoder=VAEConfig(),
        encoder_training=TrainConfig(steps=1500, batch_size=32),
        velocity=VelocityConfig(channels=32, blocks=1),
        flow_training=TrainConfig(steps=2500, batch_size=96),
        # One support set a task at a step: drawing them takes most of the time.
        context=ContextConfig(draws=3),
        seed=seed,
    )
    recipes = tuple(recipe(f"demo-{task}") for task in tasks())
    return RetrievalConfig(recipes=recipes, models=48, fit=fit, seed=seed)


def unseen(seed: int = 0) -> list[dict[str, Any]]:
    """Networks written for digits from five images each, beside what these give otherwise."""
    study = AnyTaskStudy(nets=("conv4-32", "cnn-small"), trained_nets=(), seed=seed)
    row = Unseen(set="digits", tasks=5)
    settings = {"scratch": ("cnn-small", 0.01), "base": {}}
    return measure(Flown.from_pretrained("flown-any"), None, row, study, settings)


class Demo(NamedTuple):
    """Both acts: the zoo's generator, and the records of networks for unseen digits."""

    known: Retrieval
    unseen: list[dict[str, Any]]


def demo(
    out: Path, *, seed: int = 0, resume: bool = False, overwrite: bool = False, device: str = "cpu"
) -> Demo:
    """Runs the demo and writes `results.json`, `report.html` and the model under `out`."""
    begun = begin(out, "demo", "cpu", seed, resume, overwrite)
    out = begun.path
    result = run(config(seed), out, resume=resume, device=device)
    written = unseen(seed)
    rows = [*result.card.rows(), *written]
    write_results(out / "results.json", "demo", "cpu", result.about, rows)
    write_study(out / "unseen.html", written, result.about)
    write_report(
        out / "report.html",
        "flown: the demo",
        result.card,
        result.model.history,
        result.about,
        LEAD,
    )
    return Demo(result, written)
