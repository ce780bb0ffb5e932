"""A zoo of probed heads: linear classifiers of random tasks over base classes, trained together.

FLoWN (A.4.2) probes 50,000 tasks and leaves their data open. Here a task has `ways` random classes of
the part with `shots` random images of each; the probe sees all of them at every step and starts at
zero, so that a head depends only on its task. `queries` further images a class measure it.

Tasks come in shards of 1,000, each with its own seed: an interrupted run continues after the last whole
shard. Index rows hold a task's class numbers in `grid`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.base.files import save_tensors
from flown.base.progress import bar
from flown.base.run import Run
from flown.heads.classifiers import apply_heads
from flown.heads.frames import ClassTokens, class_tokens
from flown.heads.probe import ProbeConfig, probe
from flown.nets.architecture import Architecture
from flown.tasks import ClassPool, Episodes
from flown.tasks.draw import SAMPLER
from flown.tasks.task import Task, TaskTable
from flown.version import __version__
from flown.weights.layout import WeightLayout
from flown.zoo import Zoo
from flown.zoo.rows import Row, checksum, read_rows, write_rows

_SHARD = 1000
_HELD_OUT = 6  # every sixth head


class HeadsConfig(Config):
    """Tasks, their sizes, and how they are probed."""

    tasks: int = 50_000
    ways: int = 5
    shots: int = 5
    queries: int = 15
    probe: ProbeConfig = ProbeConfig()
    seed: int = 0


def heads_layout(features: int, ways: int) -> WeightLayout:
    """The layout of heads: weight (ways, F), bias (ways,)."""
    return WeightLayout.of(nn.Linear(features, ways), feature_head("linear-head", features, ways))


def feature_head(net: str, features: int, ways: int) -> Architecture:
    """The architecture of a head on features, which are its images' channels."""
    return Architecture(
        net=net, channels=features, size=1, outputs=ways, activation="none", mean=0.0, std=1.0
    )


def shard_tasks(features: Tensor, pool: ClassPool, config: HeadsConfig, shard: int) -> Episodes:
    """The tasks of one shard, over features (N, F) whose rows `pool` draws."""
    count = min(_SHARD, config.tasks - shard * _SHARD)
    generator = torch.Generator().manual_seed(config.seed * 100_003 + shard)
    drawn = pool.draw(config.ways, config.shots, config.queries, generator, count)
    return drawn.gather(features)


def all_tasks(
    features: Tensor, labels: Tensor, classes: Tensor, config: HeadsConfig
) -> Iterator[Episodes]:
    """The tasks of all shards, one after another, in the order of the zoo's rows."""
    pool = ClassPool(labels, classes)
    for shard in range(shards(config)):
        yield shard_tasks(features, pool, config, shard)


def zoo_tokens(
    features: Tensor,
    labels: Tensor,
    classes: Tensor,
    config: HeadsConfig,
    queries: bool = True,
    shots: Sequence[int] = (1,),
) -> ClassTokens:
    """The class tokens of the heads' tasks, from only the first images of each class.

    Args:
        shots: images of each class; successive shards of 1,000 tasks use successive entries.
    """
    drawn = enumerate(all_tasks(features, labels, classes, config))
    return ClassTokens.join(
        [class_tokens(tasks.first_shots(shots[i % len(shots)]), queries) for i, tasks in drawn]
    )


def shards(config: HeadsConfig) -> int:
    """The number of files of heads."""
    return -(-config.tasks // _SHARD)


def train_heads(
    features: Tensor,
    labels: Tensor,
    classes: Tensor,
    out: Path | str,
    config: HeadsConfig | None = None,
    *,
    name: str = "heads",
    resume: bool = False,
    overwrite: bool = False,
) -> Zoo:
    """Probes all tasks and writes the zoo.

    Args:
        features: (N, F), with labels (N,); `classes` are the class numbers to draw from.
        resume: continue after the last whole shard.

    Raises:
        FlownError: no task, too few classes or images, `out` exists, or holds other heads.
    """
    config = config or HeadsConfig()
    if config.tasks < 1:
        raise FlownError(f"heads: tasks must be 1 or more, got {config.tasks}")
    begun = {
        "heads": config.model_dump(mode="json"),
        "features": checksum(features.flatten()),
        "classes": classes.tolist(),
        "sampler": SAMPLER,
    }
    run = Run(
        out,
        begun,
        resume=resume,
        overwrite=overwrite,
        configs={"heads": HeadsConfig},
        file="progress.json",
    )
    out = run.path
    if resume and (out / "zoo.json").exists():
        done = Zoo.open(out)
        run.check(done.about.get("recipes", {}).get(name, {}), out / "zoo.json")
        return done
    run.begin()
    pool = ClassPool(labels, classes)
    layout = heads_layout(features.shape[1], config.ways)
    count = shards(config)
    with bar(f"heads {name}", count) as update:
        for shard in range(count):
            index = out / f"index-{shard * _SHARD:06d}.jsonl"
            if not index.exists():
                tasks = shard_tasks(features, pool, config, shard)
                table = _table(tasks.classes, name, shard * _SHARD)
                table.write(out / f"tasks-{shard * _SHARD:06d}.jsonl")
                write_rows(index, _shard(tasks, layout, config, out, shard, name))
            update(shard + 1, "")
    parts, tables = sorted(out.glob("index-*.jsonl")), sorted(out.glob("tasks-*.jsonl"))
    rows = [row for part in parts for row in read_rows(part)]
    found = [task for table in tables for task in TaskTable.read(table).values()]
    about = {"recipes": {name: begun}, "seed": config.seed, "flown": __version__}
    zoo = Zoo.write(out, [layout], found, rows, about)
    for scratch in (run.file, *parts, *tables):
        scratch.unlink()
    return zoo


def _shard(
    tasks: Episodes, layout: WeightLayout, config: HeadsConfig, out: Path, shard: int, name: str
) -> Sequence[Row]:
    """Probes a shard's tasks and writes their weights; returns their rows."""
    heads = probe(tasks.support, tasks.ways, config.probe)
    file = f"weights-{shard * _SHARD:06d}.safetensors"
    save_tensors(out / file, layout.unpack(heads))
    seen = _accuracy(heads, tasks.support, tasks.labels)
    new = _accuracy(heads, tasks.query, tasks.targets)
    epochs, rows = config.probe.epochs, []
    for i, head in enumerate(heads):
        model = shard * _SHARD + i
        split = "held-out" if model % _HELD_OUT == _HELD_OUT - 1 else "train"
        rows.append(
            Row(
                task_id(name, model),
                model,
                config.seed,
                epochs,
                epochs,
                split,
                seen[i],
                new[i],
                file,
                i,
                checksum=checksum(head),
            )
        )
    return rows


def task_id(name: str, number: int) -> str:
    """What the zoo of heads calls its tasks."""
    return f"{name}-{number:06d}"


def _table(classes: Tensor, name: str, first: int) -> TaskTable:
    """The tasks over classes (T, W), numbers of the set that `name` stands for."""
    return TaskTable(
        Task(
            id=task_id(name, first + i),
            dataset=name,
            classes=tuple(map(str, members)),
            members=tuple(members),
        )
        for i, members in enumerate(classes.tolist())
    )


def _accuracy(heads: Tensor, images: Tensor, labels: Tensor) -> list[float]:
    right = apply_heads(heads, images).argmax(dim=2) == labels
    found: list[float] = (100 * right.float().mean(dim=1)).tolist()
    return found
