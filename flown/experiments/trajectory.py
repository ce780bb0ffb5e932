"""Trajectory inference (FLoWN 5): flows through the epochs of training, stopped at each of them.

One zoo keeps several epochs. Flows are fitted on the three paths through them, which share one
encoder of all epochs, and a linear flow on the last epoch alone, with its own encoder. Each
generates networks at the time of each epoch; these are measured beside the zoo's networks of that
epoch and trained further beside them, with the same images, order and rate.
"""

from __future__ import annotations

from pathlib import Path

import torch

from flown import tasks as data
from flown import zoo
from flown.base.config import Config
from flown.base.progress import bar
from flown.base.provenance import Row, write_results
from flown.context.tokens import ContextConfig
from flown.encoders import VAEConfig
from flown.experiments.begin import begin
from flown.experiments.clock import Clock
from flown.experiments.unconditional import share_encoder
from flown.flow import VelocityConfig, knot_times
from flown.flow.marginals import PathName
from flown.generator.config import FlowConfig, FlownConfig
from flown.generator.model import Flown
from flown.measure.finetune import FinetuneConfig, finetune
from flown.measure.reference import deviation
from flown.report.trajectory import GAP, write_trajectory
from flown.tasks import ImageData
from flown.training import TrainConfig
from flown.weights.batch import WeightBatch
from flown.zoo import Recipe, Zoo

PATHS: tuple[PathName, ...] = ("linear", "piecewise", "spline", "metric")


class TrajectoryConfig(Config):
    """The settings: `samples` networks a method, by `steps` of a flow; after each of `further`
    epochs of training they are measured."""

    recipe: Recipe
    models: int
    fit: FlownConfig
    finetune: FinetuneConfig
    further: tuple[int, ...] = (0, 1, 5)
    samples: int = 24
    steps: int = 60
    seed: int = 0


def config(scale: str, seed: int = 0) -> TrajectoryConfig:
    """The experiment at a scale: at `cpu` 24 networks of 1600 images, kept at six epochs."""
    name, models, images, epochs, steps, samples = {
        "smoke": ("digits", 4, 320, (1, 2), 20, 4),
        "cpu": ("mnist", 24, 1600, (1, 2, 3, 5, 8, 12), 1500, 24),
        "paper": ("mnist", 100, None, (1, 2, 3, 5, 10, 25), 20_000, 50),
    }[scale]
    recipe = Recipe(
        name=f"trajectory-{name}",
        dataset=name,
        learning_rate=1e-3,
        batch_size=32,
        epochs=epochs[-1],
        keep=epochs,
        max_train_images=images,
    )
    fit = FlownConfig(
        epochs=epochs,
        encoder=VAEConfig.published() if scale == "paper" else VAEConfig(),
        encoder_training=TrainConfig(
            steps=steps, batch_size=32, learning_rate=2e-3, validate_every=steps
        ),
        context=ContextConfig(mode="none"),
        velocity=VelocityConfig(channels=32, blocks=1),
        path_training=TrainConfig(steps=steps, batch_size=64),
        flow_training=TrainConfig(steps=2 * steps, batch_size=64),
        seed=seed,
    )
    further = (0, 1) if scale == "smoke" else (0, 1, 5)
    training = FinetuneConfig(
        epochs=further[-1],
        learning_rate=1e-3,
        test_at=further[:-1],
        max_train_images=images,
        seed=seed,
    )
    return TrajectoryConfig(
        recipe=recipe,
        models=models,
        fit=fit,
        finetune=training,
        further=further,
        samples=samples,
        seed=seed,
    )


def trajectory(
    out: Path,
    scale: str,
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> list[Row]:
    """Runs the experiment; writes `results.json`, `report.html`, zoo and models under `out`."""
    begun = begin(out, "trajectory", scale, seed, resume, overwrite)
    out = begun.path
    return run(config(scale, seed), out, scale, device)


def run(settings: TrajectoryConfig, out: Path, scale: str, device: str = "cpu") -> list[Row]:
    """Resumes from the files in `out`: zoo, models, networks trained further."""
    clock = Clock(out / "seconds.json")
    images = data.load(settings.recipe.dataset)
    made = zoo.train_zoo(
        settings.recipe,
        settings.models,
        out / "zoo",
        seed=settings.seed,
        resume=True,
        device=device,
    )
    rows = _zoo_rows(made, images, settings, out)
    with bar("paths", len(PATHS)) as update:
        for done, path in enumerate(PATHS, 1):
            model = _fit(path, made, images, settings, out / "runs", device)
            networks = _on_the_way(model, settings)
            name = "flown" if path == "linear" else path
            rows += _measured(name, networks, images, settings, out)
            update(done, path)
    rows += _gaps(rows, images.name)
    counts = {"train": len(images.train), "test": len(images.test), "zoo": made.identity}
    clock.record("all")
    about = clock.about(settings, counts, device)
    write_results(out / "results.json", "trajectory", scale, about, rows)
    write_trajectory(out / "report.html", f"Through the epochs, at the {scale} scale", rows, about)
    return rows


def _fit(
    path: PathName, made: Zoo, images: ImageData, settings: TrajectoryConfig, out: Path, device: str
) -> Flown:
    """A model on one path; the paths through the epochs share the first one's encoder."""
    changes: dict[str, object] = {"flow": FlowConfig(path=path)}
    if path == "linear":
        changes["epochs"] = (-1,)
    elif path != PATHS[1]:
        share_encoder(out / PATHS[1], out / path)
    return Flown.fit(
        made,
        settings.fit.model_copy(update=changes),
        out=out / path,
        resume=True,
        images={images.name: images},
        device=device,
    )


def _on_the_way(model: Flown, settings: TrajectoryConfig) -> dict[float, WeightBatch]:
    """The same samples at the time of every epoch."""
    epochs = model.epochs or tuple(map(float, settings.fit.epochs))
    samples = model.sample(
        n=settings.samples, seed=settings.seed, steps=settings.steps, trajectory=True
    )
    assert samples.path is not None
    times = knot_times(len(epochs))
    return {
        epoch: model.decode(samples.path[round(t * settings.steps)])
        for epoch, t in zip(epochs, times, strict=True)
    }


def _zoo_rows(made: Zoo, images: ImageData, settings: TrajectoryConfig, out: Path) -> list[Row]:
    """Accuracies of the checkpoints that the flows learn from, and of held-out networks."""
    rows = []
    for method, split in (("zoo", "train"), ("zoo-held-out", "held-out")):
        batches = {
            float(epoch): made.select(split=split, epochs=[epoch]).batch(images.name)
            for epoch in settings.fit.epochs
        }
        rows += _measured(method, batches, images, settings, out)
    return rows


def _measured(
    method: str,
    networks: dict[float, WeightBatch],
    images: ImageData,
    settings: TrajectoryConfig,
    out: Path,
) -> list[Row]:
    """Test accuracies of networks of every epoch, after further epochs of training."""
    rows: list[Row] = []
    for epoch, batch in networks.items():
        file = out / "further" / f"{method}-{epoch:g}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        done = finetune(batch.to("cpu"), images, settings.finetune, out=file, resume=True)
        for point in done.points:
            if point.epoch in settings.further and point.test is not None:
                rows.append(
                    {
                        "dataset": images.name,
                        "method": method,
                        "metric": "accuracy",
                        "value": float(point.test.mean()),
                        "std": deviation(point.test),
                        "n": len(point.test),
                        "selection": "all",
                        "epoch": point.epoch,
                        "paper": None,
                        "until": epoch,
                    }
                )
    return rows


def _gaps(rows: list[Row], dataset: str) -> list[Row]:
    """The mean distance of each flow from the zoo's accuracy over the epochs, before training."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["epoch"] == 0:
            found.setdefault(row["method"], {})[row["until"]] = row["value"]
    gaps = []
    for method, values in found.items():
        distances = torch.tensor([abs(v - found["zoo"][epoch]) for epoch, v in values.items()])
        if method != "zoo":
            gaps.append(
                {
                    "dataset": dataset,
                    "method": method,
                    "metric": GAP,
                    "value": float(distances.mean()),
                    "std": None,
                    "n": len(distances),
                    "selection": "all",
                    "epoch": 0,
                    "paper": None,
                    "until": None,
                }
            )
    return gaps
