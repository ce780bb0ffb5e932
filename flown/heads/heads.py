"""A zoo of probed heads: linear classifiers of random tasks over base classes, trained together.

FLoWN (A.4.2) probes 50,000 tasks and leaves their data open. Here a task is `ways` random classes of
the part with `shots` random images of each; the probe sees all of them at every step, and begins
at zero, so that a head depends on its task alone. `queries` further images a class measure it.

Tasks come in shards of 1,000, each from a seed of its own: a run that was interrupted goes on behind
the last whole shard. Index rows hold a task's class numbers in `grid`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn

from flown.base import files
from flown.base.config import Config
from flown.base.errors import FlownError
from flown.base.files import save_tensors
from flown.base.progress import bar
from flown.heads.classifiers import apply_heads
from flown.heads.frames import Described, describe
from flown.heads.probe import ProbeConfig, probe
from flown.heads.tasks import Tasks, draw_tasks
from flown.version import __version__
from flown.weights.layout import Task, WeightLayout
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


def heads_layout(features: int, ways: int, name: str = "heads") -> WeightLayout:
    """The layout of heads: weight (ways, F), bias (ways,)."""
    task = Task(
        name=name,
        channels=features,
        size=1,
        mean=0.0,
        std=1.0,
        activation="none",
        classes=tuple(str(k) for k in range(ways)),
    )
    return WeightLayout.of(nn.Linear(features, ways), "linear-head", task)


def shard_tasks(
    features: Tensor, labels: Tensor, classes: Tensor, config: HeadsConfig, shard: int
) -> Tasks:
    """The tasks of one shard."""
    count = min(_SHARD, config.tasks - shard * _SHARD)
    return draw_tasks(
        features,
        labels,
        classes,
        config.ways,
        config.shots,
        config.queries,
        count,
        config.seed * 100_003 + shard,
    )


def all_tasks(
    features: Tensor, labels: Tensor, classes: Tensor, config: HeadsConfig
) -> Iterator[Tasks]:
    """The tasks of all shards in turn, in the order of the zoo's rows."""
    for shard in range(shards(config)):
        yield shard_tasks(features, labels, classes, config, shard)


def tell(
    features: Tensor,
    labels: Tensor,
    classes: Tensor,
    config: HeadsConfig,
    queries: bool = True,
    shots: Sequence[int] = (1,),
) -> Described:
    """What the heads' tasks say when few of their images are known: 1,000 tasks of each shots in turn."""
    drawn = enumerate(all_tasks(features, labels, classes, config))
    return Described.join(
        [describe(tasks.first_shots(shots[i % len(shots)]), queries) for i, tasks in drawn]
    )


def shards(config: HeadsConfig) -> int:
    """How many files the heads fill."""
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
        features: (N, F); labels (N,). classes: the class numbers that tasks draw from.
        resume: go on behind the last whole shard.

    Raises:
        FlownError: no task, too few classes or images, `out` exists, or holds other heads.
    """
    config = config or HeadsConfig()
    if config.tasks < 1:
        raise FlownError(f"heads: tasks must be 1 or more, got {config.tasks}")
    out = files.prepare_output(out, overwrite, resume)
    begun = {
        "heads": config.model_dump(mode="json"),
        "features": checksum(features.flatten()),
        "classes": classes.tolist(),
    }
    held: object = files.begun(out) or begun
    done = None
    if resume and (out / "zoo.json").exists():
        done = Zoo.open(out)
        held = done.about.get("recipes", {}).get(name)
    if held != begun:
        raise FlownError(f"{out}: holds heads begun with another config or other features")
    if done is not None:
        return done
    files.begin(out, begun)
    layout = heads_layout(features.shape[1], config.ways, name)
    count = shards(config)
    with bar(f"heads {name}", count) as update:
        for shard in range(count):
            index = out / f"index-{shard * _SHARD:06d}.jsonl"
            if not index.exists():
                tasks = shard_tasks(features, labels, classes, config, shard)
                write_rows(index, _shard(tasks, layout, config, out, shard))
            update(shard + 1, "")
    parts = sorted(out.glob("index-*.jsonl"))
    rows = [row for part in parts for row in read_rows(part)]
    about = {"recipes": {name: begun}, "seed": config.seed, "flown": __version__}
    zoo = Zoo.write(out, [layout], rows, about)
    for scratch in (out / "progress.json", *parts):
        scratch.unlink()
    return zoo


def _shard(
    tasks: Tasks, layout: WeightLayout, config: HeadsConfig, out: Path, shard: int
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
                layout.task.name,
                model,
                config.seed,
                epochs,
                epochs,
                split,
                seen[i],
                new[i],
                file,
                i,
                checksum(head),
                {"classes": tasks.classes[i].tolist()},
            )
        )
    return rows


def _accuracy(heads: Tensor, images: Tensor, labels: Tensor) -> list[float]:
    right = apply_heads(heads, images).argmax(dim=2) == labels
    found: list[float] = (100 * right.float().mean(dim=1)).tolist()
    return found
