"""The command that measures generated networks, or the model that generates them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from flown.base.errors import FlownError
from flown.base.terminal import say
from flown.cli.options import MOST, Device, Overwrite, Trust, console, device_of, wrote


def evaluate(
    what: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Networks, as `generate` writes them, or the folder of a model."
        ),
    ],
    data: Annotated[
        Optional[str],
        typer.Option("--data", help="For networks: a data set's name or a folder of images."),
    ] = None,
    zoo: Annotated[
        Optional[Path],
        typer.Option(
            help="The zoo that novelty is measured against; of a model, the one it was fitted on."
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(min=1, max=MOST, help="How many networks to choose on validation images.")
    ] = 5,
    epochs: Annotated[
        Optional[list[int]],
        typer.Option(
            "--epoch",
            help="For networks: an epoch of the zoo that the generator was fitted on, -1 the last; "
            "repeat for several.",
        ),
    ] = None,
    out: Annotated[
        Optional[Path],
        typer.Option("--out", help="For a model: a folder for results.json and report.html."),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    trust: Trust = None,
) -> None:
    """Accuracy of generated networks: all of them, the chosen few, and how new they are.

    Of a model: its report card, which it keeps in its README. Where the zoo has a handful of tasks,
    one for each of them; where it is split by task, one over tasks that no training saw.
    """
    if not what.exists():
        raise FlownError(f"{what}: no such file, nor a model's folder")
    if what.is_file():
        _networks(what, data, zoo, top, epochs, out, device_of(device))
        return
    if zoo is None or data is not None or epochs:
        raise FlownError(
            f"{what}: a model is measured on the zoo it was fitted on; give --zoo alone"
        )
    from flown.experiments.evaluation import evaluate_model
    from flown.report import print_card

    card = evaluate_model(what, zoo, out, top, overwrite=overwrite, device=device_of(device))
    print_card(card, console)
    written = [] if out is None else [out / "results.json", out / "report.html"]
    wrote(what / "README.md", *written)


def _networks(
    file: Path,
    data: str | None,
    zoo: Path | None,
    top: int,
    epochs: list[int] | None,
    out: Path | None,
    device: str,
) -> None:
    if data is None or out is not None:
        raise FlownError(f"{file}: networks are measured on images (--data), and printed: no --out")
    from flown.experiments.evaluation import evaluate_file

    for line in evaluate_file(file, data, zoo, top, epochs or (), device):
        say(console, line)
