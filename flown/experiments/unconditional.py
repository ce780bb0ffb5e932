"""Unconditional generation (FLoWN 3.1): one generator a network and data set, beside a diffusion.

For every cell a zoo is trained (or resumed) by recipe and an encoder on it; on the same latents a
flow and, with the same network and budget, a diffusion are trained: FLoWN and p-diff. All networks
are measured alike, those of the zoo too.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flown import tasks as data
from flown import zoo
from flown.base.config import Config
from flown.base.files import replacing
from flown.base.progress import bar
from flown.base.provenance import Row, digest
from flown.base.run import Run
from flown.experiments.clock import Clock
from flown.generator.card import Card, TaskCard
from flown.generator.config import FlowConfig, FlownConfig
from flown.generator.model import Flown
from flown.measure.baselines import fitting
from flown.measure.reference import Measured, Reference, deviation
from flown.tasks import ImageData
from flown.zoo import Recipe, Zoo

_ENCODER = "encoder.checkpoint.safetensors"


class Cell(Config):
    """A zoo, the models fitted on it, and the settings of the measurement.

    `samples` networks a method; `images` limits the test and validation images, drawn at random,
    where evaluation is slow.
    """

    recipe: Recipe
    models: int
    fit: FlownConfig
    samples: int = 100
    images: int | None = None

    @property
    def about(self) -> dict[str, str]:
        """The values that all rows of the cell share."""
        return {
            "net": self.recipe.net,
            "encoder": self.fit.encoder.kind,
            "dataset": self.recipe.dataset,
        }

    @property
    def name(self) -> str:
        return "{net} ({encoder}), {dataset}".format(**self.about)


class UnconditionalConfig(Config):
    """The settings: cells, and the number of steps of each sampler."""

    cells: tuple[Cell, ...]
    steps: int = 100
    ddpm_steps: int = 1000
    seed: int = 0


@dataclass
class Result:
    """The measurements of a cell: all methods' networks; seconds and NFE of the generators."""

    cell: Cell
    methods: dict[str, Measured]
    costs: dict[str, tuple[float, int]]

    def rows(self) -> list[Row]:
        """In the schema of `results.json`; the best network is chosen on validation images."""
        found: list[Row] = []

        def add(
            method: str,
            metric: str,
            value: float,
            n: int,
            selection: str = "all",
            **extra: float | None,
        ) -> None:
            found.append(
                {
                    **self.cell.about,
                    "method": method,
                    "metric": metric,
                    "value": value,
                    "std": None,
                    "n": n,
                    "selection": selection,
                    "epoch": None,
                    "paper": None,
                    **extra,
                }
            )

        for method, m in self.methods.items():
            n, test = len(m.test), m.test
            add(
                method,
                "accuracy",
                float(test.mean()),
                n,
                std=deviation(test),
                median=float(test.quantile(0.5)),
                min=float(test.min()),
                max=float(test.max()),
            )
            add(method, "accuracy", float(m.top(1)), 1, f"val-best-of-{n}")
            for metric, values in (("l2-ratio", m.ratio), ("max-iou", m.iou)):
                if values is not None:
                    add(method, metric, float(values.mean()), n, std=deviation(values))
            if m.diversity is not None:
                add(method, "diversity-iou", m.diversity, n)
        for method, (seconds, nfe) in self.costs.items():
            n = len(self.methods[method].test)
            add(method, "seconds", seconds, n)
            add(method, "nfe", nfe, n)
        return found


@dataclass
class Unconditional:
    """A finished experiment; `card` has a task a cell."""

    results: list[Result]
    card: Card
    about: dict[str, Any]


class _Originals:
    """A zoo's checkpoints and its baselines, measured once for all encoders."""

    def __init__(self, cell: Cell, trained: Zoo, images: ImageData, seed: int, device: str) -> None:
        self.reference = Reference(
            images,
            trained,
            images.name,
            epochs=cell.fit.epochs,
            every=True,
            most=cell.images,
            device=device,
        )
        train = self.reference.train
        self.methods = self.reference.zoo()
        generator = torch.Generator().manual_seed(seed)
        for name, draw in fitting(train).items():
            if name != "nearest":  # the zoo's own row
                batch = draw(train, cell.samples, generator)
                self.methods[name] = self.reference.measure(batch)


def run(config: UnconditionalConfig, out: Path, *, device: str) -> Unconditional:
    """All cells; each resumes from the files under `out`.

    Raises:
        FlownError: data that is not installed; as `train_zoo`, `Flown.fit` and `Flown.sample`.
    """
    clock = Clock(out / "seconds.json")
    originals: dict[str, _Originals] = {}
    results, counts, zoos = [], {}, {}
    for cell in config.cells:
        name, images = cell.recipe.name, data.load(cell.recipe.dataset)
        trained = zoo.train_zoo(
            cell.recipe,
            cell.models,
            out / "zoos" / name,
            seed=config.seed,
            resume=True,
            device=device,
        )
        models = _fit(
            cell, trained, images, out / "runs" / f"{name}-{cell.fit.encoder.kind}", device
        )
        if name not in originals:
            originals[name] = _Originals(cell, trained, images, config.seed, device)
        results.append(_result(cell, models, originals[name], config))
        zoos[name] = trained.identity
        used = originals[name].reference
        counts[name] = {"train": len(images.train), "val": len(used.choice), "test": len(used.test)}
        clock.record(cell.name)
    about = clock.about(config, {**counts, "zoos": zoos}, device)
    tasks = {
        x.cell.name: TaskCard(
            x.cell.name, x.methods, seconds=x.costs["flown"][0], nfe=x.costs["flown"][1]
        )
        for x in results
    }
    most = max(cell.samples for cell in config.cells)
    card = Card(
        tasks, most, 1, 0, "euler", config.steps, config.seed, device, "", digest(config), counts
    )
    return Unconditional(results, card, about)


def share_encoder(run: Path, folder: Path) -> None:
    """Gives a run that will begin in `folder` the encoder that `run` has trained."""
    target = folder / _ENCODER
    if not target.exists():
        plan = {"encoder of": run.name}
        Run(folder, plan, resume=True, overwrite=False, file="progress.json").begin()
        with replacing(target) as scratch:
            shutil.copy(run / _ENCODER, scratch)


def _fit(cell: Cell, trained: Zoo, images: ImageData, out: Path, device: str) -> dict[str, Flown]:
    """The flow, then the diffusion on the flow's encoder."""
    about: Mapping[str, ImageData] = {images.name: images}
    flow = Flown.fit(trained, cell.fit, out=out / "flown", images=about, resume=True, device=device)
    share_encoder(out / "flown", out / "p-diff")
    diffusing = cell.fit.model_copy(update={"flow": FlowConfig(process="diffusion")})
    diffusion = Flown.fit(
        trained, diffusing, out=out / "p-diff", images=about, resume=True, device=device
    )
    return {"flown": flow, "p-diff": diffusion}


def _result(
    cell: Cell, models: Mapping[str, Flown], originals: _Originals, config: UnconditionalConfig
) -> Result:
    samplers = {"flown": ("euler", config.steps), "p-diff": ("ddpm", config.ddpm_steps)}
    reconstructed = models["flown"].reconstruct(originals.reference.train[: cell.samples])
    measured = {"reconstruction-train": originals.reference.measure(reconstructed)}
    costs = {}
    with bar(f"measuring {cell.name}", len(models)) as update:
        for done, (method, model) in enumerate(models.items(), 1):
            solver, steps = samplers[method]
            samples = model.sample(n=cell.samples, seed=config.seed, solver=solver, steps=steps)
            measured[method] = originals.reference.measure(samples.batch)
            costs[method] = (samples.seconds, samples.nfe)
            update(done, f"{method}: {float(measured[method].test.mean()):.1f} %")
    return Result(cell, originals.methods | measured, costs)
