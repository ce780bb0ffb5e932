"""Options and the console, which commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from flown.base import trust
from flown.base.errors import FlownError
from flown.base.terminal import say

console = Console()

Out = Annotated[Path, typer.Option("--out", help="Where to write.")]
SEEDS = 10**12  # with a step added to it, a seed must still be a number of 64 bits
MOST = 10_000_000  # of anything that is counted
Seed = Annotated[
    int, typer.Option("--seed", min=-SEEDS, max=SEEDS, help="All randomness follows from it.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Device = Annotated[
    str, typer.Option("--device", help="auto (a GPU if there is one), cpu, cuda or cuda:1.")
]
Data = Annotated[str, typer.Option("--data", help="A data set's name or a folder of images.")]
ZooPath = Annotated[Path, typer.Argument(metavar="ZOO", help="The folder of a zoo.")]


def allow_all(names: list[str] | None) -> list[str] | None:
    """Lets the names be imported; as a callback, before a command reads any file."""
    for name in names or ():
        trust.allow(name)
    return names


Trust = Annotated[
    Optional[list[str]],
    typer.Option(
        "--trust",
        metavar="package.module:function",
        callback=allow_all,
        help="Run this code if a file names it as its network; repeat for several.",
    ),
]
Overrides = Annotated[
    Optional[list[str]],
    typer.Option("--set", help="Change a setting, key.sub=value; repeat for several."),
]


class Scale(str, Enum):
    """How large a run is."""

    smoke = "smoke"
    cpu = "cpu"
    paper = "paper"


ScaleOption = Annotated[
    Scale,
    typer.Option("--scale", help="smoke: a minute, cpu: hours on a CPU, paper: as published."),
]


def device_of(name: str) -> str:
    """The device that a name means; `auto` is the first GPU, or the CPU where there is none.

    Raises FlownError for a device that is unknown or not here.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (":" in name and not index.isdecimal())):
        raise FlownError(f"--device {name}: choose auto, cpu, cuda or cuda:1 and so on")
    if kind == "cuda" and int(index or 0) >= count:
        present = f"{count} of them, from cuda:0" if count else "none"
        raise FlownError(f"--device {name}: torch sees no such GPU here, it sees {present}")
    return name


def wrote(*paths: Path) -> None:
    """Prints where results are."""
    for path in paths:
        say(console, f"wrote {path}")
