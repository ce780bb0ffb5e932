"""Novelty that counts: can a generator return networks that work and that nobody trained?

Zoos of independently seeded `cnn-small`, as trained and aligned; on each, encoders that differ in
their losses alone. For every variant: reconstructions of training and held-out networks, networks
from the flow and from random latents, beside baselines without training. All figures are of test
images; no network is selected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flown import tasks as data
from flown import zoo
from flown.base.config import Config
from flown.base.errors import FlownError
from flown.base.files import file_name, read_json, write_json
from flown.base.progress import bar
from flown.base.provenance import Row, write_results
from flown.context.tokens import ContextConfig
from flown.encoders.functional import FunctionalConfig
from flown.experiments.begin import begin
from flown.experiments.clock import Clock
from flown.flow import VelocityConfig
from flown.generator.config import FlownConfig
from flown.generator.model import Flown
from flown.measure import reference
from flown.measure.baselines import BASELINES
from flown.measure.evaluate import predictions
from flown.measure.novelty import aligned_distance
from flown.measure.reference import Reference, deviation
from flown.report.novelty import Measured, Points, write_novelty
from flown.tasks import ImageData
from flown.training import TrainConfig
from flown.weights.batch import WeightBatch
from flown.zoo import Recipe, Zoo
from flown.zoo.align.align import align_zoo
from flown.zoo.align.matching import align

_COSTLESS = ("noise-0.06", "noise-0.12", "average-16", "gaussian", "random-init")


class Variant(Config):
    """A variant: a zoo, as trained or aligned, and the settings of a fit to it."""

    name: str
    dataset: str
    aligned: bool
    fit: FlownConfig


class NoveltyConfig(Config):
    """The settings. `samples` networks are drawn from every generator and baseline."""

    recipes: tuple[Recipe, ...]
    models: int
    variants: tuple[Variant, ...]
    samples: int = 50
    steps: int = 50
    seed: int = 0


# Which zoo, the factors of the encoder's errors, and how many times the usual steps.
IDEAS: dict[str, tuple[bool, FunctionalConfig, int]] = {
    "weights": (False, FunctionalConfig(), 1),
    "ce + spread 2": (False, FunctionalConfig(ce=1, spread=2), 1),
    "aligned": (True, FunctionalConfig(), 1),
    "aligned, kl": (True, FunctionalConfig(kl=1), 1),
    "aligned, kl + spread 2": (True, FunctionalConfig(kl=1, spread=2), 1),
    "aligned, ce": (True, FunctionalConfig(ce=1), 1),
    "aligned, ce + spread 1": (True, FunctionalConfig(ce=1, spread=1), 1),
    "aligned, ce + spread 2": (True, FunctionalConfig(ce=1, spread=2), 1),
    "aligned, ce + spread 1, no weights": (True, FunctionalConfig(mse=0, ce=1, spread=1), 1),
    "aligned, kl + spread 1, no weights": (True, FunctionalConfig(mse=0, kl=1, spread=1), 1),
    "aligned, ce + spread 2, twice as long": (True, FunctionalConfig(ce=1, spread=2), 2),
}
# A second data set shows whether the best variants on the first were luck.
_AGAIN = ("aligned", "aligned, ce + spread 1", "aligned, ce + spread 1, no weights")
DATA: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "fashion_mnist": ({}, tuple(IDEAS)),
    "mnist": ({"mean": 0.1307, "std": 0.3081}, _AGAIN),
}


def config(scale: str, seed: int = 0) -> NoveltyConfig:
    """The study at a scale: 120 training networks a data set at `cpu`, 1000 at `paper`."""
    epochs, images, models, steps = {
        "smoke": (2, 640, 12, 20),
        "cpu": (4, 9600, 144, 800),
        "paper": (25, None, 1200, 20_000),
    }[scale]
    recipes = tuple(
        Recipe(
            name=f"novelty-{name}",
            dataset=name,
            learning_rate=3e-3,
            batch_size=32,
            epochs=epochs,
            keep=(epochs,),
            max_train_images=images,
            **preprocessing,
        )
        for name, (preprocessing, _) in DATA.items()
    )
    variants = tuple(
        Variant(
            name=idea,
            dataset=dataset,
            aligned=IDEAS[idea][0],
            fit=FlownConfig(
                encoder_training=TrainConfig(
                    steps=IDEAS[idea][2] * steps,
                    batch_size=32,
                    learning_rate=2e-3,
                    checkpoint_every=100,
                ),
                functional=IDEAS[idea][1],
                context=ContextConfig(mode="none"),
                velocity=VelocityConfig(channels=32, blocks=1),
                flow_training=TrainConfig(steps=steps, batch_size=64),
                seed=seed,
            ),
        )
        for dataset, (_, ideas) in DATA.items()
        for idea in ideas
    )
    return NoveltyConfig(
        recipes=recipes,
        models=models,
        variants=variants,
        seed=seed,
        samples=10 if scale == "smoke" else 50,
    )


class _Aligned(Reference):
    """A zoo's last checkpoints, and figures that also ignore the order of units."""

    def __init__(self, whole: Zoo, images: ImageData) -> None:
        super().__init__(images, whole, next(iter(whole.tasks)), epochs=(-1,))
        if self.held_out is None:
            raise FlownError(f"{whole.path}: novelty is measured in units of held-out networks")
        self.unseen = self.held_out
        self.aligned = align(self.train)
        self.aligned_unit = float(aligned_distance(self.unseen, self.aligned).mean())

    def points(self, batch: WeightBatch, original: WeightBatch | None = None) -> Points:
        """Figures of networks; `original`: the networks that they reconstruct, row by row."""
        found = _points(self.measure(batch))
        aligned = aligned_distance(batch, self.aligned) / self.aligned_unit
        found["l2-ratio-aligned"] = aligned.tolist()
        if original is not None:
            same = self._classes(batch) == self._classes(original)
            found["agreement"] = (100 * same.float().mean(dim=1)).tolist()
        return found

    def _classes(self, batch: WeightBatch) -> torch.Tensor:
        return predictions(batch, self.test.images)

    def originals(self, n: int, seed: int) -> dict[str, Points]:
        """The zoo's networks, with training networks against each other, and the baselines."""
        generator = torch.Generator().manual_seed(seed)
        found = {"zoo": _points(self.zoo()["zoo"])}
        found["zoo-held-out"] = self.points(self.unseen)
        known = self._classes(self.train)
        others = self._classes(self.unseen)  # the agreement of any two networks
        same = [100 * float((known == one).float().mean()) for one in others]
        found["zoo-held-out"]["agreement"] = same
        for name in _COSTLESS:
            found[name] = self.points(BASELINES[name](self.train, n, generator))
        return found

    def model(self, model: Flown, n: int, steps: int, seed: int) -> dict[str, Points]:
        """Reconstructions, samples of the flow, and decoded latents from N(0, I)."""
        originals, generator = self.train[:n], torch.Generator().manual_seed(seed)
        drawn = torch.randn(n, *model.space.shape, generator=generator)
        return {
            "reconstruction-train": self.points(model.reconstruct(originals), originals),
            "reconstruction-held-out": self.points(model.reconstruct(self.unseen), self.unseen),
            "flown": self.points(model.generate(n=n, seed=seed, steps=steps)),
            "latent-gaussian": self.points(model.decode(drawn)),
        }


def _points(found: reference.Measured) -> Points:
    assert found.ratio is not None and found.iou is not None and found.diversity is not None
    return {
        "accuracy": found.test.tolist(),
        "l2-ratio": found.ratio.tolist(),
        "max-iou": found.iou.tolist(),
        "diversity-iou": [found.diversity],
    }


def novelty(
    out: Path,
    scale: str,
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> list[Row]:
    """Runs the study at a scale; writes `results.json`, `report.html`, zoos and models under `out`."""
    begun = begin(out, "novelty", scale, seed, resume, overwrite)
    out = begun.path
    return run(config(scale, seed), out, scale, device)


def run(settings: NoveltyConfig, out: Path, scale: str, device: str = "cpu") -> list[Row]:
    """Resumes from the files in `out`, zoo by zoo and variant by variant."""
    clock = Clock(out / "seconds.json")
    measured: Measured = {}
    counts: dict[str, Any] = {}
    with bar("novelty", len(settings.recipes)) as update:
        for done, recipe in enumerate(settings.recipes, 1):
            name, images = recipe.dataset, data.load(recipe.dataset)
            trained, aligned = _zoos(recipe, settings, out)
            measured[name] = _measure(trained, images, False, settings, out, device)
            measured[name] |= _measure(aligned, images, True, settings, out, device)
            counts[name] = {
                "train": len(images.train),
                "test": len(images.test),
                "zoo": trained.identity,
            }
            clock.record(name)
            update(done, name)
    about = clock.about(settings, counts, device)
    rows = _rows(measured)
    write_results(out / "results.json", "novelty", scale, about, rows)
    write_novelty(out / "report.html", f"Novelty at the {scale} scale", rows, measured, about)
    return rows


def _zoos(recipe: Recipe, settings: NoveltyConfig, out: Path) -> tuple[Zoo, Zoo]:
    """A data set's zoo as trained, and aligned."""
    path = out / "zoos" / file_name(recipe.dataset)
    trained = zoo.train_zoo(recipe, settings.models, path, seed=settings.seed, resume=True)
    aligned = path.with_name(f"{path.name}-aligned")
    if not (aligned / "zoo.json").exists():
        align_zoo(trained, aligned, seed=settings.seed, overwrite=True)
    return trained, Zoo.open(aligned)


def _measure(
    whole: Zoo, images: ImageData, aligned: bool, settings: NoveltyConfig, out: Path, device: str
) -> dict[str, dict[str, Points]]:
    """Figures of a zoo and of the variants fitted to it; files on disk are not made again."""
    n, seed = settings.samples, settings.seed
    found: dict[str, dict[str, Points]] = {}
    known: _Aligned | None = None
    variants = [v for v in settings.variants if (v.dataset, v.aligned) == (images.name, aligned)]
    for variant in (None, *variants):
        name = variant.name if variant else "zoo, aligned" if aligned else "zoo"
        slug = f"{file_name(images.name)}-{file_name(name)}"
        path = out / "measured" / f"{slug}.json"
        if not path.exists():
            known = known or _Aligned(whole, images)
            if variant is None:
                points = known.originals(n, seed)
            else:
                model = Flown.fit(
                    whole,
                    variant.fit,
                    out=out / "runs" / slug,
                    resume=True,
                    images={images.name: images},
                    device=device,
                )
                points = known.model(model.to("cpu"), n, settings.steps, seed)
            write_json(path, points)
        found[name] = read_json(path)
    return found


def _rows(measured: Measured) -> list[Row]:
    rows = []
    for dataset, variants in measured.items():
        for variant, methods in variants.items():
            for method, points in methods.items():
                for metric, numbers in points.items():
                    values = torch.tensor(numbers)
                    rows.append(
                        {
                            "dataset": dataset,
                            "variant": variant,
                            "method": method,
                            "metric": metric,
                            "value": float(values.mean()),
                            "std": deviation(values),
                            "n": len(points["accuracy"]),
                            "selection": "all",
                            "paper": None,
                        }
                    )
    return rows
