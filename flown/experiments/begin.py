"""The folder of an experiment: begun once, gone on with only as what it was begun as."""

from __future__ import annotations

from pathlib import Path

from flown.base.errors import FlownError
from flown.base.files import prepare_output, read_json, write_json


def begin(out: Path, experiment: str, scale: str, seed: int, resume: bool, overwrite: bool) -> Path:
    """Makes the folder, or goes on in it.

    Raises:
        FlownError: `out` exists, or holds another experiment, scale or seed.
    """
    out = prepare_output(out, overwrite, resume)
    file, begun = out / "progress.json", {"experiment": experiment, "scale": scale, "seed": seed}
    if file.exists() and read_json(file) != begun:
        raise FlownError(
            f"{out}: holds a run of another experiment, scale or seed; choose another --out"
        )
    write_json(file, begun)
    return out
