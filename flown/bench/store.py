"""A zoo of 100,000 checkpoints on one machine: opening, random batches, an encoder's memory."""

from __future__ import annotations

import multiprocessing
import re
import statistics
import threading
import time
from pathlib import Path

import torch

from flown import tasks as data
from flown.base.files import save_tensors
from flown.base.provenance import Row
from flown.encoders import VAEConfig
from flown.generator.fit import FlownConfig, Population, fit_encoder
from flown.nets import build
from flown.training import TrainConfig
from flown.weights.layout import Task, WeightLayout
from flown.zoo import Zoo
from flown.zoo.rows import Row as Checkpoint
from flown.zoo.rows import checksum

CHECKPOINTS = 100_000
_SHARD, _BATCH, _STEPS = 1000, 1024, 30
_TASK = Task(
    name="digits",
    channels=1,
    size=28,
    mean=0.5,
    std=0.5,
    classes=tuple("0123456789"),
    activation="tanh",
)


def noise_zoo(out: Path, checkpoints: int) -> Zoo:
    """A zoo of `cnn-small` checkpoints made of noise, 1,000 a shard; about 10 kB each."""
    layout = WeightLayout.of(build("cnn-small", 1, 10, "tanh"), "cnn-small", _TASK)
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
                checksum(vector),
            )
            for i, vector in enumerate(vectors)
        ]
    return Zoo.write(out, [layout], rows, {})


def store(repeats: int, scratch: Path, checkpoints: int = CHECKPOINTS) -> list[Row]:
    """Seconds to open a zoo and to read 1,024 random models; an encoder's memory against a tenth.

    Memory is what the process itself holds at its largest; pages of mapped files, which the system
    takes back when it needs them, are not counted.
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
        ("open", "seconds", statistics.median(opened), len(opened)),
        (f"read-{_BATCH}", "seconds", statistics.median(read), len(read)),
        (f"read-{_BATCH}", "seconds, slowest", max(read), len(read)),
        ("encoder", "MB", memory["whole"], 1),
        ("encoder-tenth", "MB", memory["tenth"], 1),
    ]
    return [
        {
            "dataset": None,
            "method": method,
            "metric": metric,
            "value": value,
            "std": None,
            "n": checkpoints,
            "selection": f"median of {count}",
            "epoch": None,
            "paper": None,
        }
        for method, metric, value, count in figures
    ]


def encoder_memory(zoo: Path) -> float:
    """Megabytes that a process of its own holds at most while it trains an encoder on a zoo."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_train_encoder, (zoo,))


def _train_encoder(path: Path) -> float:
    zoo = Zoo.open(path)
    config = FlownConfig(
        encoder=VAEConfig(),
        epochs=(1,),
        encoder_training=TrainConfig(steps=_STEPS, batch_size=64, validate_every=10 * _STEPS),
    )
    images, most, done = {"digits": data.load("digits")}, [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    fit_encoder(Population.of(zoo, config.epochs), config, images, path / "run", False, "cpu")
    done.set()
    watcher.join()
    return most[0]


def held() -> float:
    """Anonymous resident memory of this process in megabytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024
