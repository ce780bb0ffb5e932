"""How long an experiment has taken, over all the runs that it took."""

from __future__ import annotations

import time
from pathlib import Path

from flown.files import read_json, write_json


class Clock:
    """Seconds of every stage, kept in a file: `lap` at the end of each."""

    def __init__(self, path: Path) -> None:
        self.path, self.last = path, time.monotonic()
        self.spent: dict[str, float] = read_json(path) if path.exists() else {}

    def lap(self, stage: str) -> None:
        """Counts the time since the last lap as `stage`'s."""
        now = time.monotonic()
        self.spent[stage] = round(self.spent.get(stage, 0.0) + now - self.last, 1)
        self.last = now
        write_json(self.path, self.spent)

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return round(sum(self.spent.values()), 1)
