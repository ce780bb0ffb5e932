"""Whether an image is of none of the classes: how far it lies from all of them.

    d(x) = mean over n networks of  min_k |f(x) - c_k|,   unknown where d(x) > q

f is what a network's last layer reads, c_k the mean of class k's support images. The limit q is a
conformal quantile (Lei et al. 2018, 1604.04173) of the distances of support images that were left out,
so that images of the classes are called unknown about as often as was asked, and less often where the
classes get more images than the heads that left some out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.anytask.ridge import turns
from flown.base.errors import FlownError
from flown.nets import plain
from flown.nets.batched import stacked
from flown.tasks import Support
from flown.weights.batch import WeightBatch

_ROUNDS = 10  # images of a class that are left out, at most
_TOGETHER = 500  # images at once


def distances(support: Tensor, labels: Tensor, ways: int, query: Tensor) -> Tensor:
    """How far queries are from the nearest class, mean over the networks, (N,).

    Args:
        support: features (n, K, F) of n networks, with labels (K,). query: features (n, N, F).
    """
    member = F.one_hot(labels, ways).to(support.dtype)
    centres = (member / member.sum(dim=0)).mT @ support
    return torch.cdist(query, centres).amin(dim=2).mean(dim=0)


def limit(known: Tensor, rate: float) -> float:
    """The distance that an image of the classes exceeds with a probability of about `rate` at most.

    Args:
        known: distances (m,) of images of the classes to heads that have not seen them.

    Raises:
        FlownError: a rate that is none.
    """
    if not 0 < rate < 1:
        raise FlownError(f"unknown: a rate of false alarms between 0 and 1, got {rate:g}")
    place = math.ceil((len(known) + 1) * (1 - rate))
    return float(known.sort().values[min(place, len(known)) - 1])


def features(batch: WeightBatch, images: Tensor) -> Tensor:
    """What the last layers of plain networks read, (n, N, F), of uint8 images (N, c, H, W)."""
    layers = plain.layers(batch.network)
    assert layers is not None  # as all networks that an any-task generator writes
    (last, _), body = layers[-1], nn.Sequential()
    for name, layer in layers[:-1]:
        body.add_module(name, layer)
    tensors = batch.layout.unpack(batch.vectors)
    tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{last}.")}
    return stacked.forward(body, tensors, batch.preprocess(images))


def left_out(support: Support, score: Callable[[Support, Tensor], Tensor]) -> Tensor:
    """Scores (..., m) of support images by heads that have not seen them.

    An image of every class is left out at a time, up to ten rounds; a class's only image stays.

    Args:
        support: images or their features, with labels.
        score: scores (..., N) of others, after a support set.

    Raises:
        FlownError: no class has two images.
    """
    labels = support.labels
    turn = turns(labels)
    if not turn.any():
        raise FlownError(
            "unknown: needs two images of a class or more, to learn how far images of a class lie "
            "from one another"
        )
    found = []
    for place in range(1, min(_ROUNDS, int(turn.max())) + 1):
        out = turn == place
        found.append(score(Support(support.images[~out], labels[~out]), support.images[out]))
    return torch.cat(found, dim=-1)


@torch.no_grad()
def of_networks(batch: WeightBatch, support: Support, images: Tensor) -> Tensor:
    """Distances (N,) of uint8 images (N, c, H, W) to the classes of the networks' support set."""
    device, ways = batch.vectors.device, batch.layout.architecture.outputs
    seen, labels = features(batch, support.images.to(device)), support.labels.to(device)
    parts = [
        distances(seen, labels, ways, features(batch, some.to(device)))
        for some in images.split(_TOGETHER)
    ]
    return torch.cat(parts)
