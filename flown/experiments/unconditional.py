"""Unconditional generation (FLoWN 3.1): one generator a network and data set, beside a diffusion.

For every cell a zoo is trained (or resumed) by recipe and an encoder on it; on the same latents a
flow and, with the same network and budget, a diffusion are trained: FLoWN and p-diff. Everything is
measured alike, the zoo's own networks too.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flown import tasks as data
from flown import zoo
from flown.base.config import Config
from flown.base.files import begin, replacing
from flown.base.progress import bar
from flown.base.provenance import Row, digest
from flown.experiments.clock import Clock
from flown.generator.card import CHOICE, Card, Measured, TaskCard
from flown.generator.fit import FlowConfig, FlownConfig
from flown.generator.model import Flown
from flown.measure.baselines import fitting
from flown.measure.evaluate import predictions
from flown.measure.novelty import (
    held_out_distance,
    largest_iou,
    mutual_iou,
    nearest_distance,
    same_seed,
)
from flown.tasks import ImageData, Split
from flown.weights.batch import WeightBatch
from flown.zoo import Recipe, Zoo

_ENCODER = "encoder.checkpoint.safetensors"


class Cell(Config):
    """A zoo, what is fitted on it, and how that is measured.

    `samples` networks a method; `images` limits the test and validation images, drawn at random,
    where evaluation is what costs.
    """

    recipe: Recipe
    models: int
    fit: FlownConfig
    samples: int = 100
    images: int | None = None

    @property
    def about(self) -> dict[str, str]:
        """What the rows of the cell have in common."""
        return {
            "net": self.recipe.net,
            "encoder": self.fit.encoder.kind,
            "dataset": self.recipe.dataset,
        }

    @property
    def name(self) -> str:
        return "{net} ({encoder}), {dataset}".format(**self.about)


class UnconditionalConfig(Config):
    """What decides the experiment: its cells, and how many steps each sampler takes."""

    cells: tuple[Cell, ...]
    steps: int = 100
    ddpm_steps: int = 1000
    seed: int = 0


@dataclass
class Result:
    """A cell, measured: every method's networks; seconds and NFE of the two generators."""

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
            **more: float | None,
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
                    **more,
                }
            )

        for method, m in self.methods.items():
            n, test = len(m.test), m.test
            add(
                method,
                "accuracy",
                float(test.mean()),
                n,
                std=float(test.std()),
                median=float(test.quantile(0.5)),
                min=float(test.min()),
                max=float(test.max()),
            )
            add(method, "accuracy", float(m.top(1)), 1, f"val-best-of-{n}")
            for metric, values in (("l2-ratio", m.ratio), ("max-iou", m.iou)):
                if values is not None:
                    add(method, metric, float(values.mean()), n, std=float(values.std()))
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
    """A zoo's checkpoints and what is cheap to make of them, measured once for all encoders."""

    def __init__(self, cell: Cell, trained: Zoo, images: ImageData, seed: int, device: str) -> None:
        self.images, self.device = images, device
        self.test = at_most(images.test, cell.images)
        self.choice = at_most(images.val, min(CHOICE, cell.images or CHOICE))
        seen, task = trained.select(split="train"), images.name
        held_out = trained.select(split="held-out").batch(task)
        self.train = seen.batch(task)
        self.unit = held_out_distance(self.train.vectors, held_out.vectors)
        self.wrong, val = self._tested(self.train)
        seeds = [row.seed for row in seen.rows]
        own = self._measured(self.train, self.wrong, val, same_seed(seeds, seeds))
        if len(set(seeds)) == 1:  # there is no other training to compare a checkpoint with
            own.ratio = own.iou = None
        self.methods = {"zoo": own, "zoo-held-out": self.measure(held_out)}
        generator = torch.Generator().manual_seed(seed)
        for name, draw in fitting(self.train).items():
            if name != "nearest":  # the zoo's own row
                self.methods[name] = self.measure(draw(self.train, cell.samples, generator))

    def measure(self, batch: WeightBatch) -> Measured:
        """Accuracies, novelty, diversity."""
        return self._measured(batch, *self._tested(batch))

    def _tested(self, batch: WeightBatch) -> tuple[Tensor, Tensor]:
        """Wrong predictions (n, N) on test images, validation accuracies (n,)."""
        ready = self.train.on(batch.vectors.to(self.device)).calibrated(self.images.train.images)
        wrong = predictions(ready, self.test.images).cpu() != self.test.labels
        right = predictions(ready, self.choice.images).cpu() == self.choice.labels
        return wrong, 100 * right.float().mean(dim=1)

    def _measured(
        self, batch: WeightBatch, wrong: Tensor, val: Tensor, excluded: Tensor | None = None
    ) -> Measured:
        distances = nearest_distance(batch.vectors.cpu(), self.train.vectors, excluded)
        return Measured(
            val,
            100 * (1 - wrong.float().mean(dim=1)),
            distances / self.unit,
            largest_iou(wrong, self.wrong, excluded),
            mutual_iou(wrong),
        )


def run(config: UnconditionalConfig, out: Path, *, device: str) -> Unconditional:
    """All cells, each going on from what is under `out` already.

    Raises:
        FlownError: data that is not here; as `train_zoo`, `Flown.fit` and `Flown.sample`.
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
        used = originals[name]
        counts[name] = {"train": len(images.train), "val": len(used.choice), "test": len(used.test)}
        clock.lap(cell.name)
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


def at_most(split: Split, most: int | None) -> Split:
    """At most so many images, drawn at random, always the same."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return split if most is None else split[order[:most]]


def lend_encoder(run: Path, other: Path) -> None:
    """Lets the run in folder `other`, not begun yet, go on with the encoder that `run` has trained."""
    target = other / _ENCODER
    if not target.exists():
        begin(other, {"encoder of": str(run)})
        with replacing(target) as scratch:
            shutil.copy(run / _ENCODER, scratch)


def _fit(cell: Cell, trained: Zoo, images: ImageData, out: Path, device: str) -> dict[str, Flown]:
    """The flow, then the diffusion on the flow's encoder."""
    about: Mapping[str, ImageData] = {images.name: images}
    flow = Flown.fit(trained, cell.fit, out=out / "flown", images=about, resume=True, device=device)
    lend_encoder(out / "flown", out / "p-diff")
    other = cell.fit.model_copy(update={"flow": FlowConfig(process="diffusion")})
    diffusion = Flown.fit(
        trained, other, out=out / "p-diff", images=about, resume=True, device=device
    )
    return {"flown": flow, "p-diff": diffusion}


def _result(
    cell: Cell, models: Mapping[str, Flown], originals: _Originals, config: UnconditionalConfig
) -> Result:
    samplers = {"flown": ("euler", config.steps), "p-diff": ("ddpm", config.ddpm_steps)}
    rebuilt = models["flown"].reconstruct(originals.train[: cell.samples])
    measured = {"reconstruction-train": originals.measure(rebuilt)}
    costs = {}
    with bar(f"measuring {cell.name}", len(models)) as update:
        for done, (method, model) in enumerate(models.items(), 1):
            solver, steps = samplers[method]
            samples = model.sample(n=cell.samples, seed=config.seed, solver=solver, steps=steps)
            measured[method] = originals.measure(samples.batch)
            costs[method] = (samples.seconds, samples.nfe)
            update(done, f"{method}: {float(measured[method].test.mean()):.1f} %")
    return Result(cell, originals.methods | measured, costs)
