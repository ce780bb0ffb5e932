"""Converts zoos of flown 0.1, where a task and an architecture were one record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flown.base.errors import FlownError
from flown.base.files import read_json, replacing
from flown.base.run import Run
from flown.nets.architecture import Architecture
from flown.tasks.task import Task
from flown.weights.layout import WeightLayout
from flown.zoo.rows import Row
from flown.zoo.store import Zoo, frozen_file

OLD = "flown-zoo-1"


def convert(source: Path | str, out: Path | str, overwrite: bool = False) -> Zoo:
    """Copies an old zoo's weights and writes its tables anew.

    Raises:
        FlownError: `source` is no zoo of flown 0.1 or is broken, or `out` exists.
    """
    source = Path(source)
    about = read_json(source / "zoo.json")
    if not isinstance(about, dict) or about.get("format") != OLD:
        raise FlownError(f"{source}: no zoo of flown 0.1; there is nothing to convert")
    plan = {"conversion": str(source)}
    run = Run(out, plan, resume=False, overwrite=overwrite, file="progress.json", sources=[source])
    try:
        layouts = [_layout(value) for value in about["layouts"]]
        tasks = [_task(value["task"]) for value in about["layouts"]]
        numbers = {task.id: i for i, task in enumerate(tasks)}
        lines = (source / "index.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [_row(json.loads(line), numbers) for line in lines]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise FlownError(f"{source}: not a whole zoo of flown 0.1 ({error})") from None
    run.begin()
    for shard in sorted({row.shard for row in rows}):
        _copy(source / shard, run.path / shard)
    for task, number in numbers.items():
        if (frozen := source / f"rest-{task}.safetensors").exists():
            _copy(frozen, frozen_file(run.path, number))
    kept = {key: value for key, value in about.items() if key not in ("format", "layouts")}
    made = Zoo.write(run.path, layouts, tasks, rows, kept)
    run.file.unlink()
    return made


def _layout(value: dict[str, Any]) -> WeightLayout:
    task = value["task"]
    architecture = Architecture(
        net=value["net"],
        outputs=len(task["classes"]),
        **{key: task[key] for key in ("channels", "size", "activation", "mean", "std")},
    )
    names = {key: value[key] for key in ("names", "shapes")}
    return WeightLayout.parse({"architecture": architecture.model_dump(), **names}, "zoo.json")


def _task(value: dict[str, Any]) -> Task:
    return Task(id=value["name"], dataset=value["name"], classes=tuple(value["classes"]))


def _row(value: dict[str, Any], numbers: dict[str, int]) -> Row:
    return Row(**value, layout=numbers[value["task"]])


def _copy(source: Path, target: Path) -> None:
    if source.parent != source.resolve().parent and not source.is_file():
        raise FlownError(f"{source}: no such file")
    with replacing(target) as scratch:
        shutil.copyfile(source, scratch)
