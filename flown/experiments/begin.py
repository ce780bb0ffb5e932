"""The folder of an experiment: it can only be resumed with the settings it was begun with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flown.base.files import read_json, write_json
from flown.base.provenance import Row
from flown.base.run import Run


class Result(NamedTuple):
    """A study's records, one a row and method, and their provenance."""

    rows: list[Row]
    about: dict[str, Any]


def begin(out: Path, experiment: str, scale: str, seed: int, resume: bool, overwrite: bool) -> Run:
    """Makes the folder, or resumes in it; it is this process's while what is returned lives.

    Raises:
        FlownError: `out` exists, or holds another experiment, scale or seed.
    """
    plan = {"experiment": experiment, "scale": scale, "seed": seed}
    run = Run(out, plan, resume=resume, overwrite=overwrite, file="progress.json")
    run.begin()
    return run


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """The plain values of a file, made and written first if it is not there."""
    if not path.exists():
        write_json(path, make())
    return read_json(path)
