"""A zoo of 100,000 checkpoints on one machine, and zoos of up to 10,000 tasks: time and memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import re
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from flown import tasks as data
from flown.base.files import save_tensors
from flown.base.provenance import Row
from flown.bench.timing import spread
from flown.context.tokens import ContextConfig
from flown.encoders import VAEConfig
from flown.generator.config import FlownConfig
from flown.generator.data import TrainingSet
from flown.generator.fit import fit_encoder
from flown.generator.model import Flown
from flown.nets.architecture import Architecture
from flown.tasks import ManyClass, Task, TaskDraw
from flown.training import TrainConfig
from flown.weights.layout import WeightLayout
from flown.zoo import Zoo
from flown.zoo.rows import Row as Checkpoint
from flown.zoo.rows import checksum

CHECKPOINTS = 100_000
TASKS = (100, 1_000, 10_000)
_SHARD, _BATCH, _STEPS = 1000, 1024, 30
_TASK = Task(id="digits", dataset="digits", classes=tuple("0123456789"))
_SMALL = Architecture(
    net="cnn-small", channels=1, size=28, outputs=10, activation="tanh", mean=0.5, std=0.5
)


def noise_zoo(out: Path, checkpoints: int) -> Zoo:
    """A zoo of `cnn-small` checkpoints made of noise, 1,000 a shard; about 10 kB each."""
    layout = WeightLayout.of(_SMALL.build(), _SMALL)
    rows = []
    for start in range(0, checkpoints, _SHARD):
        count = min(_SHARD, checkpoints - start)
        generator = torch.Generator().manual_seed(start)
        vectors = torch.randn(count, layout.size, generator=generator)
        shard = f"weights-{start:06d}.safetensors"
        save_tensors(out / shard, layout.unpack(vectors))
        rows += [
            Checkpoint(
                "digits",
                start + i,
                start + i,
                1,
                1,
                "held-out" if i % 6 == 0 else "train",
                None,
                None,
                shard,
                i,
                checksum=checksum(vector),
            )
            for i, vector in enumerate(vectors)
        ]
    return Zoo.write(out, [layout], [_TASK], rows, {})


def store(repeats: int, scratch: Path, checkpoints: int = CHECKPOINTS) -> list[Row]:
    """Seconds to open a zoo and to read 1,024 random models; an encoder's memory against a tenth.

    Memory is the process's own at its peak; pages of mapped files are not counted, because the
    system takes them back when it needs them.
    """
    noise_zoo(scratch / "whole", checkpoints)
    noise_zoo(scratch / "tenth", checkpoints // 10)
    opened, read = [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(repeats):
        start = time.perf_counter()
        zoo = Zoo.open(scratch / "whole")
        opened.append(time.perf_counter() - start)
        for _ in range(5):
            places = torch.randint(checkpoints, (_BATCH,), generator=generator).tolist()
            start = time.perf_counter()
            zoo.read(places)
            read.append(time.perf_counter() - start)
    memory = {name: encoder_memory(scratch / name) for name in ("whole", "tenth")}
    figures = [
        ("open", "seconds", opened),
        (f"read-{_BATCH}", "seconds", read),
        (f"read-{_BATCH}", f"seconds, slowest of {len(read)}", [max(read)]),
        ("encoder", "MB", [memory["whole"]]),
        ("encoder-tenth", "MB", [memory["tenth"]]),
    ]
    found = [
        _row(method, metric, statistics.median(values), checkpoints, f"median of {len(values)}")
        | {"std": spread(values)}
        for method, metric, values in figures
    ]
    return found + task_rows(scratch)


def _row(method: str, metric: str, value: float, n: int, selection: str = "all") -> Row:
    return {
        "dataset": None,
        "method": method,
        "metric": metric,
        "value": value,
        "std": None,
        "n": n,
        "selection": selection,
        "epoch": None,
        "paper": None,
    }


def task_rows(scratch: Path) -> list[Row]:
    """Zoos of as many networks as tasks: seconds to open, and time and memory of training on them.

    An encoder and a flow are trained for a few steps; only the networks and the table may grow with
    the number of tasks.
    """
    rows = []
    for count in TASKS:
        path = scratch / f"tasks-{count}"
        task_zoo(path, count)
        start = time.perf_counter()
        Zoo.open(path)
        figures = {"seconds to open": time.perf_counter() - start}
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, megabytes = pool.apply(_train_on_tasks, (path,))
        figures |= {f"seconds of {_STEPS} + {_STEPS} steps": seconds, "MB": megabytes}
        rows += [_row(f"tasks-{count}", metric, value, count) for metric, value in figures.items()]
    return rows


def noise_classes() -> ManyClass:
    """A hundred classes of twenty images of noise each."""
    generator = torch.Generator().manual_seed(0)
    return ManyClass(
        name="noise",
        classes=tuple(f"c{i}" for i in range(100)),
        images=torch.randint(0, 256, (2000, 1, 28, 28), generator=generator, dtype=torch.uint8),
        labels=torch.arange(2000) % 100,
        class_split={"train": torch.arange(100)},
    )


def task_zoo(out: Path, tasks: int) -> Zoo:
    """A network of noise for each of so many random ten-way tasks, 4,096 a shard."""
    layout = WeightLayout.of(_SMALL.build(), _SMALL)
    source, draw = noise_classes(), TaskDraw(ways=10)
    table = [draw.task(source, number) for number in range(tasks)]
    rows = []
    for start in range(0, tasks, 4096):
        part = table[start : start + 4096]
        generator = torch.Generator().manual_seed(start)
        vectors = torch.randn(len(part), layout.size, generator=generator)
        shard = f"weights-{start:06d}.safetensors"
        save_tensors(out / shard, layout.unpack(vectors))
        rows += [
            Checkpoint(
                task=task.id,
                model=start + i,
                seed=start + i,
                epoch=1,
                step=1,
                split="train" if task.split == "train" else "held-out",
                train_accuracy=None,
                val_accuracy=None,
                shard=shard,
                offset=i,
                checksum=checksum(vectors[i]),
            )
            for i, task in enumerate(part)
        ]
    return Zoo.write(out, [layout], table, rows, {})


def _train_on_tasks(path: Path) -> tuple[float, float]:
    """Seconds of training an encoder and a flow, and the process's peak memory in megabytes."""
    zoo, brief = Zoo.open(path), TrainConfig(steps=_STEPS, batch_size=64)
    config = FlownConfig(
        encoder_training=brief.model_copy(update={"validate_every": 10 * _STEPS}),
        flow_training=brief,
        context=ContextConfig(tokens="centroid", permute=True),
    )
    start = time.perf_counter()
    with _peak() as most:
        Flown.fit(zoo, config, out=path / "run", images={"noise": noise_classes()})
    return time.perf_counter() - start, most[0]


def encoder_memory(zoo: Path) -> float:
    """Peak memory in megabytes of training an encoder on a zoo, in its own process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_train_encoder, (zoo,))


def _train_encoder(path: Path) -> float:
    zoo = Zoo.open(path)
    config = FlownConfig(
        encoder=VAEConfig(),
        epochs=(1,),
        encoder_training=TrainConfig(steps=_STEPS, batch_size=64, validate_every=10 * _STEPS),
    )
    images = {"digits": data.load("digits")}
    with _peak() as most:
        fit_encoder(TrainingSet.of(zoo, config.epochs), config, images, path / "run", False, "cpu")
    return most[0]


@contextlib.contextmanager
def _peak() -> Iterator[list[float]]:
    """A list of one number that follows this process's peak memory, in megabytes."""
    most, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def held() -> float:
    """Anonymous resident memory of this process in megabytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024
