"""Table 3: generated networks as a start for training, beside initialisations and lookup.

One generator is fitted on checkpoints from the middle of four zoos' training (the paper's epochs 21
to 25 of 50). Networks that it generates from random support sets are trained further on those data
sets and on unseen ones; all methods share the images' order, batches and learning rate. The rate is
the one that suits the best of the three initialisations on validation images of each data set,
which favours them. A second generator, of the same settings, flows through earlier epochs of the
same trainings and starts from the last one, or from one chosen on validation images. STL-10 is used
if its data is installed; otherwise `natural10` takes its place under its own name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from flown.base.config import Config
from flown.base.files import file_name
from flown.base.provenance import Row, write_results
from flown.encoders import VAEConfig
from flown.experiments import targets
from flown.experiments.begin import begin
from flown.experiments.clock import Clock
from flown.experiments.retrieval import build_zoo, present
from flown.experiments.starts import INITS, Starts, starts
from flown.flow import VelocityConfig
from flown.generator.config import FlownConfig
from flown.generator.model import Flown
from flown.measure.evaluate import evaluate
from flown.measure.finetune import FinetuneConfig, Point, finetune
from flown.measure.reference import deviation
from flown.report.finetuning import AHEAD, ANY, GAP, LEAD, THROUGH, write_table3
from flown.tasks import ImageData
from flown.training import TrainConfig
from flown.weights.batch import WeightBatch
from flown.zoo import Recipe, recipe

_SETS = ("mnist", "fashion_mnist", "cifar10", "stl10", "usps", "svhn", "kmnist")
_PAPER = {
    ("flown", 0): (83.58, 68.50, 45.93, 35.16, 57.53, 17.99, 11.79),
    ("flown", 1): (84.49, 69.09, None, 36.15, 72.45, 68.64, 51.15),
    ("flown", 5): (87.68, 70.32, None, 37.43, 76.96, None, 69.14),
    ("flown", 25): (92.29, 73.72, 49.25, 40.14, 82.28, None, 79.11),
    ("recipe-init", 1): (18.12, 26.90, None, 18.94, 17.69, 19.50, 14.48),
    ("recipe-init", 5): (35.05, 51.08, None, 28.24, 32.77, None, 30.00),
    ("recipe-init", 25): (87.70, 70.69, 46.86, 36.75, 82.02, None, 55.05),
    ("recipe-init", 50): (92.76, 72.88, 48.85, 40.47, 88.35, 63.70, 64.32),
}  # cells that the paper's text lost are None
PAPER = {
    (dataset, method, epoch): value
    for (method, epoch), values in _PAPER.items()
    for dataset, value in zip(_SETS, values, strict=True)
}
TRAJECTORY, STOPPED = THROUGH
_FEWEST_STEPS = 10  # an epoch
UNSEEN = ("usps", "svhn", "svhn_small", "kmnist", targets.TEN_WAY)


class Table3Config(Config):
    """The settings.

    `samples` networks a method; test images are measured at `epochs`. Training sees at most
    `max_train_images`, in batches of `batch_size`, or smaller ones so that an epoch has ten; at
    most `max_val_images` validation images are used. The learning rate is chosen among `rates` by
    `rate_samples` networks of each initialisation after `rate_epochs`. As many networks choose the
    epoch at which the flow through `trajectory` stops.
    """

    recipes: tuple[Recipe, ...]
    models: int
    fit: FlownConfig
    trajectory: tuple[int, ...]
    unseen: tuple[str, ...]
    epochs: tuple[int, ...] = (0, 1, 5, 25, 50)
    samples: int = 6
    steps: int = 100
    batch_size: int = 32
    max_train_images: Optional[int] = None
    max_val_images: Optional[int] = None
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    rate_epochs: int = 5
    rate_samples: int = 2
    seed: int = 0

    @property
    def through(self) -> FlownConfig:
        """`fit` with a spline path through the epochs of `trajectory`."""
        flow = self.fit.flow.model_copy(update={"path": "spline"})
        return self.fit.model_copy(update={"epochs": self.trajectory, "flow": flow})


def config(scale: str, seed: int = 0) -> Table3Config:
    """The experiment at a scale; `cpu` trains zoos to the middle of their recipes only, and
    fine-tunes on at most 1000 images."""
    available = present()
    last = "stl10" if "stl10" in available else "natural10"
    unseen = tuple(
        x for x in UNSEEN if x in available and not (x == "svhn_small" and "svhn" in available)
    )
    recipes = tuple(
        recipe(f"{d}-small", scale) for d in ("mnist", "fashion_mnist", "cifar10", last)
    )
    if scale == "paper":
        fit = FlownConfig(
            epochs=(21, 22, 23, 24, 25),
            encoder=VAEConfig.published(),
            encoder_training=TrainConfig(steps=40_000, batch_size=32),
            velocity=VelocityConfig(channels=128),
            flow_training=TrainConfig(steps=40_000, batch_size=32),
            seed=seed,
        )
        through = (5, 10, 15, 20, 25)
        kept = {"epochs": 25, "keep": tuple(sorted({*fit.epochs, *through}))}
        recipes = tuple(x.model_copy(update=kept) for x in recipes)
        return Table3Config(
            recipes=recipes,
            models=100,
            fit=fit,
            trajectory=through,
            unseen=unseen,
            batch_size=10,
            samples=50,
            seed=seed,
        )
    smoke = scale == "smoke"
    recipes = tuple(_to_the_middle(x, smoke) for x in recipes)
    fit = FlownConfig(
        encoder_training=TrainConfig(
            steps=60 if smoke else 3000, batch_size=32, learning_rate=2e-3, validate_every=500
        ),
        velocity=VelocityConfig(channels=32, blocks=1),
        flow_training=TrainConfig(steps=60 if smoke else 3000, batch_size=96),
        seed=seed,
    )
    if smoke:
        return Table3Config(
            recipes=recipes,
            models=4,
            fit=fit,
            trajectory=(-2, -1),
            unseen=unseen[:1],
            epochs=(0, 1, 2),
            samples=2,
            steps=5,
            max_train_images=320,
            rates=(1e-3, 3e-3),
            rate_epochs=1,
            rate_samples=1,
            seed=seed,
        )
    return Table3Config(
        recipes=recipes,
        models=24,
        fit=fit,
        trajectory=(-4, -3, -2, -1),
        unseen=unseen,
        max_train_images=1000,
        max_val_images=500,
        seed=seed,
    )


def _to_the_middle(recipe: Recipe, smoke: bool) -> Recipe:
    """Trained to the first epoch that is kept for good, and kept at 2, 3, 4 and 5 fifths of it."""
    middle = min(recipe.keep)
    keep = recipe.keep if smoke else tuple(middle * fifths // 5 for fifths in (2, 3, 4, 5))
    return recipe.model_copy(update={"epochs": keep[-1], "keep": keep})


def table3(
    out: Path,
    scale: str,
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> list[Row]:
    """Runs the experiment, every stage resumable; writes `results.json` and `report.html`."""
    begun = begin(out, "table3", scale, seed, resume, overwrite)
    out = begun.path
    return run(config(scale, seed), out, scale, device)


def run(settings: Table3Config, out: Path, scale: str, device: str) -> list[Row]:
    """The experiment with any settings; resumes from the files in `out`."""
    clock = Clock(out / "seconds.json")
    zoo = build_zoo(settings.recipes, settings.models, out, settings.seed, resume=True)
    clock.record("zoo")
    model = Flown.fit(zoo, settings.fit, out=out / "run", resume=True, device=device)
    clock.record("fit")
    trajectory = Flown.fit(
        zoo, settings.through, out=out / "trajectory", resume=True, device=device
    )
    clock.record("trajectory")
    seen = zoo.select(split="train", epochs=settings.fit.epochs)
    rows: list[Row] = []
    curves: dict[str, dict[str, list[Point]]] = {}
    counts: dict[str, Any] = {"checkpoints": len(zoo), "zoo": zoo.identity}
    for name in (*zoo.tasks, *settings.unseen):
        images = targets.target(name, settings.seed)
        images = replace(images, val=images.val[: settings.max_val_images])
        counts[name] = {part: len(getattr(images, part)) for part in ("train", "val", "test")}
        made = starts(
            model, trajectory, seen, images, settings.samples, settings.steps, settings.seed
        )
        found = _Target(settings, images, made, out, device)
        curves[name] = found.curves()
        rows += found.rows(curves[name])
        if name in zoo.tasks:
            rows += found.beside(seen.batch(name))
        clock.record(name)
    about = clock.about(settings, counts, device)
    about["encoders"] = {
        "flown": model.history["encoder"][-1:],
        TRAJECTORY: trajectory.history["encoder"][-1:],
    }
    write_results(out / "results.json", "table3", scale, about, rows)
    write_table3(out / "report.html", scale, rows, curves, about)
    return rows


class _Target:
    """One data set: its learning rate, the stop of the trajectory, the training of every method's
    networks, its rows."""

    def __init__(
        self, settings: Table3Config, images: ImageData, made: Starts, out: Path, device: str
    ) -> None:
        self.settings, self.images, self.made, self.device = settings, images, made, device
        self.out = out / "finetuned"
        self.trained = min(len(images.train), settings.max_train_images or len(images.train))
        self.batch_size = min(settings.batch_size, max(1, self.trained // _FEWEST_STEPS))
        self.rate = self._rate()
        self.stop = self._stop()
        self.batches = made.batches | {STOPPED: made.stops[self.stop]}

    def _config(self, rate: float, epochs: int, test_at: tuple[int, ...] = ()) -> FinetuneConfig:
        return FinetuneConfig(
            epochs=epochs,
            learning_rate=rate,
            batch_size=self.batch_size,
            test_at=test_at,
            max_train_images=self.settings.max_train_images,
            seed=self.settings.seed,
        )

    def _finetune(self, batch: WeightBatch, config: FinetuneConfig, name: str) -> list[Point]:
        file = self.out / f"{file_name(self.images.name)}-{name}.safetensors"
        done = finetune(batch, self.images, config, out=file, resume=True, device=self.device)
        return done.points

    def _rate(self) -> float:
        """The rate that suits the best initialisation on validation images; the lowest of equals."""
        n = self.settings.rate_samples
        batches = [self.made.batches[method][:n] for method in INITS]
        joined = WeightBatch(batches[0].layout, torch.cat([batch.vectors for batch in batches]))
        best = {}
        for rate in self.settings.rates:
            last = self._finetune(
                joined, self._config(rate, self.settings.rate_epochs), f"rate-{rate:g}"
            )[-1]
            best[rate] = float(last.val.unflatten(0, (len(INITS), n)).mean(dim=1).max())
        return max(best, key=lambda rate: best[rate])

    def _stop(self) -> float:
        """The epoch whose networks are best on validation images; the last of equals."""
        config = self._config(self.rate, self.settings.rate_epochs)
        best = {}
        for epoch, batch in self.made.stops.items():
            sample = batch[: self.settings.rate_samples]
            best[epoch] = float(self._finetune(sample, config, f"stop{epoch:g}")[-1].val.mean())
        return max(best, key=lambda epoch: (best[epoch], epoch))

    def curves(self) -> dict[str, list[Point]]:
        """Every method's networks, trained."""
        config = self._config(self.rate, max(self.settings.epochs), self.settings.epochs)
        found: dict[str, list[Point]] = {}
        for method, batch in self.batches.items():
            same = next(
                (
                    other
                    for other in found
                    if torch.equal(self.batches[other].vectors, batch.vectors)
                ),
                None,
            )
            found[method] = found[same] if same else self._finetune(batch, config, method)
        each = [
            self._finetune(batch, config, f"{ANY}-{i}") for i, batch in enumerate(self.made.written)
        ]
        found[ANY] = [_joined(points) for points in zip(*each, strict=True)]
        return found

    def rows(self, curves: dict[str, list[Point]]) -> list[Row]:
        """Accuracies by method and epoch, leads of the flow through the epochs over the other flow,
        and leads over the best initialisation."""
        rows = []
        for method, points in curves.items():
            for point in points:
                if point.test is not None:
                    rows.append(self._row(method, "accuracy", point.test, point.epoch))
        means = {(row["method"], row["epoch"]): row["value"] for row in rows}
        for method in THROUGH:
            for point, other in zip(curves[method], curves["flown"], strict=True):
                if point.test is not None and other.test is not None:
                    ahead = point.test - other.test
                    rows.append(self._row(method, AHEAD, ahead, point.epoch))
        for epoch in self.settings.epochs:
            best = max(INITS, key=lambda init: means[init, epoch])
            for method in ("flown", ANY):
                lead = means[method, epoch] - means[best, epoch]
                rows.append(self._row(method, LEAD, torch.tensor([lead]), epoch) | {"over": best})
        return rows

    def beside(self, zoo: WeightBatch) -> list[Row]:
        """All the zoo's training checkpoints of this data set, and FLoWN's distance to them."""
        test = self.images.test
        accuracies = evaluate(zoo, test.images, test.labels)
        generated = evaluate(self.made.batches["flown"], test.images, test.labels)
        gap = (generated.mean() - accuracies.mean())[None]
        return [self._row("zoo", "accuracy", accuracies, 0), self._row("flown", GAP, gap, 0)]

    def _row(self, method: str, metric: str, values: Tensor, epoch: int) -> Row:
        batch = self.made.written[0] if method == ANY else self.batches.get(method)
        stops = sorted(self.made.stops)
        until = {TRAJECTORY: stops[-1], STOPPED: self.stop}.get(method)
        paper = PAPER.get((self.images.name, method, epoch)) if metric == "accuracy" else None
        return {
            "dataset": self.images.name,
            "method": method,
            "metric": metric,
            "value": float(values.mean()),
            "std": deviation(values),
            "n": len(values),
            "epoch": epoch,
            "paper": paper,
            "until": until,
            "selection": f"val-best-of-{len(stops)}-stops" if method == STOPPED else "all",
            "networks_of": self.images.name if batch is None else (batch.task and batch.task.id),
            "layout_of": self.made.task,
            "votes": f"{self.made.votes} of {self.settings.samples}",
            "learning_rate": self.rate,
            "batch_size": self.batch_size,
            "train_images": self.trained,
            "test_images": len(self.images.test),
            "note": targets.NOTES.get(self.images.name),
        }


def _joined(points: tuple[Point, ...]) -> Point:
    """One epoch of networks that were trained apart."""

    def every(name: str) -> Tensor | None:
        parts = [getattr(point, name) for point in points]
        return None if parts[0] is None else torch.cat(parts)

    val = every("val")
    assert val is not None
    return Point(points[0].epoch, val, every("loss"), every("test"))
