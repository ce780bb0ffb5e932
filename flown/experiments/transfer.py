"""A generator of one data set's networks on another's images: static, adapted, beside controls.

One gradient evaluation is the forward and backward pass of one network on one batch. The controls
spend as many on each network as an adaptation does in total.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flown.base.progress import bar
from flown.measure.baselines import random_init
from flown.measure.evaluate import evaluate
from flown.nets.batched import batchnorm
from flown.tasks import ImageData, Split
from flown.weights import construction
from flown.weights.batch import WeightBatch
from flown.zoo.train.trainers import trainer

RATES = (3e-4, 1e-3, 3e-3)  # Adam's; each control uses the one that is best on validation images
LOOKS = 10  # times that a control's networks are validated during training; the best counts
_SAME = {"automobile": "car"}  # one class under two names


def match_classes(images: ImageData, names: Sequence[str]) -> ImageData:
    """The same images, with labels that are outputs of networks for as many classes `names`.

    A class that both have keeps the network's place. The images' other classes take the remaining
    places in order: arbitrary, but always the same.
    """
    known = [_SAME.get(name, name) for name in names]
    named = [_SAME.get(name, name) for name in images.classes]
    free = iter([place for place, name in enumerate(known) if name not in named])
    places = [known.index(name) if name in known else next(free) for name in named]
    table = torch.tensor(places)

    def matched(split: Split) -> Split:
        return Split(split.images, table[split.labels])

    classes = tuple(images.classes[places.index(place)] for place in range(len(places)))
    return replace(
        images,
        classes=classes,
        train=matched(images.train),
        val=matched(images.val),
        test=matched(images.test),
    )


def from_default_init(
    like: WeightBatch,
    images: ImageData,
    count: int,
    evaluations: int,
    batch_size: int,
    seed: int = 0,
) -> WeightBatch:
    """The control that needs no generator: `count` networks from PyTorch's initialisation."""
    fresh = random_init(like, count, torch.Generator().manual_seed(seed))
    starts = WeightBatch(like.layout, fresh.vectors.to(like.vectors), frozen=like.frozen)
    return _trained(starts, images, evaluations, batch_size, seed)


def from_best(
    samples: WeightBatch,
    images: ImageData,
    count: int,
    evaluations: int,
    batch_size: int,
    seed: int = 0,
) -> WeightBatch:
    """The control that needs no gradient through a generator: the sample that is best on validation
    images, trained on, `count` times in other orders of the images."""
    val = evaluate(samples.calibrated(images.train.images), images.val.images, images.val.labels)
    best = int(val.argmax())
    starts = WeightBatch(
        samples.layout, samples.vectors[best].repeat(count, 1), frozen=samples.frozen
    )
    return _trained(starts, images, evaluations, batch_size, seed)


def _trained(
    starts: WeightBatch, images: ImageData, evaluations: int, batch_size: int, seed: int
) -> WeightBatch:
    """Trains `starts` for a number of batches each; validation images choose rate and stopping."""
    layout, frozen, n = starts.layout, starts.frozen or None, len(starts)
    rates = [rate for rate in RATES for _ in range(n)]
    net = construction.fill(layout.architecture.build(), starts.frozen).eval()
    batchnorm.by_batch(net, batchnorm.layers(net))
    x = (
        images.train.images
        if frozen
        else layout.architecture.preprocess(images.train.images).contiguous()
    )
    device = starts.vectors.device
    engine = trainer(
        net,
        layout,
        starts.vectors.repeat(len(RATES), 1),
        x,
        batch_size,
        rates,
        [0.0] * len(rates),
        device.type,
        frozen,
    )
    orders = torch.stack(
        [_order(len(x), evaluations * batch_size, seed * 1_000 + i) for i in range(n)]
    ).repeat(len(RATES), 1)
    best = torch.full((len(rates),), -1.0)
    kept = engine.vectors.clone()
    stops = sorted({max(1, evaluations * (k + 1) // LOOKS) for k in range(LOOKS)})
    with bar(f"control on {images.name}", evaluations) as update:
        for first, last in zip([0, *stops], stops, strict=False):
            rows = orders[:, first * batch_size : last * batch_size]
            engine.run(rows, images.train.labels[rows], first)
            now = WeightBatch(layout, engine.vectors, frozen=frozen)
            val = evaluate(
                now.calibrated(images.train.images), images.val.images, images.val.labels
            ).cpu()
            better = val > best
            best = torch.where(better, val, best)
            kept[better.to(kept.device)] = engine.vectors[better.to(kept.device)]
            update(last, f"validation accuracy {float(best.max()):.1f} %")
    chosen = int(best.view(len(RATES), n).mean(dim=1).argmax())
    vectors = kept[chosen * n : (chosen + 1) * n]
    return WeightBatch(layout, vectors, {"rate": RATES[chosen]}, frozen=frozen)


def _order(images: int, count: int, seed: int) -> Tensor:
    """`count` places of images; none is repeated before all were drawn."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-count // images)
    return torch.cat([torch.randperm(images, generator=generator) for _ in range(passes)])[:count]
