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

from flown.base.config import Config
from flown.base.files import write_json
from flown.version import __version__

Row = dict[str, Any]
FORMAT = "flown-results-1"


def digest(config: Config) -> str:
    """A fingerprint of a config: the same for the same values, whatever their order."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def provenance(
    config: Config, data: Mapping[str, Any], seconds: float, device: str, command: str | None = None
) -> dict[str, Any]:
    """The record that accompanies results.

    Args:
        data: counts of images and networks used, by name; identities of zoos.
        seconds: wall time of the whole experiment.
        command: what was run; this process's own command line otherwise.
    """
    return {
        "commit": _commit(),
        "command": command or _command(),
        "config": config.model_dump(mode="json"),
        "config_hash": digest(config),
        "data": dict(data),
        "device": device,
        "hardware": hardware(device),
        "versions": {
            "flown": __version__,
            "python": platform.python_version(),
            **{p: metadata.version(p) for p in ("torch", "numpy", "safetensors")},
        },
        "seconds": round(seconds, 1),
    }


def hardware(device: str = "cpu") -> dict[str, Any]:
    """The machine: its processor, cores, torch's threads, and the GPU where one is used."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
    }


def write_results(
    path: Path | str, experiment: str, scale: str, about: Mapping[str, Any], rows: Sequence[Row]
) -> None:
    """Writes `results.json` whole.

    Args:
        scale: `smoke`, `cpu` or `paper`.
        about: what `provenance` returned.
        rows: one record a figure; accuracies in percent.

    Raises:
        FlownError: the file cannot be written.
    """
    head = {"format": FORMAT, "experiment": experiment, "scale": scale, "provenance": dict(about)}
    write_json(path, {**head, "rows": list(rows)})


def _command() -> str:
    """This process's command line, without the folders of this machine."""
    name = Path(sys.argv[0]).name
    words = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return shlex.join(["flown" if name == "__main__.py" else name, *words])


def _commit() -> str | None:
    """The commit of this library's sources, `-dirty` when changed; None outside of git."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=here.parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        # An installed copy may lie in somebody else's repository, whose commit says nothing.
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=12") or None
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
