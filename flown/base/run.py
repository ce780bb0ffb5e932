"""The folder of a run: what it was begun as, and whether what is in it may be gone on with.

    run.json   {"format": "flown-run-1", "flown": version, **plan}, written when work begins

The plan decides the result: configs, seeds, and the identity of data and networks. The version that
began a run is written down and not compared: a newer one goes on with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flown.base.config import Config, read_mapping
from flown.base.errors import FlownError
from flown.base.files import write_json
from flown.base.output import OutputFolder
from flown.version import __version__

FORMAT = "flown-run-1"


def digest(*tensors: Tensor) -> str:
    """A fingerprint of tensors' types, shapes and values, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


class Run(OutputFolder):
    """A folder that is begun, or gone on with as what it was begun as.

    Args:
        out: the folder; `begin` empties it with `overwrite`, and it may exist with `resume`.
        plan: plain values by name. configs: the type of those that are configs; what the version
            that began the run had no key for has its default.
        newer: names that earlier versions did not write down; where they are missing, they are not
            compared.
        file: the manifest's name.
        sources: folders that are read, and not to be removed.

    Raises:
        FlownError: `out` exists, or holds the run of another plan (what differs is named).
    """

    instead = ", or --resume"

    def __init__(
        self,
        out: Path | str,
        plan: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        configs: Mapping[str, type[Config]] | None = None,
        newer: Collection[str] = (),
        file: str = "run.json",
        sources: Iterable[Path | str] = (),
    ) -> None:
        self.plan, self.configs, self.newer = dict(plan), dict(configs or {}), newer
        self.file = Path(out) / file
        super().__init__(out, overwrite, resume, sources)

    def check(self, found: Mapping[str, Any], where: Path) -> None:
        """Raises FlownError where a plan that was found in a file differs from this run's."""
        found = dict(found)
        for key, kind in self.configs.items():
            if isinstance(found.get(key), Mapping):
                found[key] = kind.parse(found[key], f"{where}: {key}").model_dump(mode="json")
        if differing := [
            key
            for key, value in self.plan.items()
            if found.get(key) != value and not (key in self.newer and key not in found)
        ]:
            raise FlownError(
                f"{self.path}: holds a run with another {', '.join(differing)}; choose another --out"
            )

    def _check(self) -> None:
        super()._check()
        if self._resume and self.file.exists():
            self.check(read_mapping(self.file), self.file)

    def begin(self) -> None:
        """Claims and empties the folder as `OutputFolder`, and writes the manifest."""
        super().begin()
        write_json(self.file, {"format": FORMAT, "flown": __version__, **self.plan})
