"""The command that writes networks for other software."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from flown.base.errors import FlownError
from flown.base.terminal import say
from flown.cli.options import Out, Overwrite, Trust, console, wrote


def export(
    nets: Annotated[
        Path, typer.Argument(metavar="NETS", help="A file of networks, or the folder of a model.")
    ],
    out: Out,
    to: Annotated[
        Optional[str],
        typer.Option(
            help="onnx: pixels to probabilities, for onnxruntime; c: one C99 file; safetensors or "
            "state_dict: the weights of one network. A model is copied in half precision."
        ),
    ] = None,
    network: Annotated[
        Optional[list[int]],
        typer.Option(
            help="Number of a network, from 0; repeat for several. By default all of them vote in "
            "onnx, and the first is taken in other formats."
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="For c: 8-bit integers, a quarter of the size.")
    ] = False,
    overwrite: Overwrite = False,
    trust: Trust = None,
) -> None:
    """Write networks for other software, with a card that says what they are."""
    from flown.base.output import OutputFile
    from flown.base.run import Run
    from flown.generator import files as modelfiles
    from flown.weights.batch import WeightBatch
    from flown.weights.export.write import export as write

    if nets.is_dir():
        given = {"to": to is not None, "network": bool(network), "int8": int8}
        if wrong := [name for name, there in given.items() if there]:
            raise FlownError(f"--{wrong[0]}: is for a file of networks, {nets} is a folder")
        plan = {"export": str(nets)}
        run = Run(
            out, plan, resume=False, overwrite=overwrite, file="progress.json", sources=[nets]
        )
        modelfiles.read(nets)  # what is replaced stays if this is no model
        run.begin()
        modelfiles.export(nets, run.path)
        run.file.unlink()
        wrote(out)
        return
    if to is None:
        raise FlownError(f"--to: name a format for {nets}: onnx, c, safetensors or state_dict")
    file = OutputFile(out, overwrite)
    batch = WeightBatch.load(nets)
    for number in network or ():
        if not 0 <= number < len(batch):
            raise FlownError(f"--network {number}: {nets} holds {len(batch)}, from 0")
    chosen = network or (list(range(len(batch))) if to == "onnx" else [0])
    if len(chosen) < len(batch):
        say(console, f"network {', '.join(map(str, chosen))} of {len(batch)}")
    described = write(batch[chosen], file.path, to, int8)
    wrote(out, described)
    say(console, described.read_text("utf-8").strip().splitlines()[-1])
