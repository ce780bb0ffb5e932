"""One import: reads checkpoints one at a time, writes shards as they fill, records what it did.

The new zoo's `import.json` says which names were mapped, which buffers dropped or kept, which numbers
converted, and what was found and not used.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.base.files import save_tensors, write_json
from flown.base.progress import bar
from flown.base.run import Run
from flown.tasks.task import Task, TaskTable
from flown.version import __version__
from flown.weights.layout import WeightLayout
from flown.zoo.imports import statefiles
from flown.zoo.imports.discover import Found, Skipped
from flown.zoo.imports.naming import Fitted, Naming
from flown.zoo.imports.statefiles import Opened
from flown.zoo.inspect.population import sampled_distances
from flown.zoo.rows import Row, checksum
from flown.zoo.store import Zoo, frozen_file
from flown.zoo.train.shard import splits

_ROWS, _BYTES = 1000, 2**28  # weights of a shard, at most; they are held in memory


class Import:
    """One import: reads checkpoints, writes shards as they fill, records what it did."""

    def __init__(
        self,
        kind: str,
        path: Path,
        naming: Naming,
        task: Task,
        *,
        read: Callable[[Found], Opened],
        skipped: Sequence[Skipped] = (),
        distinct: bool = False,
        notes: Sequence[str] = (),
        others: Sequence[str] = (),
        rest: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.kind, self.path, self.naming, self.task = kind, path, naming, task
        self.read, self.skipped, self.distinct = read, list(skipped), distinct
        self.notes, self.others, self.rest = notes, others, dict(rest or {})
        self.seen: dict[bytes, str] = {}
        self.renamed: dict[str, str] = {}
        self.buffers: Counter[str] = Counter()
        self.taken: Counter[str] = Counter()  # where in their files the weights lie
        self.left: Counter[str] = Counter()  # entries of files that were not used
        self.constants: dict[str, Tensor] | None = (
            None  # the buffers of the first file, and its name
        )
        self.first = ""
        self.counts: Counter[str] = Counter()

    def run(
        self, found: Sequence[Found], out: Path | str, held_out: float, seed: int, overwrite: bool
    ) -> Zoo:
        if not 0 <= held_out < 1:
            raise FlownError(
                f"held_out: a share of the models, at least 0 and below 1, got {held_out}"
            )
        source, target = self.path.resolve(), Path(out).resolve()
        if source in (target, *target.parents) or target in source.parents:
            raise FlownError(f"{out}: overlaps {self.path}; choose another folder")
        plan = {"import": str(self.path)}
        run = Run(out, plan, resume=False, overwrite=overwrite, file="progress.json")
        out = run.path
        writer = _Writer(run, self.naming.layout)
        try:
            self._read(found, writer)
        except _DifferentBuffersError as error:
            writer.withdraw()
            raise FlownError(f"{self.path}: {error}") from None
        if not writer.rows:
            writer.withdraw()
            first = "; ".join(f"{name}: {reason}" for name, reason in self.skipped[:3])
            others = f" (and {len(self.skipped) - 3} more)" if len(self.skipped) > 3 else ""
            raise FlownError(f"{self.path}: nothing in it can be imported. {first}{others}")
        writer.flush()
        models = writer.rows[-1].model + 1
        split = splits(models, seed, held_out)
        rows = [row._replace(split=split[row.model]) for row in writer.rows]
        if shared := self.rest | (self.constants or {}):
            save_tensors(frozen_file(out, 0), shared)
        about = {
            "import": {"format": self.kind, "source": str(self.path)},
            "recipes": {},
            "seed": seed,
            "flown": __version__,
        }
        read = Zoo(out, [self.naming.layout], TaskTable([self.task]), rows, about)
        write_json(out / "import.json", self._report(read))
        zoo = Zoo.write(out, read.layouts, [self.task], rows, about)
        run.file.unlink()
        return zoo

    def _read(self, found: Sequence[Found], writer: _Writer) -> None:
        task, models = self.task.id, dict[str, int]()
        with bar(f"import {task}", len(found)) as update:
            for done, file in enumerate(found, 1):
                try:
                    fitted = self._fit(file)
                    self._account(file, fitted)
                except _DifferentBuffersError:
                    raise
                except FlownError as error:
                    reason = str(error).removeprefix(f"{file.path}: ")
                    self.skipped.append(Skipped(file.name, reason))
                else:
                    model = models.setdefault(file.model, len(models))
                    row = Row(
                        task=task,
                        model=model,
                        seed=model if file.seed is None else file.seed,
                        epoch=file.epoch,
                        step=0,
                        split="",
                        train_accuracy=file.train_accuracy,
                        val_accuracy=file.val_accuracy,
                        shard="",
                        offset=0,
                    )
                    writer.add(fitted.vector, row)
                update(done, f"{len(self.skipped)} skipped" if self.skipped else "")

    def _fit(self, file: Found) -> Fitted:
        opened = self.read(file)
        where = self.naming.choose(opened.states, statefiles.WRAPPERS)
        fitted = self.naming.fit(opened.states[where])
        self.taken[where] += bool(where)
        self.left.update({*fitted.left, *opened.stand_ins})
        return fitted

    def _account(self, file: Found, fitted: Fitted) -> None:
        self._compare(file, fitted.constants)
        if self.distinct:
            digest = hashlib.sha256(fitted.vector.numpy().data).digest()
            if (twin := self.seen.setdefault(digest, file.name)) != file.name:
                raise FlownError(f"its weights are exactly those of {twin}")
        self.renamed |= fitted.renamed
        self.buffers.update(fitted.buffers)
        self.counts.update({f"converted from {kind}": 1 for kind in fitted.dtypes})
        self.counts["named by the order of shapes"] += fitted.by_order
        self.counts["with test_acc only, not taken"] += file.test_only

    def _compare(self, file: Found, constants: dict[str, Tensor]) -> None:
        """All networks must have the same buffers, because a generated network gets these."""
        if self.constants is None:
            self.constants, self.first = constants, file.name
        fresh = self.naming.constants
        for name in sorted({*constants, *self.constants}):
            first, second = (kept.get(name, fresh[name]) for kept in (self.constants, constants))
            if not torch.equal(first, second):
                null = f" (if it has no effect, map it: `{name}: null`)"
                raise _DifferentBuffersError(
                    f"buffer '{name}' differs between {self.first} and {file.name}, and is neither a "
                    "weight nor BatchNorm's statistic: a zoo keeps such a buffer once for all its "
                    "networks; import networks that share it, or make it a parameter"
                    f"{'' if name in self.naming.drawn else null}"
                )

    def _report(self, zoo: Zoo) -> dict[str, Any]:
        rows = zoo.rows
        layout, mapping = self.naming.layout, self.naming.mapping
        held_out = {row.model for row in rows if row.split == "held-out"}
        return {
            "format": self.kind,
            "source": str(self.path),
            "net": layout.net,
            "task": self.task.id,
            "flown": __version__,
            "models": rows[-1].model + 1,
            "models held out": len(held_out),
            "checkpoints": {
                "imported": len(rows),
                "skipped": len(self.skipped),
                "with training accuracy": sum(row.train_accuracy is not None for row in rows),
                "with validation accuracy": sum(row.val_accuracy is not None for row in rows),
                **{kind: count for kind, count in sorted(self.counts.items()) if count},
            },
            "dropped_buffers": dict(sorted(self.buffers.items())),
            "kept_buffers": sorted(self.constants or {}),
            "mapping": dict(mapping),
            "renamed": self.renamed,
            "weights taken from": {k: v for k, v in sorted(self.taken.items()) if v},
            "entries not used": dict(sorted(self.left.items())),
            "files not used": list(self.others),
            "held-out networks are neighbours": sampled_distances(zoo, self.task.id).are_neighbours,
            "notes": list(self.notes),
            "skipped": [one._asdict() for one in self.skipped],
        }


class _DifferentBuffersError(FlownError):
    """Two networks of one import have different buffers."""


class _Writer:
    """Shards of a zoo, each written when it is full."""

    def __init__(self, run: Run, layout: WeightLayout) -> None:
        self.run, self.out, self.layout = run, run.path, layout
        self.most = max(1, min(_ROWS, _BYTES // (4 * layout.size)))
        self.rows: list[Row] = []
        self.shards = 0
        self.vectors: list[Tensor] = []

    @property
    def name(self) -> str:
        return f"weights-{self.shards:05d}.safetensors"

    def add(self, vector: Tensor, row: Row) -> None:
        """Adds a network's weights (D,); with the first, the folder is begun."""
        if not self.rows:
            self.run.begin()
        self.rows.append(
            row._replace(shard=self.name, offset=len(self.vectors), checksum=checksum(vector))
        )
        self.vectors.append(vector)
        if len(self.vectors) == self.most:
            self.flush()

    def withdraw(self) -> None:
        """Removes the files of an import that failed."""
        if self.rows:
            for path in [self.run.file, *self.out.glob("weights-*.safetensors")]:
                path.unlink()
            with contextlib.suppress(OSError):
                self.out.rmdir()

    def flush(self) -> None:
        if self.vectors:
            save_tensors(self.out / self.name, self.layout.unpack(torch.stack(self.vectors)))
            self.shards += 1
            self.vectors = []
