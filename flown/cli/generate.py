"""The command that generates networks for a support set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from flown.base.errors import FlownError
from flown.base.terminal import say
from flown.cli.options import MOST, Device, Out, Overwrite, Seed, Trust, console, device_of, wrote

if TYPE_CHECKING:
    from flown.anytask.model import AnyTask
    from flown.generator.model import Flown
    from flown.weights.batch import WeightBatch


def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a shipped model, a hub id. flown-any reads any support set; others "
            "generate networks for the tasks of their training."
        ),
    ] = "flown-any",
    *,
    support: Annotated[
        str, typer.Option(help="Labelled images: a data set's name, or a folder of them.")
    ],
    out: Out,
    n: Annotated[
        int, typer.Option("-n", min=1, max=MOST, help="How many networks to generate.")
    ] = 50,
    shots: Annotated[
        int, typer.Option(min=1, max=MOST, help="Images of each class, drawn from a named set.")
    ] = 5,
    seed: Seed = 0,
    net: Annotated[
        Optional[str],
        typer.Option(help="Which network an any-task generator writes; by default its first."),
    ] = None,
    solver: Annotated[
        str,
        typer.Option(
            help="euler, midpoint, heun, rk4 or dopri5; ddpm or ddim for a diffusion. For a model "
            "fitted on a zoo."
        ),
    ] = "euler",
    steps: Annotated[
        Optional[int],
        typer.Option(
            help="Steps of the solver; by default as many as the model was made for. dopri5 takes its "
            "own."
        ),
    ] = None,
    guidance: Annotated[
        float,
        typer.Option(
            help="Strength of classifier-free guidance, 1 is without; for a model fitted on a zoo."
        ),
    ] = 1.0,
    layout: Annotated[
        Optional[int],
        typer.Option(
            help="Number of one of the model's layouts; by default the one that suits the support set."
        ),
    ] = None,
    until: Annotated[
        Optional[float],
        typer.Option(help="Stop at this epoch; for a model whose flow.path leads through epochs."),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    trust: Trust = None,
) -> None:
    """Generate networks for a support set of labelled images."""
    from flown.anytask.model import AnyTask
    from flown.base.output import OutputFile
    from flown.generator.model import Flown

    file = OutputFile(out, overwrite)
    generator = Flown.from_pretrained(model).to(device_of(device))
    if isinstance(generator, AnyTask):
        given = {"solver": solver != "euler", "guidance": guidance != 1.0}
        given |= {"layout": layout is not None, "until": until is not None}
        if wrong := [name for name, there in given.items() if there]:
            raise FlownError(f"--{wrong[0]}: {model} has none; it is for models fitted on a zoo")
        batch, line = _for_anything(generator, support, n, shots, seed, net, steps), ""
        warning = None
    else:
        if net is not None:
            raise FlownError(f"--net: {model} has none; choose one of its layouts with --layout")
        options: dict[str, Any] = {"layout": layout, "solver": solver, "steps": steps}
        options |= {"guidance": guidance, "until": until}
        batch, line, warning = _for_known(generator, support, n, shots, seed, options)
    batch.provenance |= {"model": model}
    batch.to("cpu").save(file.path)
    say(console, f"{n} x {batch.name}{line}")
    if warning is not None:
        say(console, f"warning: {warning}", "yellow")
    wrote(out)


def _for_anything(
    model: AnyTask,
    support: str,
    n: int,
    shots: int,
    seed: int,
    net: str | None,
    steps: int | None,
) -> WeightBatch:
    from flown import tasks

    images, names = tasks.load_support(support, shots, seed)
    batch = model.generate(images.images, images.labels, n, seed, net, steps, names)
    batch.provenance |= {"support": support, "classes": list(names)}
    return batch


def _for_known(
    model: Flown, support: str, n: int, shots: int, seed: int, options: dict[str, Any]
) -> tuple[WeightBatch, str, str | None]:
    from flown.generator.support import sample_for

    found, warning = sample_for(model, support, n, shots=shots, seed=seed, **options)
    return found.batch, f": {found.seconds:.2f} s, NFE {found.nfe}", warning
