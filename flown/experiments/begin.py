"""The folder of an experiment: it can only be resumed with the settings it was begun with."""

from __future__ import annotations

from pathlib import Path

from flown.base.run import Run


def begin(out: Path, experiment: str, scale: str, seed: int, resume: bool, overwrite: bool) -> Path:
    """Makes the folder, or resumes in it.

    Raises:
        FlownError: `out` exists, or holds another experiment, scale or seed.
    """
    plan = {"experiment": experiment, "scale": scale, "seed": seed}
    run = Run(out, plan, resume=resume, overwrite=overwrite, file="progress.json")
    run.write()
    return run.out
