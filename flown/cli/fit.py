"""The command that trains a generator: on a zoo of networks, or on a stream of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from flown.base.errors import FlownError
from flown.base.terminal import say
from flown.cli.options import (
    Device,
    Out,
    Overrides,
    Overwrite,
    Resume,
    Trust,
    console,
    device_of,
    wrote,
)


def fit(
    config: Annotated[
        Optional[Path], typer.Argument(help="Settings, YAML or JSON; by default those for a CPU.")
    ] = None,
    *,
    zoo: Annotated[
        Optional[list[Path]], typer.Option("--zoo", help="A zoo's folder; repeat for several.")
    ] = None,
    tasks: Annotated[
        Optional[list[str]],
        typer.Option(
            "--tasks",
            help="A pool of classes to draw tasks from, in place of a zoo: omniglot_full, glyphs, "
            "mini_imagenet, a folder of images; repeat for several.",
        ),
    ] = None,
    begin: Annotated[
        Optional[str],
        typer.Option(
            "--begin",
            help="Train a model of this kind further, such as flown-any; for --tasks.",
        ),
    ] = None,
    out: Out,
    overrides: Overrides = None,
    seed: Annotated[
        Optional[int],
        typer.Option(help="All randomness follows from it; by default the settings'."),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = "auto",
    trust: Trust = None,
) -> None:
    """Fit a generator: weight encoder and flow on a zoo, or an any-task generator on tasks.

    With --tasks no network is needed: tasks are drawn afresh at every step, and generated networks
    are judged by what they compute.
    """
    if bool(zoo) == bool(tasks):
        raise FlownError("fit: give zoos (--zoo) or pools of classes to draw tasks from (--tasks)")
    changes = [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]
    if tasks:
        from flown.anytask.config import AnyTaskConfig
        from flown.anytask.fit import fit as fit_tasks
        from flown.generator.files import locate

        settings = (AnyTaskConfig.load(config) if config else AnyTaskConfig()).of(tasks)
        fit_tasks(
            settings.override(changes),
            out=out,
            begin=None if begin is None else locate(begin),
            resume=resume,
            overwrite=overwrite,
            device=device_of(device),
        )
        wrote(out / "model")
        return
    if begin is not None:
        raise FlownError("--begin: is for any-task generators, which --tasks trains")
    _fit_zoos(config, zoo or [], out, changes, resume, overwrite, device_of(device))


def _fit_zoos(
    config: Path | None,
    zoos: list[Path],
    out: Path,
    changes: list[str],
    resume: bool,
    overwrite: bool,
    device: str,
) -> None:
    from flown.generator.config import FlownConfig
    from flown.generator.model import Flown
    from flown.zoo import Zoo

    settings = (FlownConfig.load(config) if config else FlownConfig()).override(changes)
    whole = Zoo.open(zoos[0])
    if len(zoos) > 1:
        parts = [Zoo.open(path) for path in zoos]
        whole = Zoo.join(parts, out.with_name(out.name + "-zoo"), overwrite, resume)
    model = Flown.fit(whole, settings, out=out, resume=resume, overwrite=overwrite, device=device)
    for record in model.history.get("encoder", [])[-1:]:
        figures = {k: v for k, v in record.items() if k not in ("step", "loss")}
        for name, value in figures.items():
            say(console, f"{name}: {value:.1f} % mean validation accuracy")
    wrote(out / "model")
