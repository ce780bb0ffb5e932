"""Is a generated network new? Distance to the nearest training network, agreement of errors.

    ratio(g) = min_i |g - w_i| / mean_h min_i |h - w_i|,   w_i training, h held-out networks
    IoU(a, b) = |wrong_a and wrong_b| / |wrong_a or wrong_b|        (p-diff; Zeng et al. 2506.07998)

A ratio near 0 is a copy, a ratio of 1 is as far from the zoo as a network trained from another seed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_distance(vectors: Tensor, training: Tensor) -> Tensor:
    """L2 distance of each of (n, D) to the nearest of (m, D); (n,)."""
    return torch.cdist(vectors.double(), training.double()).amin(dim=1).float()


def l2_ratio(generated: Tensor, training: Tensor, held_out: Tensor) -> Tensor:
    """Distance to the nearest training network in units of a held-out network's, (n,)."""
    unit = nearest_distance(held_out, training).mean()
    return nearest_distance(generated, training) / unit


def iou(wrong: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of wrong-prediction masks (n, N) and (m, N): (n, m).

    Two networks without any error agree wholly: 1.
    """
    a, b = wrong.float(), others.float()
    both = a @ b.T
    union = a.sum(dim=1)[:, None] + b.sum(dim=1)[None] - both
    return torch.where(union > 0, both / union.clamp_min(1), 1.0)


def largest_iou(wrong: Tensor, training: Tensor) -> Tensor:
    """Each network's largest IoU with any training network, (n,)."""
    return iou(wrong, training).amax(dim=1)


def mutual_iou(wrong: Tensor) -> float:
    """Mean IoU over the pairs of one set; the lower, the more diverse. NaN-free: 1 for one network."""
    n = len(wrong)
    if n < 2:
        return 1.0
    pairs = iou(wrong, wrong)
    return float((pairs.sum() - pairs.diagonal().sum()) / (n * (n - 1)))
