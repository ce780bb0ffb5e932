"""The demo: three tasks of real images that dependencies ship, from training to generated networks.

For every task some fifty small networks are trained; a weight encoder and one conditional flow are
fitted on all of them; fifty networks a task are generated from five images a class and measured.
"""

from __future__ import annotations

from pathlib import Path

from flown.base.provenance import write_results
from flown.context.tokens import ContextConfig
from flown.encoders import VAEConfig
from flown.experiments.begin import begin
from flown.experiments.retrieval import Retrieval, RetrievalConfig, present, run
from flown.flow import VelocityConfig
from flown.generator.config import FlownConfig
from flown.report import write_report
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
        context=ContextConfig(
            draws=3
        ),  # one support set a task at a step: drawing them takes most of the time
        seed=seed,
    )
    recipes = tuple(recipe(f"demo-{task}") for task in tasks())
    return RetrievalConfig(recipes=recipes, models=48, fit=fit, seed=seed)


def demo(
    out: Path, *, seed: int = 0, resume: bool = False, overwrite: bool = False, device: str = "cpu"
) -> Retrieval:
    """Runs the demo and writes `results.json`, `report.html` and the model under `out`."""
    out = begin(out, "demo", "cpu", seed, resume, overwrite)
    result = run(config(seed), out, resume=resume, device=device)
    write_results(out / "results.json", "demo", "cpu", result.about, result.card.rows())
    write_report(
        out / "report.html",
        "flown: the demo",
        result.card,
        result.model.history,
        result.about,
        LEAD,
    )
    return result
