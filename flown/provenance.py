"""Where a number comes from: commit, command, versions, hardware. And the file that holds it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flown.config import Config
from flown.files import write_json

Row = dict[str, Any]


def provenance(config: Config, data: Mapping[str, Any], seconds: float, device: str) -> dict[str, Any]:
    """The record that accompanies results.

    Args:
        data: counts of images and networks used, by name.
        seconds: wall time of the whole experiment.
    """
    values = config.model_dump(mode="json")
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "commit": _commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": values,
        "config_hash": digest,
        "data": dict(data),
        "device": device,
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                     "gpu": torch.cuda.get_device_name() if device == "cuda" else None},
        "versions": {"python": platform.python_version(),
                     **{p: metadata.version(p) for p in ("torch", "numpy", "safetensors")}},
        "seconds": round(seconds, 1),
    }  # fmt: skip


def write_results(path: Path | str, experiment: str, scale: str, about: Mapping[str, Any],
                  rows: Sequence[Row]) -> None:  # fmt: skip
    """Writes `results.json`."""
    content = {"experiment": experiment, "scale": scale, "provenance": dict(about), "rows": list(rows)}
    write_json(path, content)


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here,
                               capture_output=True, text=True, check=True, timeout=10)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
