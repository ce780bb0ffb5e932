"""The command that trains networks further."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from flown.base.terminal import say
from flown.cli.options import (
    MOST,
    Data,
    Device,
    Out,
    Overwrite,
    Resume,
    Seed,
    Trust,
    console,
    device_of,
    wrote,
)


class Schedule(str, Enum):
    """How the learning rate changes."""

    constant = "constant"
    cosine = "cosine"
    piecewise = "piecewise"


def finetune(
    file: Annotated[Path, typer.Argument(help="Networks, as `generate` writes them.")],
    data: Data,
    out: Out,
    epochs: Annotated[
        int, typer.Option(min=1, max=MOST, help="Passes through the training images.")
    ] = 25,
    rate: Annotated[float, typer.Option(min=0, max=1000, help="Adam's learning rate.")] = 1e-3,
    schedule: Annotated[
        Schedule, typer.Option(help="How the rate changes over the epochs.")
    ] = Schedule.constant,
    warmup: Annotated[
        float, typer.Option(min=0, max=MOST, help="Epochs in which the rate rises.")
    ] = 0.0,
    milestones: Annotated[
        Optional[list[float]],
        typer.Option("--milestone", help="An epoch at which the rate falls; repeat for several."),
    ] = None,
    gamma: Annotated[
        float, typer.Option(min=0, max=1000, help="Factor of the rate at each milestone.")
    ] = 0.1,
    weight_decay: Annotated[
        float, typer.Option(min=0, max=1000, help="Weight decay of the optimiser.")
    ] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, max=MOST, help="Images a step.")] = 32,
    max_train_images: Annotated[
        Optional[int],
        typer.Option(min=1, help="Train on the first so many images; by default all."),
    ] = None,
    test_at: Annotated[
        Optional[list[int]],
        typer.Option(help="Measure on test images at this epoch too; the last always is."),
    ] = None,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = "auto",
    trust: Trust = None,
) -> None:
    """Train all networks of a file further at once; accuracies by epoch as JSON beside them."""
    from flown import tasks as images
    from flown.measure.finetune import FinetuneConfig, curves_file
    from flown.measure.finetune import finetune as run
    from flown.weights.batch import WeightBatch

    config = FinetuneConfig(
        epochs=epochs,
        learning_rate=rate,
        schedule=schedule.value,
        warmup=warmup,
        milestones=tuple(milestones or ()),
        gamma=gamma,
        weight_decay=weight_decay,
        batch_size=batch_size,
        max_train_images=max_train_images,
        test_at=tuple(test_at or ()),
        seed=seed,
    )
    result = run(
        WeightBatch.load(file),
        images.load(data),
        config,
        out=out,
        resume=resume,
        overwrite=overwrite,
        device=device_of(device),
    )
    for point in result.points:
        if point.test is not None or not point.epoch:
            line = f"epoch {point.epoch}: {float(point.val.mean()):.1f} % of validation images"
            if point.test is not None:
                spread = f" ± {float(point.test.std()):.1f}" if len(point.test) > 1 else ""
                line += f", {float(point.test.mean()):.1f}{spread} % of test images"
            say(console, line)
    wrote(out, curves_file(out))
