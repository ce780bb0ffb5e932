"""Evaluation of many networks against a loop over modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from flown.base.provenance import Row
from flown.bench.timing import medians, timed_rows
from flown.measure.evaluate import predictions
from flown.nets import INPUT_SIZES
from flown.nets.architecture import Architecture
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout

_PART = 4


def evaluate(repeats: int, networks: int = 100, images: int = 10_000) -> list[Row]:
    """Evaluation: all networks at once against a loop over modules, `cnn-small`, grey images.

    The loop is timed with batches of 100 and of 1000 images; the faster one is its best setting. It
    runs a quarter of the networks, and its seconds are those of all: they grow with the number.
    """
    architecture = Architecture(
        net="cnn-small",
        channels=1,
        size=INPUT_SIZES["cnn-small"],
        outputs=10,
        activation="tanh",
        mean=0.5,
        std=0.5,
    )
    layout = WeightLayout.of(architecture.build(), architecture)
    generator = torch.Generator().manual_seed(0)
    batch = WeightBatch(layout, 0.1 * torch.randn(networks, layout.size, generator=generator))
    pixels = torch.randint(0, 256, (images, 1, 28, 28), generator=generator, dtype=torch.uint8)
    modules = [batch.module(i) for i in range(networks // _PART)]

    @torch.no_grad()
    def loop(size: int) -> torch.Tensor:
        x = architecture.preprocess(pixels)
        return torch.stack(
            [torch.cat([m(part).argmax(-1) for part in x.split(size)]) for m in modules]
        )

    alike = predictions(batch[: len(modules)], pixels[:500]) == loop(500)[:, :500]
    assert alike.float().mean() > 0.999
    candidates: dict[str, Callable[[], object]] = {"flown": lambda: predictions(batch, pixels)}
    candidates |= {f"loop-{size}": partial(loop, size) for size in (100, 1000)}
    seconds = medians(candidates, repeats)
    whole = {
        k: [x * (1 if k == "flown" else networks / len(modules)) for x in s]
        for k, s in seconds.items()
    }
    return timed_rows(whole, "flown", networks)
