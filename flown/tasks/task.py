"""A task is a value: which images, and what their labels mean. A zoo has a table of them.

tasks.jsonl   one task a line: {"id": ..., "dataset": ..., "classes": [...], ...}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, Optional

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flown.base.config import Config
from flown.base.errors import FlownError, unknown
from flown.base.files import parse_json, read_text, write_text
from flown.tasks.classes import only_counts
from flown.tasks.splits import ImageData, ManyClass, Split

Rotation = Literal[0, 90, 180, 270]
_VAL, _TEST = 0.1, 0.2  # of a many-class set's images: parts that training does not see


class Task(Config):
    """A classification task.

    `classes` names the labels in their order. `members` are the data set's own class numbers behind
    the labels, by default all of them in order; `rotation` turns every image, in degrees. `split` is
    of tasks: networks for `val` and `test` tasks are in no training.
    """

    id: str
    dataset: str
    classes: tuple[str, ...]
    members: Optional[tuple[int, ...]] = None
    rotation: Rotation = 0
    split: Literal["train", "val", "test"] = "train"

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if not self.classes:
            raise ValueError("a task needs a class")
        if self.members is not None:
            if len(self.members) != len(self.classes):
                raise ValueError(f"{len(self.members)} members for {len(self.classes)} classes")
            if min(self.members) < 0 or len(set(self.members)) < len(self.members):
                raise ValueError(f"members {self.members}: each a class number, none twice")
        return self

    @classmethod
    def of(cls, images: ImageData) -> Task:
        """The task that a data set is by itself."""
        return cls(id=images.name, dataset=images.name, classes=images.classes)

    def places(self, source: ImageData | ManyClass) -> tuple[int, ...]:
        """Where the task's classes stand among a data set's: by their names, where these say anything.

        Raises:
            FlownError: a class that is not there.
        """
        members = self.members or tuple(range(len(self.classes)))
        if bad := [m for m in members if m >= len(source.classes)]:
            raise FlownError(
                f"task '{self.id}': member {bad[0]} is out of range 0..{len(source.classes) - 1}, "
                f"the classes of '{source.name}'"
            )
        found = tuple(source.classes[m] for m in members)
        if found == self.classes or only_counts(self.classes) or only_counts(source.classes):
            return members
        if missing := [name for name in self.classes if name not in source.classes]:
            raise FlownError(
                f"task '{self.id}': '{source.name}' has no class '{missing[0]}'; give the images that "
                "the task is of"
            )
        return tuple(source.classes.index(name) for name in self.classes)

    def images(self, source: ImageData | ManyClass) -> ImageData:
        """The task's own images, labelled by its own numbers.

        Of a many-class set, which has no parts by image, a tenth and a fifth of each class's images
        are kept apart as validation and test part.

        Raises:
            FlownError: a member is no class of `source`, or a class has no image in some part.
        """
        members = self.places(source)
        if isinstance(source, ImageData) and self._whole(source, members):
            return ImageData(self.id, self.classes, source.train, source.val, source.test)
        if isinstance(source, ManyClass):
            train, val, test = self._by_image(Split(source.images, source.labels), members)
        else:
            train, val, test = source.train, source.val, source.test
        numbers = torch.full((len(source.classes),), -1)
        numbers[list(members)] = torch.arange(len(members))
        parts = {"train": train, "val": val, "test": test}
        chosen = {name: self._chosen(part, numbers, name) for name, part in parts.items()}
        return ImageData(self.id, self.classes, **chosen)

    def _whole(self, source: ImageData, members: tuple[int, ...]) -> bool:
        """Whether the task is all of a data set as it is."""
        return not self.rotation and members == tuple(range(len(source.classes)))

    def _chosen(self, part: Split, numbers: Tensor, name: str) -> Split:
        """The images of the task's classes, turned, with the labels that `numbers` gives them."""
        labels = numbers[part.labels]
        kept = labels >= 0
        found = torch.bincount(labels[kept], minlength=len(self.classes))
        if (found == 0).any():
            missing = self.classes[int(found.argmin())]
            raise FlownError(f"task '{self.id}': class '{missing}' has no image in its {name} part")
        images = part.images[kept].rot90(self.rotation // 90, (2, 3))
        return Split(images, labels[kept])

    def _by_image(self, whole: Split, members: tuple[int, ...]) -> tuple[Split, Split, Split]:
        """Each class's first images to train on, the last apart: on Omniglot, other drawers'."""
        rows = [(whole.labels == member).nonzero().flatten() for member in members]
        ends = [(round(len(r) * (1 - _VAL - _TEST)), round(len(r) * (1 - _TEST))) for r in rows]
        train = torch.cat([r[:a] for r, (a, _) in zip(rows, ends, strict=True)])
        val = torch.cat([r[a:b] for r, (a, b) in zip(rows, ends, strict=True)])
        test = torch.cat([r[b:] for r, (_, b) in zip(rows, ends, strict=True)])
        return whole[train], whole[val], whole[test]


class TaskDraw(Config):
    """Random tasks over the classes of a many-class set.

    `ways` classes each, all images turned by one of `rotations`; `part` is the set's own part of
    classes, so that tasks over other parts share none with these. A share `held_out` of the tasks is
    of split `val`.
    """

    ways: int = Field(default=10, ge=2)
    rotations: tuple[Rotation, ...] = (0, 90, 180, 270)
    part: Literal["train", "val", "test"] = "train"
    held_out: float = Field(default=0.1, ge=0, lt=1)

    def task(self, source: ManyClass, number: int, seed: int = 0) -> Task:
        """The task of that number; the same for the same seed, whatever others are drawn.

        Raises:
            FlownError: fewer classes than `ways`.
        """
        classes = source.class_split[self.part]
        if self.ways > len(classes):
            raise FlownError(
                f"{source.name}: {self.ways} ways asked for, its part '{self.part}' has "
                f"{len(classes)} classes"
            )
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        members = classes[torch.randperm(len(classes), generator=generator)[: self.ways]].tolist()
        turn = int(torch.randint(len(self.rotations), (1,), generator=generator))
        late = float(torch.rand(1, generator=generator)) < self.held_out
        return Task(
            id=f"{source.name}-{number:06d}",
            dataset=source.name,
            classes=tuple(source.classes[member] for member in members),
            members=tuple(members),
            rotation=self.rotations[turn],
            split="val" if late else "train",
        )


class TaskTable(Mapping[str, Task]):
    """Tasks by id, in their order.

    Raises:
        FlownError: two tasks have one id.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks: dict[str, Task] = {}
        for task in tasks:
            if task.id in self._tasks:
                raise FlownError(f"two tasks have the id '{task.id}'")
            self._tasks[task.id] = task

    def __getitem__(self, id: str) -> Task:
        if id not in self._tasks:
            raise unknown("task", id, self._tasks)
        return self._tasks[id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, id: object) -> bool:
        return id in self._tasks

    def __repr__(self) -> str:
        shown = ", ".join(list(self)[:4]) + (", ..." if len(self) > 4 else "")
        return f"TaskTable({len(self)}: {shown})"

    def write(self, path: Path) -> None:
        """Writes one JSON object a line."""
        write_text(path, "".join(task.model_dump_json() + "\n" for task in self.values()))

    @classmethod
    def read(cls, path: Path) -> TaskTable:
        """Reads what `write` wrote.

        Raises:
            FlownError: no such file, a line that is no task (named), or two tasks with one id.
        """
        tasks = []
        for number, line in enumerate(read_text(path).splitlines(), 1):
            where = f"{path}, line {number}"
            tasks.append(Task.parse(parse_json(line, where), where))
        try:
            return cls(tasks)
        except FlownError as error:
            raise FlownError(f"{path}: {error}") from None
