"""A zoo on disk, readable without this library.

    zoo.json                  what it is: the networks' layouts, recipes, versions; written last
    tasks.jsonl               one task a line: id, data set, classes, split
    index.jsonl               one row a checkpoint: task, model, seed, epoch, step, split, accuracies,
                              where its weights lie (shard, offset), their layout and checksum
    weights-*.safetensors     `(rows, *shape)` per tensor under its state_dict name
    rest-<layout>.safetensors where only a subset of tensors varies: all others, once

Rows of one shard share a layout, and may be for any tasks. `split` is by model: a network and all its
checkpoints are either in `train` or in `held-out`; of a lone network, the last checkpoints are held
out. Shards are mapped into memory: a zoo may be larger than the memory, and only the rows in use
are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flown.base.errors import FlownError, unknown
from flown.base.files import load_tensors, read_object, save_tensors, write_json
from flown.base.memory import check_fits
from flown.base.progress import bar
from flown.base.run import Run
from flown.tasks.task import Task, TaskTable
from flown.weights.batch import WeightBatch
from flown.weights.layout import JointLayout, WeightLayout, layouts_in
from flown.zoo.mapped import Mapped
from flown.zoo.rows import Row, checksum, read_rows, write_rows

FORMAT = "flown-zoo-2"
_CHUNK = 1 << 22  # weights that are verified at a time
_ROWS = 4096  # networks a shard of a zoo that is joined


class Zoo:
    """Trained networks for one task or several."""

    def __init__(
        self,
        path: Path,
        layouts: Sequence[WeightLayout],
        tasks: TaskTable,
        rows: Sequence[Row],
        about: dict[str, Any],
    ) -> None:
        self.path = path
        self.layouts = tuple(layouts)
        self.tasks = tasks
        self.rows = tuple(rows)
        self.about = about
        self._mapped: dict[str, Mapped] = {}
        self._frozen: dict[int, dict[str, Tensor]] = {}

    @classmethod
    def open(cls, path: Path | str) -> Zoo:
        """Opens a zoo folder; weights are read when they are needed.

        Raises:
            FlownError: no zoo there, or one that is not finished.
        """
        path = Path(path)
        if not (path / "zoo.json").is_file():
            raise FlownError(f"{path}: no zoo here, zoo.json is missing{_begun(path)}")
        about = read_object(path / "zoo.json")
        if about.get("format") == "flown-zoo-1":
            raise FlownError(
                f"{path}: written by flown 0.1; convert it: flown zoo convert {path} --out NEW"
            )
        if about.get("format") != FORMAT:
            raise FlownError(
                f"{path}/zoo.json: format {about.get('format')!r}, expected {FORMAT!r}"
            )
        layouts = layouts_in(about, path / "zoo.json")
        recipes = about.get("recipes", {})
        if not isinstance(recipes, dict) or not all(isinstance(x, dict) for x in recipes.values()):
            raise FlownError(f"{path}/zoo.json: recipes: expected objects by data set")
        tasks = TaskTable.read(path / "tasks.jsonl")
        rows = read_rows(path / "index.jsonl")
        for number, row in enumerate(rows, 1):
            if row.task not in tasks:
                raise FlownError(
                    f"{path}/index.jsonl, line {number}: {unknown('task', row.task, tasks)}"
                )
            if not 0 <= row.layout < len(layouts):
                raise FlownError(
                    f"{path}/index.jsonl, line {number}: layout {row.layout} is out of range "
                    f"0..{len(layouts) - 1}"
                )
        return cls(path, layouts, tasks, rows, about)

    @classmethod
    def write(
        cls,
        path: Path,
        layouts: Sequence[WeightLayout],
        tasks: Iterable[Task],
        rows: Sequence[Row],
        about: dict[str, Any],
    ) -> Zoo:
        """Writes tables and manifest beside existing shards; the manifest last."""
        TaskTable(tasks).write(path / "tasks.jsonl")
        write_rows(path / "index.jsonl", rows)
        content = {
            "format": FORMAT,
            **about,
            "layouts": [x.model_dump(mode="json") for x in layouts],
        }
        write_json(path / "zoo.json", content)
        return cls.open(path)

    @classmethod
    def join(
        cls,
        zoos: Sequence[Zoo],
        out: Path | str,
        overwrite: bool = False,
        resume: bool = False,
    ) -> Zoo:
        """Copies several zoos of different tasks, or selections of them, into one folder.

        With `resume`, a folder that holds these zoos already is kept, and an unfinished one is
        written anew.

        Raises:
            FlownError: two share a task, their networks cannot share a vector space, or with `resume`
                the folder holds other zoos.
        """
        JointLayout.of([layout for zoo in zoos for layout in zoo.layouts])
        try:
            tasks = TaskTable(task for zoo in zoos for task in zoo.tasks.values())
        except FlownError as error:
            raise FlownError(f"zoos to join: {error}") from None
        layouts: list[WeightLayout] = []
        parts = {"joined": [zoo.identity for zoo in zoos]}
        for source in (zoo.path for zoo in zoos):
            if source.resolve() == Path(out).resolve():
                raise FlownError(f"{out}: is one of the zoos to join; choose another folder")
        run = Run(
            out,
            parts,
            resume=resume,
            overwrite=overwrite,
            file="progress.json",
            sources=[zoo.path for zoo in zoos],
        )
        out = run.path
        if resume and (out / "zoo.json").exists():
            made = cls.open(out)
            run.check({"joined": made.about.get("joined")}, out / "zoo.json")
            return made
        run.begin()
        rows: list[Row] = []
        for zoo in zoos:
            for index, layout in enumerate(zoo.layouts):
                frozen = zoo.frozen_of(index)
                place = _place(layout, frozen, layouts)
                if frozen:
                    save_tensors(frozen_file(out, place), frozen)
                places = [i for i, row in enumerate(zoo.rows) if row.layout == index]
                for start in range(0, len(places), _ROWS):
                    chosen = places[start : start + _ROWS]
                    shard = f"weights-{len(rows):06d}.safetensors"
                    save_tensors(out / shard, layout.unpack(zoo.read(chosen)))
                    rows += [
                        zoo.rows[i]._replace(shard=shard, offset=offset, layout=place)
                        for offset, i in enumerate(chosen)
                    ]
        recipes = {k: v for zoo in zoos for k, v in zoo.about.get("recipes", {}).items()}
        made = cls.write(out, layouts, tasks.values(), rows, {"recipes": recipes, **parts})
        run.file.unlink()
        return made

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Zoo({self.path}, {len(self)} checkpoints, {self.tasks!r})"

    @cached_property
    def identity(self) -> str:
        """A fingerprint of the zoo's contents: layouts, tasks and index rows, but not its path."""
        tables = [[x.model_dump(mode="json") for x in self.layouts]]
        tables += [[x.model_dump(mode="json") for x in self.tasks.values()]]
        text = json.dumps([*tables, *self.rows])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def joint(self) -> JointLayout:
        """The vector space that all networks of the zoo share."""
        return JointLayout.of(self.layouts)

    @cached_property
    def places(self) -> dict[str, list[int]]:
        """The places in `rows` of every task's checkpoints."""
        places: dict[str, list[int]] = {task: [] for task in self.tasks}
        for place, row in enumerate(self.rows):
            places[row.task].append(place)
        return places

    def layout(self, task: str) -> WeightLayout:
        """The layout of a task's networks.

        Raises:
            FlownError: no such task, or its networks are of several layouts.
        """
        return self.layouts[self.place(task)]

    def place(self, task: str) -> int:
        """The place in `layouts` of a task's layout.

        Raises:
            FlownError: as `layout`.
        """
        _ = self.tasks[task]
        found = {self.rows[place].layout for place in self.places[task]}
        if len(found) != 1:
            raise FlownError(f"{self.path}: networks of task '{task}' are of {len(found)} layouts")
        return found.pop()

    def recipe(self, task: str) -> dict[str, Any]:
        """The recipe of a task's networks as plain values; empty where it is not known."""
        found: dict[str, Any] = self.about.get("recipes", {}).get(self.tasks[task].dataset, {})
        return found

    def select(
        self, task: str | None = None, split: str | None = None, epochs: Sequence[int] | None = None
    ) -> Zoo:
        """The same zoo with only some of its rows; `epochs` may count from the last with -1, -2..."""
        known: dict[str, set[float]] = {}
        for row in self.rows:
            known.setdefault(row.task, set()).add(row.epoch)
        chosen: dict[str, set[float]] = {}
        for name, found in known.items() if epochs is not None else ():
            last = sorted(found)
            chosen[name] = {last[e] if -len(last) <= e < 0 else e for e in epochs or ()}
        rows = [
            row
            for row in self.rows
            if (task is None or row.task == task)
            and (split is None or row.split == split)
            and (epochs is None or row.epoch in chosen[row.task])
        ]
        if not rows:
            raise FlownError(
                f"{self.path}: no checkpoint with task={task} split={split} epochs={epochs}"
            )
        left = {row.task for row in rows}
        tasks = TaskTable(value for name, value in self.tasks.items() if name in left)
        return Zoo(self.path, self.layouts, tasks, rows, self.about)

    def batch(self, task: str) -> WeightBatch:
        """All checkpoints of one task, in the order of `rows`.

        Raises:
            FlownError: as `layout` and `read`.
        """
        index = self.place(task)
        return WeightBatch(
            self.layouts[index],
            self.read(self.places[task]),
            {"zoo": str(self.path)},
            self.frozen_of(index),
            task=self.tasks[task],
        )

    def frozen(self, task: str) -> dict[str, Tensor]:
        """The tensors that networks of a subset share, by state_dict name; {} for whole ones."""
        return self.frozen_of(self.place(task))

    def frozen_of(self, layout: int) -> dict[str, Tensor]:
        """As `frozen`, for the networks of a layout."""
        if layout not in self._frozen:
            path = frozen_file(self.path, layout)
            self._frozen[layout] = load_tensors(path)[0] if path.exists() else {}
        return self._frozen[layout]

    def read(self, places: Sequence[int]) -> Tensor:
        """The weights (n, D) of `rows` at `places`, all of one layout.

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
        """As `read`, without checks: damaged weights, NaN and Inf are returned as they are stored.

        Raises:
            FlownError: a shard is missing, broken or of another layout.
        """
        rows = [self.rows[i] for i in places]
        layout = self.layouts[rows[0].layout]
        check_fits(len(rows), layout.size, "networks at once")
        of_shard: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            of_shard.setdefault(row.shard, []).append(i)
        shards = {name: self._shard(name, layout) for name in of_shard}  # all are of the layout
        vectors = torch.empty(len(rows), layout.size)
        for name, group in of_shard.items():
            offsets = torch.tensor([rows[i].offset for i in group])
            vectors[group] = shards[name].read(offsets)
        return vectors

    def _name(self, row: Row) -> str:
        return (
            f"{self.path / row.shard}: row {row.offset}, model {row.model} (seed {row.seed}, "
            f"epoch {row.epoch}) of task '{row.task}',"
        )

    def _shard(self, name: str, layout: WeightLayout) -> Mapped:
        if name not in self._mapped:
            file = self.path / name
            if file.is_symlink() and file.resolve().parent != self.path.resolve():
                raise FlownError(f"{file}: a link out of the zoo's folder; put the file there")
            self._mapped[name] = Mapped(file, layout)
        return self._mapped[name]

    def verify(self) -> list[str]:
        """Reads every checkpoint; returns a line for each fault.

        Faults are bytes that changed since they were written, NaN and Inf, shards that are missing
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
            for done, (shard, in_shard) in enumerate(sorted(places.items()), 1):
                found += self._damage(shard, in_shard, named.get(shard, set()))
                self._mapped.pop(shard, None)  # otherwise the whole zoo would stay in memory
                update(done, f"{len(found)} faults" if found else "")
        files = sorted(path.name for path in self.path.glob("weights-*.safetensors"))
        found += [f"{self.path / x}: no row of the index names it" for x in files if x not in named]
        return found

    def _damage(self, shard: str, places: list[int], named: set[int]) -> list[str]:
        """The faults of a shard and its rows at `places`; `named`: offsets that the index knows."""
        path, layout = self.path / shard, self.layouts[self.rows[places[0]].layout]
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
        for block in (inside[start : start + size] for start in range(0, len(inside), size)):
            try:
                self.read(block)
            except FlownError:
                found += self._each(block)
        return found

    def _each(self, places: Sequence[int]) -> list[str]:
        found = []
        for place in places:
            try:
                self.read([place])
            except FlownError as error:
                found.append(str(error))
        return found


def frozen_file(folder: Path, layout: int) -> Path:
    """The file of the tensors that the networks of a layout share."""
    return folder / f"rest-{layout}.safetensors"


def _place(layout: WeightLayout, frozen: dict[str, Tensor], layouts: list[WeightLayout]) -> int:
    """Where a zoo that is joined has a layout; networks on another frozen rest have one of their own."""
    if not frozen and layout in layouts:
        return layouts.index(layout)
    layouts.append(layout)
    return len(layouts) - 1


def _begun(path: Path) -> str:
    """Advice on a folder that is not a zoo yet."""
    if not (path / "progress.json").exists():
        return ""
    about = read_object(path / "progress.json")
    if about.keys() & {"import", "conversion", "joined", "alignment"}:
        return " (it was not finished: run its command again with --overwrite)"
    return " (its training was not finished: add --resume)"
