"""The command that trains a generator on new data."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from flown.base.terminal import say
from flown.cli.options import (
    Data,
    Device,
    Out,
    Overrides,
    Overwrite,
    Resume,
    Seed,
    Trust,
    console,
    device_of,
    wrote,
)


def adapt(
    model: Annotated[str, typer.Argument(help="A folder, a shipped model, a hub id.")],
    data: Data,
    out: Out,
    layout: Annotated[
        Optional[int],
        typer.Option(
            help="Number of one of the model's layouts; by default the one that suits the data."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="solver: gradients through the solver; adjoint: adjoint matching, which stays "
            "closer to the old generator and needs one with independent pairs (not flown-small)."
        ),
    ] = "solver",
    reward: Annotated[
        Optional[str],
        typer.Option(
            help="package.module:function of a batch of n networks, to (n,): it is imported "
            "and run; by default minus the cross-entropy on the data."
        ),
    ] = None,
    overrides: Overrides = None,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = "auto",
    trust: Trust = None,
) -> None:
    """Train a generator on new data, through the solver or by adjoint matching."""
    from flown import tasks as images
    from flown.base.trust import allow, load_code
    from flown.generator import adapt as library
    from flown.generator.model import Flown

    changes = [f"method={method}", f"seed={seed}", *(overrides or [])]
    config = library.AdaptConfig().override(changes)
    new = library.adapt(
        Flown.from_pretrained(model),
        images.load(data),
        config,
        out=out,
        layout=layout,
        reward=None if reward is None else load_code(allow(reward), "reward"),
        resume=resume,
        overwrite=overwrite,
        device=device_of(device),
    )
    for record in new.history["adapt"]:
        accuracy = f"{record['val']:.1f} % mean validation accuracy"
        say(console, f"step {record['step']:.0f}: {accuracy}")
    if config.training.choose and reward is None:
        say(console, "the best of these is kept")
    wrote(out / "model")
