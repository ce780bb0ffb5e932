"""A zoo on disk, readable without this library.

    zoo.json                  what it is: a layout per task, recipes, versions; written last
    index.jsonl               one row a checkpoint: task, model, seed, epoch, step, split, accuracies,
                              where its weights lie (shard, offset), and their checksum
    weights-*.safetensors     `(rows, *shape)` per tensor under its state_dict name
    rest-<task>.safetensors   where only a subset of tensors varies: all others, once

Rows of one shard belong to one task. `split` is by seed: a network and all its checkpoints are
either in `train` or in `held-out`; of a lone network, the last checkpoints are held out. Shards are
mapped into memory, not read: a zoo may be larger than the memory, and costs what is asked of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flown.base.errors import FlownError, unknown
from flown.base.files import (
    begin,
    begun,
    file_name,
    load_tensors,
    prepare_output,
    read_json,
    save_tensors,
    write_json,
)
from flown.base.progress import bar
from flown.weights.batch import WeightBatch
from flown.weights.layout import JointLayout, WeightLayout
from flown.zoo.mapped import Mapped
from flown.zoo.rows import Row, checksum, read_rows, write_rows

FORMAT = "flown-zoo-1"
_CHUNK = 1 << 22  # weights that are verified at a time


class Zoo:
    """A population of trained networks for one task or several."""

    def __init__(
        self,
        path: Path,
        layouts: Sequence[WeightLayout],
        rows: Sequence[Row],
        about: dict[str, Any],
    ) -> None:
        self.path = path
        self.layouts = tuple(layouts)
        self.rows = tuple(rows)
        self.about = about
        self._mapped: dict[str, Mapped] = {}
        self._rest: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def open(cls, path: Path | str) -> Zoo:
        """Opens a zoo folder; weights are read when asked for.

        Raises:
            FlownError: no zoo there, or one that is not finished.
        """
        path = Path(path)
        if not (path / "zoo.json").is_file():
            raise FlownError(f"{path}: no zoo here, zoo.json is missing{_begun(path)}")
        about = read_json(path / "zoo.json")
        if about.get("format") != FORMAT:
            raise FlownError(
                f"{path}/zoo.json: format {about.get('format')!r}, expected {FORMAT!r}"
            )
        layouts = [WeightLayout.parse(value, f"{path}/zoo.json") for value in about["layouts"]]
        rows = read_rows(path / "index.jsonl")
        known = {layout.task.name for layout in layouts}
        for number, row in enumerate(rows, 1):
            if row.task not in known:
                raise FlownError(
                    f"{path}/index.jsonl, line {number}: {unknown('task', row.task, known)}"
                )
        return cls(path, layouts, rows, about)

    @classmethod
    def write(
        cls, path: Path, layouts: Sequence[WeightLayout], rows: Sequence[Row], about: dict[str, Any]
    ) -> Zoo:
        """Writes index and manifest beside shards that are there already; the manifest last."""
        write_rows(path / "index.jsonl", rows)
        content = {
            "format": FORMAT,
            **about,
            "layouts": [x.model_dump(mode="json") for x in layouts],
        }
        write_json(path / "zoo.json", content)
        return cls.open(path)

    @classmethod
    def join(cls, zoos: Sequence[Zoo], out: Path | str, overwrite: bool = False) -> Zoo:
        """Copies several zoos of different tasks, or what was selected of them, into one folder.

        Raises:
            FlownError: two share a task, or their networks cannot share a vector space.
        """
        JointLayout.of([layout for zoo in zoos for layout in zoo.layouts])
        tasks = [layout.task.name for zoo in zoos for layout in zoo.layouts]
        if len(set(tasks)) < len(tasks):
            twice = next(task for task in tasks if tasks.count(task) > 1)
            raise FlownError(f"task '{twice}' is in more than one of the zoos to join")
        sources = [zoo.path for zoo in zoos]
        for source in sources:
            if source.resolve() == Path(out).resolve():
                raise FlownError(f"{out}: is one of the zoos to join; choose another folder")
        out = prepare_output(out, overwrite, sources=sources)
        begin(out, {"join": [str(source) for source in sources]})
        rows: list[Row] = []
        for zoo in zoos:
            for task, layout in enumerate(zoo.layouts):
                name = layout.task.name
                batch, some = zoo.batch(name), [row for row in zoo.rows if row.task == name]
                shard = f"weights-{len(rows):06d}.safetensors"
                save_tensors(out / shard, zoo.layouts[task].unpack(batch.vectors))
                if batch.rest:
                    save_tensors(rest_file(out, name), batch.rest)
                rows += [r._replace(shard=shard, offset=i) for i, r in enumerate(some)]
        layouts = [layout for zoo in zoos for layout in zoo.layouts]
        recipes = {k: v for zoo in zoos for k, v in zoo.about.get("recipes", {}).items()}
        made = cls.write(out, layouts, rows, {"recipes": recipes})
        (out / "progress.json").unlink()
        return made

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Zoo({self.path}, {len(self)} checkpoints, tasks: {', '.join(self.tasks)})"

    @cached_property
    def identity(self) -> str:
        """A fingerprint of what the zoo holds: its layouts and index rows, not its place."""
        text = json.dumps([[x.model_dump(mode="json") for x in self.layouts], *self.rows])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(layout.task.name for layout in self.layouts)

    @cached_property
    def joint(self) -> JointLayout:
        """The vector space that all networks of the zoo share."""
        return JointLayout.of(self.layouts)

    def layout(self, task: str) -> WeightLayout:
        if task not in self.tasks:
            raise unknown("task", task, self.tasks)
        return self.layouts[self.tasks.index(task)]

    def select(
        self, task: str | None = None, split: str | None = None, epochs: Sequence[int] | None = None
    ) -> Zoo:
        """The same zoo with only some of its rows; `epochs` may count from the last with -1, -2..."""
        last = {t: sorted({row.epoch for row in self.rows if row.task == t}) for t in self.tasks}

        def wanted(row: Row) -> bool:
            chosen = (
                None
                if epochs is None
                else {last[row.task][e] if -len(last[row.task]) <= e < 0 else e for e in epochs}
            )
            return (
                (task is None or row.task == task)
                and (split is None or row.split == split)
                and (chosen is None or row.epoch in chosen)
            )

        rows = [row for row in self.rows if wanted(row)]
        if not rows:
            raise FlownError(
                f"{self.path}: no checkpoint with task={task} split={split} epochs={epochs}"
            )
        layouts = [x for x in self.layouts if any(row.task == x.task.name for row in rows)]
        return Zoo(self.path, layouts, rows, self.about)

    def batch(self, task: str) -> WeightBatch:
        """All checkpoints of one task, in the order of `rows`.

        Raises:
            FlownError: as `read`.
        """
        places = [i for i, row in enumerate(self.rows) if row.task == task]
        origin = {"zoo": str(self.path)}
        return WeightBatch(self.layout(task), self.read(places), origin, self.rest(task))

    def rest(self, task: str) -> dict[str, Tensor]:
        """What networks of a subset share, by state_dict name; nothing for whole networks."""
        path = rest_file(self.path, self.layout(task).task.name)
        if task not in self._rest:
            self._rest[task] = load_tensors(path)[0] if path.exists() else {}
        return self._rest[task]

    def read(self, places: Sequence[int]) -> Tensor:
        """The weights (n, D) of some `rows`, by their places, all of one task.

        Raises:
            FlownError: a shard is missing, broken or of another layout; a checkpoint's bytes are
                not those that were written, or it holds NaN or Inf.
        """
        rows, vectors = [self.rows[i] for i in places], self.raw(places)
        for row, vector in zip(rows, vectors, strict=True):
            if row.checksum is not None and checksum(vector) != row.checksum:
                raise FlownError(f"{self._name(row)} is not what was written: the file is damaged")
        broken = (~torch.isfinite(vectors).all(dim=1)).nonzero().flatten().tolist()
        if broken:
            raise FlownError(f"{self._name(rows[broken[0]])} holds NaN or Inf; remove it")
        return vectors

    def raw(self, places: Sequence[int]) -> Tensor:
        """As `read`, but not checked: what is damaged, NaN or Inf comes as it lies on the disk.

        Raises:
            FlownError: a shard is missing, broken or of another layout.
        """
        rows = [self.rows[i] for i in places]
        layout = self.layout(rows[0].task)
        vectors = torch.empty(len(rows), layout.size)
        of_shard: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            of_shard.setdefault(row.shard, []).append(i)
        for shard, some in of_shard.items():
            offsets = torch.tensor([rows[i].offset for i in some])
            vectors[some] = self._shard(shard, layout).read(offsets)
        return vectors

    def _name(self, row: Row) -> str:
        return (
            f"{self.path / row.shard}: row {row.offset}, model {row.model} (seed {row.seed}, "
            f"epoch {row.epoch}) of task '{row.task}',"
        )

    def _shard(self, name: str, layout: WeightLayout) -> Mapped:
        if name not in self._mapped:
            self._mapped[name] = Mapped(self.path / name, layout)
        return self._mapped[name]

    def verify(self) -> list[str]:
        """Reads every checkpoint; what is wrong, a line each.

        Wrong are: bytes that are not those that were written, NaN and Inf, shards that are missing
        or cannot be read, and an index that disagrees with its shards.
        """
        places: dict[str, list[int]] = {}
        for place, row in enumerate(self.rows):
            places.setdefault(row.shard, []).append(place)
        named: dict[str, set[int]] = {}
        for row in read_rows(self.path / "index.jsonl"):  # `rows` may be a selection of them
            named.setdefault(row.shard, set()).add(row.offset)
        found = []
        with bar("zoo verify", len(places)) as update:
            for done, (shard, some) in enumerate(sorted(places.items()), 1):
                found += self._damage(shard, some, named.get(shard, set()))
                self._mapped.pop(shard, None)  # or all of the zoo would stay in memory
                update(done, f"{len(found)} faults" if found else "")
        files = sorted(path.name for path in self.path.glob("weights-*.safetensors"))
        found += [f"{self.path / x}: no row of the index names it" for x in files if x not in named]
        return found

    def _damage(self, shard: str, places: list[int], named: set[int]) -> list[str]:
        """What is wrong with a shard and its rows at `places`; `named`: offsets the index knows."""
        path, layout = self.path / shard, self.layout(self.rows[places[0]].task)
        try:
            count = self._shard(shard, layout).rows
        except FlownError as error:
            return [f"{error}; the index names {len(places)} of its rows"]
        found = []
        inside = [place for place in places if 0 <= self.rows[place].offset < count]
        if beyond := len(places) - len(inside):
            found.append(f"{path}: has {count} rows, {beyond} that the index names lie beyond them")
        if unnamed := sorted(set(range(count)) - named):
            found.append(
                f"{path}: no row of the index names {len(unnamed)} of its {count} rows, "
                f"row {unnamed[0]} the first"
            )
        size = max(1, _CHUNK // layout.size)
        for some in (inside[start : start + size] for start in range(0, len(inside), size)):
            try:
                self.read(some)
            except FlownError:
                found += self._each(some)
        return found

    def _each(self, places: Sequence[int]) -> list[str]:
        found = []
        for place in places:
            try:
                self.read([place])
            except FlownError as error:
                found.append(str(error))
        return found

    def vectors(self) -> tuple[Tensor, Tensor]:
        """All checkpoints in the joint space (n, D) with their task indices (n,), task by task."""
        parts = [self.joint.embed(self.batch(task).vectors, i) for i, task in enumerate(self.tasks)]
        counts = torch.tensor([len(part) for part in parts])
        return torch.cat(parts), torch.repeat_interleave(torch.arange(len(parts)), counts)


def rest_file(folder: Path, task: str) -> Path:
    """Where a subset zoo keeps what a task's networks share."""
    return task_file(folder, "rest", task)


def task_file(folder: Path, what: str, task: str) -> Path:
    """A file of one task, whose name may be the path of a folder of images."""
    return folder / f"{what}-{file_name(task)}.safetensors"


def _begun(path: Path) -> str:
    """What to do about a folder that is not a zoo yet."""
    about = begun(path)
    if about is None:
        return ""
    for kind in ("import", "join", "alignment"):
        if kind in about:
            return f" (its {kind} was not finished: run it again with --overwrite)"
    return " (its training was not finished: add --resume)"
