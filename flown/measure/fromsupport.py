"""What a support set gives without a generator: centroids of pixels, and training on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from flown.base.seeding import seeded
from flown.measure.baselines import random_init
from flown.nets import build
from flown.nets.architecture import Architecture
from flown.nets.batched import batchnorm, stacked
from flown.tasks import Episodes, Split, Support
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout

RATE, STEPS = 3e-3, 200  # of `support_only`; what the any-task study chose for a `conv4-8`
_IMAGES = 1024  # at a time
_TASKS = 10  # at a time: small groups of networks stay in cache


def nearest_centroid(tasks: Episodes) -> Tensor:
    """Accuracies (T,) of the nearest class mean in pixels, or in whatever the numbers of images are."""
    support, query = tasks.support.flatten(2), tasks.query.flatten(2)
    member = F.one_hot(tasks.labels, tasks.ways).to(support.dtype)
    means = member.mT @ support / member.sum(dim=1)[..., None]
    return percent(torch.cdist(query, means).argmin(dim=-1), tasks)


def pixel_centroid(supports: Sequence[Support], split: Split) -> Tensor:
    """Accuracies (S,) on a split of the nearest class mean in pixels, of each support set."""
    right = torch.zeros(len(supports))
    for first in range(0, len(split), _IMAGES):
        some = split[first : first + _IMAGES]
        query = some.images.float()
        for i, (images, labels) in enumerate(supports):
            classes = torch.arange(int(labels.max()) + 1)
            parts = (images.float(), labels, query, some.labels, classes)
            found = nearest_centroid(Episodes(*(part[None] for part in parts)))
            right[i] += float(found) * len(some)
    return right / len(split)


def fresh(kind: Architecture, count: int, seed: int) -> WeightBatch:
    """Networks as PyTorch initialises them."""
    with seeded(seed):
        nets = [build(kind.net, kind.channels, kind.outputs, kind.activation) for _ in range(count)]
    vectors = torch.stack([parameters_to_vector(net.parameters()).detach() for net in nets])
    return WeightBatch(WeightLayout.of(nets[0], kind), vectors)


def trained(
    starts: WeightBatch, images: Tensor, labels: Tensor, learning_rate: float, steps: Sequence[int]
) -> list[Tensor]:
    """Weights (n, D) of networks trained on their own images, after each of the numbers of `steps`.

    Full batches, cross-entropy, Adam.

    Args:
        starts: n networks.
        images: preprocessed, (n, K, c, S, S). labels: (n, K).
        steps: in rising order.
    """
    found: list[list[Tensor]] = [[] for _ in steps]
    for first in range(0, len(starts), _TASKS):
        chosen = slice(first, first + _TASKS)
        vectors = starts.vectors[chosen].clone().requires_grad_()
        optimizer = torch.optim.Adam([vectors], learning_rate)
        for step in range(1, steps[-1] + 1):
            with torch.enable_grad():
                logits = own_logits(starts, vectors, images[chosen])
                # The sum: each network's own gradient, which Adam follows number by number.
                loss = F.cross_entropy(
                    logits.flatten(0, 1), labels[chosen].flatten(), reduction="sum"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in steps:
                found[steps.index(step)].append(vectors.detach().clone())
    return [torch.cat(parts) for parts in found]


def support_only(
    kind: WeightBatch,
    supports: Sequence[Support],
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> WeightBatch | None:
    """Networks of the kind of a batch's, the i-th trained on nothing but the i-th support set.

    Supports are of one size. None for networks with BatchNorm or frozen tensors.
    """
    if kind.frozen or batchnorm.layers(kind.network):
        return None
    starts = random_init(kind, len(supports), torch.Generator().manual_seed(seed)).to(device)
    images = torch.stack([starts.preprocess(support.images) for support in supports])
    labels = torch.stack([support.labels for support in supports])
    (vectors,) = trained(starts, images.to(device), labels.to(device), RATE, [STEPS])
    return starts.on(vectors)


def own_logits(batch: WeightBatch, vectors: Tensor, images: Tensor) -> Tensor:
    """Logits (n, N, C) of networks (n, D) of a batch's kind, each on its own images (n, N, c, S, S)."""
    return stacked.forward(batch.network, batch.layout.unpack(vectors), images)


def percent(found: Tensor, tasks: Episodes) -> Tensor:
    """Accuracy of predictions (T, W Q) on each task's queries, (T,)."""
    return 100 * (found == tasks.targets).float().mean(dim=1)
