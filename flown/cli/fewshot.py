"""The command that labels a folder of images from a few labelled ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from flown.base.terminal import say
from flown.cli.options import Out, Overwrite, Seed, console, wrote


def fewshot(
    folder: Annotated[
        Path, typer.Argument(help="A sub-folder for each class, with a few images each.")
    ],
    out: Out,
    label: Annotated[
        Optional[Path],
        typer.Option(
            "--label",
            help="Images to label, in sub-folders named like classes where those are known.",
        ),
    ] = None,
    backbone: Annotated[
        Optional[str],
        typer.Option(
            help="resnet12-small, context, timm/NAME, a file, package.module:function (which is run); "
            "by default the one that suits the head."
        ),
    ] = None,
    head: Annotated[
        str,
        typer.Option(
            help="How a head is made: centroid, ridge, probe, flow or caml; written: whole networks, by "
            "flown-any. auto: written for drawings and signs, centroid for other pictures."
        ),
    ] = "auto",
    shots: Annotated[
        Optional[int],
        typer.Option(help="Random images of each class to learn from; by default all."),
    ] = None,
    unknown: Annotated[
        Optional[float],
        typer.Option(
            help="Label images of none of the classes as unknown; the number is the part of images of "
            "the classes that may be called so, such as 0.05."
        ),
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Learn classes from a few images each and label others, with confidences and a page."""
    from flown.base.output import OutputFile
    from flown.base.trust import allow
    from flown.heads import labelling
    from flown.report.fewshot import write_labelled

    if backbone is not None:
        allow(backbone)
    names = (*labelling.OUTPUTS, "index.html")
    files = [OutputFile(out / name, overwrite) for name in names]
    found = labelling.label(
        folder, label, backbone=backbone, head=head, shots=shots, unknown=unknown, seed=seed
    )
    for warning in found.warnings:
        say(console, f"warning: {warning}", "yellow")
    for name, count, accuracy, error in found.figures():
        say(
            console,
            f"{count} images {name}: accuracy {accuracy:.1f} %, expected calibration error {error:.1f} %",
        )
    if found.novelty is not None:
        say(console, f"{int((found.novelty > 1).sum())} images of none of the classes")
    written = found.save(out)
    page = files[-1].path
    write_labelled(page, found)
    wrote(*written, page)
