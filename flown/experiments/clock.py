"""The duration of an experiment, over all its runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flown.base.config import Config
from flown.base.files import read_json, write_json
from flown.base.provenance import provenance


class Clock:
    """Seconds of every stage, kept in a file: `record` at the end of each."""

    def __init__(self, path: Path) -> None:
        self.path, self.last = path, time.monotonic()
        self.spent = self._read()

    def record(self, stage: str) -> None:
        """Adds the time since the last call to the seconds of a stage."""
        now = time.monotonic()
        self.spent[stage] = round(self.spent.get(stage, 0.0) + now - self.last, 1)
        self.last = now
        write_json(self.path, self.spent)

    def _read(self) -> dict[str, float]:
        return read_json(self.path) if self.path.exists() else {}

    def about(self, config: Config, counts: Mapping[str, Any], device: str) -> dict[str, Any]:
        """The provenance of the experiment's results, with the seconds of all stages and of each."""
        total = sum(self.spent.values())
        return provenance(config, counts, total, device) | {"seconds_of_stages": self.spent}
