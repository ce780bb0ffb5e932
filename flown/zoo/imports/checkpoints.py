"""Zoos from checkpoints that other people trained.

Checkpoints are read one at a time, in an order that depends on their names only, and written shard
by shard. A checkpoint that cannot be used is skipped and listed with the reason. The new zoo's
`import.json` says which names were mapped, which buffers dropped or kept, which numbers converted.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flown.base.config import read_mapping
from flown.base.errors import FlownError, unknown
from flown.base.files import prepare_output, save_tensors, write_json
from flown.base.progress import bar
from flown.base.run import FORMAT
from flown.nets.architecture import Architecture
from flown.tasks.task import Task
from flown.version import __version__
from flown.weights.layout import WeightLayout
from flown.zoo.imports import modelzoos, statefiles
from flown.zoo.imports.modelzoos import Found, Skipped
from flown.zoo.imports.statefiles import Fitted, Naming
from flown.zoo.rows import Row, checksum
from flown.zoo.store import Zoo, frozen_file
from flown.zoo.train.shard import splits

__all__ = ["Skipped", "from_checkpoints", "from_modelzoos"]

_ROWS, _BYTES = 1000, 2**28  # weights of a shard, at most; they are held in memory
_NUMBER = re.compile(r"(?<![a-z])(epoch|checkpoint|ckpt|step|iter)[-_=]?(\d+)", re.IGNORECASE)


def from_checkpoints(
    path: Path | str,
    architecture: Architecture,
    task: Task,
    out: Path | str,
    *,
    mapping: Path | str | Mapping[str, str | None] | None = None,
    held_out: float = 1 / 6,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Zoo, list[Skipped]]:
    """A zoo from a folder of state dicts, with its sub-folders, without hidden files.

    Files are `.pt`, `.pth`, `.bin` and `.safetensors`, sharded with an index as Hugging Face does
    it or whole; `state_dict`, `model_state_dict` or `model` inside are unwrapped, DataParallel's and
    torch.compile's prefixes stripped. Accuracies are unknown. Buffers that are not BatchNorm's
    statistics are kept once for all networks.

    A file is one model, at epoch 0, unless its name has a number after `epoch`, `checkpoint`,
    `ckpt`, `step` or `iter` (`epoch_12`, `ckpt-12`, `checkpoint_000012`): files of one folder whose
    names differ in such numbers only are epochs of one model. A file without a number takes its
    folder's (`checkpoint-500/model.safetensors`). This decides what may be held out, so names
    matter: `best.pt` beside a model's epochs is a model of its own, unless it equals one of them. A
    file with exactly the weights of another is skipped.

    Args:
        architecture: the networks' architecture; its activation and preprocessing are not in the
            files.
        mapping: a YAML or JSON file, or a dict, `theirs: ours` of tensor names; null drops a tensor.
        held_out: the share of models, drawn by `seed`, kept from everything that learns.

    Returns:
        The zoo, and the skipped files with reasons; paths are relative to `path`.

    Raises:
        FlownError: no folder, no usable checkpoint in it (the first reasons are named), an unknown
            network or tensor in `mapping`, networks whose buffers differ, or `out` exists or
            overlaps `path`.
    """
    mapping = read_mapping(mapping) if isinstance(mapping, Path | str) else dict(mapping or {})
    naming = Naming.of(architecture, mapping=mapping)
    _check_mapping(naming)
    path = _folder(path)
    found = _checkpoints(path)
    job = _Import("checkpoints", path, naming, task, [], distinct=True)
    return job.run(found, out, held_out, seed, overwrite), job.skipped


def from_modelzoos(
    path: Path | str,
    architecture: Architecture,
    task: Task,
    out: Path | str,
    *,
    epochs: Sequence[int] | None = None,
    held_out: float = 1 / 6,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Zoo, list[Skipped]]:
    """A zoo from Model Zoos' folders of Ray Tune trials (Schürholt et al. 2022).

    A trial is a model: a folder with `checkpoint_12/checkpoints` or `checkpoint_000012/checkpoints`,
    and `result.json` and `params.json` where they were kept. `module_list.` is stripped from names;
    where names still differ and the shapes are the network's in its order, that order is taken.

    Accuracies are `train_acc` and `validation_acc` or `val_acc`; `test_acc` is never used, because
    networks chosen by it could not be tested on it. A trial whose `model::nlin` is not the task's
    activation is skipped: with another activation its weights compute something else.

    Args:
        architecture: the networks' architecture; its activation and preprocessing are not in the
            files.
        epochs: only these; by default all that were kept.
        held_out: the share of models, drawn by `seed`, kept from everything that learns.

    Returns:
        The zoo, and the skipped files with reasons; paths are relative to `path`.

    Raises:
        FlownError: no folder, no trial in it, no usable checkpoint (the first reasons are named),
            an unknown network, or `out` exists or overlaps `path`.
    """
    naming = Naming.of(
        architecture, prefixes=(*statefiles.PREFIXES, modelzoos.PREFIX), by_order=True
    )
    path = _folder(path)
    found, skipped, notes = modelzoos.trials(path, architecture.activation, epochs)
    job = _Import("modelzoos", path, naming, task, skipped, notes=notes)
    return job.run(found, out, held_out, seed, overwrite), job.skipped


def _folder(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise FlownError(f"{path}: no such folder")
    return path


def _check_mapping(naming: Naming) -> None:
    known = {*naming.layout.names, *naming.buffers}
    for source, target in naming.mapping.items():
        if not isinstance(source, str) or not isinstance(target, str | None):
            raise FlownError(f"mapping: expected two tensors' names, got {source!r}: {target!r}")
        if target is not None and target not in known:
            raise FlownError(f"mapping: {source!r}: {unknown('tensor', target, known)}")


def _checkpoints(path: Path) -> list[Found]:
    """Every state dict in a folder; epochs of one model together, those models first."""
    suffixes = statefiles.SUFFIXES + statefiles.INDEX_SUFFIXES
    files = [
        file
        for file in path.rglob("*")
        if file.name.endswith(suffixes)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    parts: set[Path] = set()
    for index in files:
        if index.name.endswith(statefiles.INDEX_SUFFIXES):
            try:
                parts |= {index.parent / part for part in statefiles.parts_of(index).values()}
            except FlownError:
                continue  # the error comes when the file is opened
    found = []
    for file in files:
        if file not in parts:
            name = file.relative_to(path)
            found.append(Found(file, name.as_posix(), *_model(name)))
    if not found:
        trials = next(path.rglob("checkpoint_*/checkpoints"), None)
        hint = "; these look like Model Zoos' trials, import them as `modelzoos`" if trials else ""
        raise FlownError(f"{path}: no {', '.join(statefiles.SUFFIXES)} file in it{hint}")
    sizes = Counter(one.model for one in found)
    # The first of two files with equal weights stays; an epoch of a model comes before a `best.pt`.
    return sorted(found, key=lambda one: (sizes[one.model] == 1, one.model, one.epoch, one.name))


def _model(name: Path) -> tuple[str, int]:
    """A key of the file's model, and its epoch, by the rule of `from_checkpoints`."""
    suffixes = statefiles.INDEX_SUFFIXES + statefiles.SUFFIXES
    stem = next(name.name.removesuffix(s) for s in suffixes if name.name.endswith(s))
    folder, numbers = name.parent, _NUMBER.findall(stem)
    if not numbers:
        numbers = _NUMBER.findall(folder.name)
        folder = folder.with_name(_NUMBER.sub("*", folder.name)) if numbers else folder
    epochs = [int(number) for kind, number in numbers if kind.lower() == "epoch"]
    epochs += [int(number) for _, number in numbers]
    return (folder / _NUMBER.sub("*", stem)).as_posix(), epochs[0] if epochs else 0


class _Import:
    """One import: reads checkpoints, writes shards as they fill, records what it did."""

    def __init__(
        self,
        kind: str,
        path: Path,
        naming: Naming,
        task: Task,
        skipped: list[Skipped],
        *,
        distinct: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        self.kind, self.path, self.naming, self.skipped = kind, path, naming, skipped
        self.task = task
        self.distinct, self.notes = distinct, notes
        self.seen: dict[bytes, str] = {}
        self.renamed: dict[str, str] = {}
        self.buffers: Counter[str] = Counter()
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
        out = prepare_output(out, overwrite)
        write_json(
            out / "progress.json", {"format": FORMAT, "import": str(self.path)}
        )  # a zoo that is not finished
        writer = _Writer(out, self.naming.layout)
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
        if self.constants:
            save_tensors(frozen_file(out, 0), self.constants)
        write_json(out / "import.json", self._report(rows))
        about = {
            "import": {"format": self.kind, "source": str(self.path)},
            "recipes": {},
            "seed": seed,
            "flown": __version__,
        }
        zoo = Zoo.write(out, [self.naming.layout], [self.task], rows, about)
        (out / "progress.json").unlink()
        return zoo

    def _read(self, found: Sequence[Found], writer: _Writer) -> None:
        task, models = self.task.id, dict[str, int]()
        with bar(f"import {task}", len(found)) as update:
            for done, file in enumerate(found, 1):
                try:
                    fitted = self.naming.fit(statefiles.open_state(file.path))
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

    def _report(self, rows: Sequence[Row]) -> dict[str, Any]:
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
            "notes": list(self.notes),
            "skipped": [one._asdict() for one in self.skipped],
        }


class _DifferentBuffersError(FlownError):
    """Two networks of one import have different buffers."""


class _Writer:
    """Shards of a zoo, each written when it is full."""

    def __init__(self, out: Path, layout: WeightLayout) -> None:
        self.out, self.layout = out, layout
        self.most = max(1, min(_ROWS, _BYTES // (4 * layout.size)))
        self.rows: list[Row] = []
        self.shards = 0
        self.vectors: list[Tensor] = []

    @property
    def name(self) -> str:
        return f"weights-{self.shards:05d}.safetensors"

    def add(self, vector: Tensor, row: Row) -> None:
        """Adds a network's weights (D,)."""
        self.rows.append(
            row._replace(shard=self.name, offset=len(self.vectors), checksum=checksum(vector))
        )
        self.vectors.append(vector)
        if len(self.vectors) == self.most:
            self.flush()

    def withdraw(self) -> None:
        """Removes the files of an import that failed."""
        for path in [self.out / "progress.json", *self.out.glob("weights-*.safetensors")]:
            path.unlink()
        self.out.rmdir()

    def flush(self) -> None:
        if self.vectors:
            save_tensors(self.out / self.name, self.layout.unpack(torch.stack(self.vectors)))
            self.shards += 1
            self.vectors = []
