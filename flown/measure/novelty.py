"""Is a generated network new? Distance to the nearest training network, agreement of errors.

    d(g)     = min_i |g - w_i|                                      w_i the training networks
    ratio(g) = d(g) / mean_h d(h)                                   h the held-out networks
    IoU(a, b) = |wrong_a and wrong_b| / |wrong_a or wrong_b|        wrong: mask over test images

(Zeng et al. 2506.07998; p-diff.) A ratio near 0 is a copy, a ratio of 1 is as far from the zoo as
a network trained from another seed. Distance alone does not make a network new: one whose hidden
units are permuted lies far away and computes the same function. Its errors give it away, so the
two are read together; `aligned_distance` takes permutations out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.weights.batch import WeightBatch
from flown.weights.geometry import distances
from flown.zoo.align.matching import Aligned, align

_CHUNK = 1 << 23  # numbers of the training networks in double precision at a time


def nearest_distance(vectors: Tensor, training: Tensor, excluded: Tensor | None = None) -> Tensor:
    """L2 distance of each of (n, D) to the nearest of (m, D), (n,).

    Args:
        excluded: pairs (n, m) that do not count; a row without any pair left is infinitely far.
    """
    nearest = torch.full((len(vectors),), torch.inf, dtype=torch.double, device=vectors.device)
    rows = max(1, _CHUNK // max(1, training.shape[1]))
    for start in range(0, len(training), rows):
        found = distances(vectors, training[start : start + rows], exact=False)
        if excluded is not None:
            found.masked_fill_(excluded[:, start : start + rows], torch.inf)
        nearest = torch.minimum(nearest, found.amin(dim=1))
    return nearest.float()


def aligned_distance(batch: WeightBatch, training: Aligned) -> Tensor:
    """L2 distance (n,) to the nearest training network in that network's order of units.

    The nearest is found in the order of the training networks' mean; a permuted copy is at 0.

    Args:
        training: the training networks, aligned to their mean.
    """
    moved = align(batch, training.reference, groups=training.groups).batch
    known = training.batch.vectors
    places = distances(moved.vectors, known, exact=False).argmin(dim=1).tolist()
    found = []
    for i, place in enumerate(places):
        aligned = align(moved[[i]], known[place], groups=training.groups).batch.vectors
        found.append(distances(aligned, known[[place]])[0, 0])
    return torch.stack(found).float()


def same_network(models: Sequence[int], others: Sequence[int]) -> Tensor:
    """Pairs (n, m) of checkpoints of one task that come from one training, by `Row.model`.

    Such checkpoints are near-duplicates: to compare them says nothing. Seeds would not do, the
    networks of a grid may share one.
    """
    return torch.tensor(models)[:, None] == torch.tensor(others)[None]


def held_out_distance(training: Tensor, held_out: Tensor) -> float:
    """The unit of novelty: mean distance of held-out networks to their nearest training network.

    Raises:
        FlownError: there is no held-out or training network, or they are equal.
    """
    if not len(training) or not len(held_out):
        raise FlownError("novelty: needs a training and a held-out network at least")
    unit = float(nearest_distance(held_out, training).mean())
    if not unit > 0:
        raise FlownError("novelty: every held-out network equals a training network")
    return unit


def iou(wrong: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of wrong-prediction masks (n, N) and (m, N), as (n, m).

    Two networks without any error agree wholly: 1.
    """
    a, b = wrong.float(), others.float()  # sums of up to 2^24 ones are exact
    both = a @ b.T
    union = a.sum(dim=1)[:, None] + b.sum(dim=1)[None] - both
    return torch.where(union > 0, both / union.clamp_min(1), 1.0)


def largest_iou(wrong: Tensor, training: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Each network's largest IoU with any training network, (n,).

    Args:
        wrong: masks (n, N).
        training: masks (m, N).
        excluded: pairs (n, m) that do not count.
    """
    agreement = iou(wrong, training)
    if excluded is not None:
        agreement = agreement.masked_fill(excluded, 0)
    return agreement.amax(dim=1)


def mutual_iou(wrong: Tensor) -> float:
    """Mean IoU over the pairs of one set (n, N), 1 for n = 1: the lower, the more diverse."""
    n = len(wrong)
    if n < 2:
        return 1.0
    pairs = iou(wrong, wrong)
    return float((pairs.sum() - pairs.diagonal().sum()) / (n * (n - 1)))
