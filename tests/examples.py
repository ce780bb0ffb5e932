"""Small things to measure: images of three tasks, and a zoo of untrained networks for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flown import nets
from flown.base.files import save_tensors
from flown.nets.architecture import Architecture
from flown.tasks import ImageData, Split
from flown.tasks.task import Task
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout
from flown.zoo import Zoo
from flown.zoo.rows import Row
from flown.zoo.train.shard import initial

TASKS = {"digits": 10, "turned": 10, "parity": 2}


@cache
def images(task: str) -> ImageData:
    """Digits as they are, turned by 90 degrees, or even against odd; 100 validation, 60 test images."""
    source = load_digits()
    pixels = torch.tensor(source.images * 15).to(torch.uint8)[:, None]
    labels = torch.tensor(source.target, dtype=torch.int64)
    if task == "turned":
        pixels = pixels.rot90(1, (2, 3))
    if task == "parity":
        labels = labels % 2
    parts = [Split(pixels[a:b], labels[a:b]) for a, b in ((0, 150), (250, 350), (190, 250))]
    return ImageData(task, tuple(map(str, range(TASKS[task]))), *parts)


class ConvNorm(nn.Module):
    """Three convolutions, each with a BatchNorm, for images of any size."""

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, width, 3, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        logits: Tensor = self.head(self.norm3(self.conv3(x)).relu().mean((2, 3)))
        return logits


def wide_conv_norm(channels: int, classes: int) -> nn.Module:
    return ConvNorm(channels, classes, width=64)


def task(name: str = "digits") -> Task:
    return Task(id=name, dataset=name, classes=tuple(map(str, range(TASKS[name]))))


def architecture(task: str = "digits", net: str = "cnn-small", channels: int = 1) -> Architecture:
    return Architecture(
        net=net,
        channels=channels,
        size=nets.INPUT_SIZES[net],
        outputs=TASKS[task],
        activation="tanh",
        mean=0.5,
        std=0.5,
    )


def layout(task: str = "digits", net: str = "cnn-small", channels: int = 1) -> WeightLayout:
    found = architecture(task, net, channels)
    return WeightLayout.of(found.build(), found)


def networks(n: int, seed: int = 0, **about: object) -> WeightBatch:
    """n untrained networks."""
    where = layout(**about)  # type: ignore[arg-type]
    fresh = [initial(where, "default", seed * 1000 + i) for i in range(n)]
    stacked = {name: torch.stack([f[name] for f in fresh]) for name in where.names}
    return WeightBatch(where, where.pack(stacked), task=task(str(about.get("task", "digits"))))


def make_zoo(
    path: Path, tasks: tuple[str, ...] = tuple(TASKS), models: int = 12, held_out: int = 3
) -> Zoo:
    """`models` networks a task with checkpoints of two epochs, near-duplicates of each other."""
    rows: list[Row] = []
    layouts: list[WeightLayout] = []
    path.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(tasks):
        batch = networks(models, seed=number, task=name)
        both = torch.cat([batch.vectors, 1.01 * batch.vectors])
        shard = f"weights-{number}.safetensors"
        save_tensors(path / shard, batch.layout.unpack(both))
        if batch.layout not in layouts:
            layouts.append(batch.layout)
        for i in range(2 * models):
            row = Row(
                task=name,
                model=i % models,
                seed=i % models,
                epoch=1 + i // models,
                step=0,
                split="held-out" if i % models < held_out else "train",
                train_accuracy=10.0,
                val_accuracy=10.0,
                shard=shard,
                offset=i,
                layout=layouts.index(batch.layout),
            )
            rows.append(row)
    recipes = {name: {"init": "uniform"} for name in tasks}
    return Zoo.write(path, layouts, map(task, tasks), rows, {"recipes": recipes})
