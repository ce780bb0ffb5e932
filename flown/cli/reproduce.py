"""The command that reproduces the paper's tables and this library's studies."""

from __future__ import annotations

from enum import Enum
from importlib import import_module
from typing import Annotated, Any

import typer

from flown.base.terminal import print_table
from flown.cli.options import (
    Device,
    Out,
    Overwrite,
    Resume,
    Scale,
    ScaleOption,
    Seed,
    console,
    device_of,
    wrote,
)


class Experiment(str, Enum):
    """What can be reproduced."""

    table1 = "table1"
    table2 = "table2"
    table3 = "table3"
    table4 = "table4"
    table5 = "table5"
    chunked = "chunked"
    novelty = "novelty"
    trajectory = "trajectory"
    anytask = "anytask"
    variants = "variants"
    unknown = "unknown"
    steps = "steps"


def reproduce(
    table: Annotated[Experiment, typer.Argument(help="A table of the paper, or a study.")],
    out: Out,
    scale: ScaleOption = Scale.cpu,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Reproduce a table of the paper, with baselines, novelty and every sample.

    Seven studies are not in the paper: `chunked` generates a whole network of 270,000 weights,
    `novelty` asks what makes generated networks both new and accurate, `trajectory` generates
    networks of any epoch, `anytask` measures networks for tasks that nobody trained on, `variants`
    compares ways to train the generator that writes these, `unknown` asks whether they know what is
    of none of their classes, `steps` makes flows that a few evaluations follow.
    """
    rebuild = getattr(import_module(f"flown.experiments.{table.value}"), table.value)
    _show(
        table,
        rebuild(
            out,
            scale.value,
            seed=seed,
            resume=resume,
            overwrite=overwrite,
            device=device_of(device),
        ),
    )
    wrote(out / "results.json", out / "report.html")


def _show(table: Experiment, result: Any) -> None:
    from flown import report

    if table is Experiment.table3:
        report.print_table3(result, console)
    elif table is Experiment.table4:
        from flown.experiments.table4 import summary

        title = "Test accuracy of networks generated for another data set, %"
        print_table(console, title, summary(result))
    elif table is Experiment.table5:
        from flown.report.table5 import print_table5

        print_table5(result, console)
    elif table is Experiment.trajectory:
        from flown.report.trajectory import table as by_epoch

        print_table(console, "Test accuracy at each epoch's time, %", by_epoch(result, 0))
    elif table is Experiment.novelty:
        report.print_study(result, console)
    elif table is Experiment.anytask:
        from flown.report.anytask import print_study

        print_study(result.rows, console)
    elif table is Experiment.variants:
        from flown.report.variants import print_variants

        print_variants(result.rows, console)
    elif table is Experiment.unknown:
        from flown.report.unknown import print_unknown

        print_unknown(result.rows, console)
    elif table is Experiment.steps:
        from flown.report.steps import print_steps

        print_steps(result.rows, console)
    else:
        report.print_card(result.card, console)
