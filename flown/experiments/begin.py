"""The folder of an experiment: begun once, gone on with only as what it was begun as."""

from __future__ import annotations

from pathlib import Path

from flown.base import files
from flown.base.errors import FlownError


def begin(out: Path, experiment: str, scale: str, seed: int, resume: bool, overwrite: bool) -> Path:
    """Makes the folder, or goes on in it.

    Raises:
        FlownError: `out` exists, or holds another experiment, scale or seed.
    """
    out = files.prepare_output(out, overwrite, resume)
    about = {"experiment": experiment, "scale": scale, "seed": seed}
    if files.begun(out) not in (None, about):
        raise FlownError(
            f"{out}: holds a run of another experiment, scale or seed; choose another --out"
        )
    files.begin(out, about)
    return out
