"""Evaluation of many networks against a loop over modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from flown.base.provenance import Row
from flown.bench.timing import medians, timed_rows
from flown.measure.evaluate import predictions
from flown.nets import INPUT_SIZES, build
from flown.weights.batch import WeightBatch
from flown.weights.layout import Task, WeightLayout


def evaluate(repeats: int, networks: int = 100, images: int = 10_000) -> list[Row]:
    """Evaluation: all networks at once against a loop over modules, `cnn-small`, grey images.

    The loop is timed with batches of 100 and of 1000 images; the faster one is its best setting.
    """
    net = build("cnn-small", 1, 10, "tanh")
    task = Task(
        name="noise",
        channels=1,
        size=INPUT_SIZES["cnn-small"],
        mean=0.5,
        std=0.5,
        classes=tuple("0123456789"),
        activation="tanh",
    )
    layout = WeightLayout.of(net, "cnn-small", task)
    generator = torch.Generator().manual_seed(0)
    batch = WeightBatch(layout, 0.1 * torch.randn(networks, layout.size, generator=generator))
    pixels = torch.randint(0, 256, (images, 1, 28, 28), generator=generator, dtype=torch.uint8)
    modules = [batch.module(i) for i in range(networks)]

    @torch.no_grad()
    def loop(size: int) -> torch.Tensor:
        x = task.preprocess(pixels)
        return torch.stack(
            [torch.cat([m(some).argmax(-1) for some in x.split(size)]) for m in modules]
        )

    assert (predictions(batch, pixels[:500]) == loop(500)[:, :500]).float().mean() > 0.999
    candidates: dict[str, Callable[[], object]] = {"flown": lambda: predictions(batch, pixels)}
    candidates |= {f"loop-{size}": partial(loop, size) for size in (100, 1000)}
    return timed_rows(medians(candidates, repeats), "flown", networks)
