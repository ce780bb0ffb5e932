"""Layer-wise vectorisation (FLoWN A.2.1) on whole networks of more than 250,000 weights: ResNet-20.

One training run's late checkpoints are the zoo, the last of them held out; the chunked VAE encodes a
network chunk by chunk, and an unconditional flow generates the latents of all chunks at once. The
aim: reconstructions and generated networks within a point of the originals.
"""

from __future__ import annotations

from pathlib import Path

from flown import tasks as data
from flown import zoo
from flown.base.config import Config
from flown.base.provenance import write_results
from flown.context.tokens import ContextConfig
from flown.encoders import ChunkedConfig
from flown.experiments.begin import begin
from flown.experiments.clock import Clock
from flown.experiments.retrieval import Retrieval
from flown.flow import VelocityConfig
from flown.generator.card import report_card
from flown.generator.config import FlownConfig
from flown.generator.model import Flown
from flown.report import write_report
from flown.tasks import ImageData
from flown.training import TrainConfig
from flown.zoo import Recipe, recipe


class ChunkedExperiment(Config):
    """The settings; `val_images` and `test_images` limit the images, the first ones are used."""

    recipe: Recipe
    models: int
    fit: FlownConfig
    val_images: int
    test_images: int
    samples: int
    top: int = 3
    steps: int = 50
    seed: int = 0


def config(scale: str, seed: int = 0) -> ChunkedExperiment:
    """The experiment at a scale; `paper` is meant for a GPU."""
    encoder, flow, batch, channels = {
        "smoke": (20, 20, 4, 16),
        "cpu": (300, 300, 4, 16),
        "paper": (20_000, 20_000, 32, 64),
    }[scale]
    fit = FlownConfig(
        epochs=(),
        encoder=ChunkedConfig(),
        encoder_training=TrainConfig(
            steps=encoder, batch_size=batch, learning_rate=3e-3, validate_every=encoder
        ),
        context=ContextConfig(mode="none"),
        velocity=VelocityConfig(channels=channels, blocks=1),
        flow_training=TrainConfig(steps=flow, batch_size=4 * batch),
        seed=seed,
    )
    val, test, samples = {"smoke": (50, 50, 4), "cpu": (500, 1000, 6), "paper": (2000, 10_000, 50)}[
        scale
    ]
    return ChunkedExperiment(
        recipe=recipe("fashion_mnist-resnet20", scale),
        models=1,
        fit=fit,
        val_images=val,
        test_images=test,
        samples=samples,
        seed=seed,
    )


def chunked(
    out: Path,
    scale: str,
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> Retrieval:
    """Runs the experiment; writes `results.json`, `report.html` and the model under `out`."""
    begun = begin(out, "chunked", scale, seed, resume, overwrite)
    out = begun.path
    result = run(config(scale, seed), out, device)
    write_results(out / "results.json", "chunked", scale, result.about, result.card.rows())
    write_report(
        out / "report.html",
        f"The chunked VAE at the {scale} scale",
        result.card,
        result.model.history,
        result.about,
        _LEAD,
    )
    return result


_LEAD = (
    "Whole ResNet-20 from noise: every network is cut into chunks that share one encoder, and the "
    "latents of all chunks are generated at once, without context. The zoo is the late checkpoints "
    "of one training run, so nothing here is as far apart as independently trained networks."
)


def run(settings: ChunkedExperiment, out: Path, device: str) -> Retrieval:
    """Zoo, fit, report card; resumes from the files in `out`."""
    clock = Clock(out / "seconds.json")
    images = _cut(data.load(settings.recipe.dataset), settings)
    made = zoo.train_zoo(
        settings.recipe,
        settings.models,
        out / "zoo",
        seed=settings.seed,
        resume=True,
        device=device,
        images=images,
    )
    clock.record("zoo")
    by_task = {images.name: images}
    model = Flown.fit(
        made, settings.fit, out=out / "run", images=by_task, resume=True, device=device
    )
    clock.record("fit")
    card = report_card(
        model,
        made,
        by_task,
        n=settings.samples,
        top=settings.top,
        full=False,
        seed=settings.seed,
        steps=settings.steps,
    )
    counts = {
        **card.counts,
        "checkpoints": len(made),
        "weights": made.joint.size,
        "zoo": made.identity,
    }
    clock.record("measuring")
    return Retrieval(made, model, card, clock.about(settings, counts, device))


def _cut(images: ImageData, settings: ChunkedExperiment) -> ImageData:
    val, test = images.val[: settings.val_images], images.test[: settings.test_images]
    return ImageData(
        images.name, images.classes, images.train[: settings.recipe.max_train_images], val, test
    )
