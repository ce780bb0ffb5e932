"""Few-shot classifiers that see all unlabelled queries of a task at once: transductive ones.

    soft k-means   p_k = softmax_k(s cos(f_q, m_k));  m_k <- mean of f over support and queries, weighed
                   by labels and by p_k                              (Ren et al. 1803.00676)
    laplacian      y_q <- softmax_k(-|f_q - m_k|^2 + strength * sum_p w_qp y_p),  w_qp = 1 where p is
                   among q's three nearest queries                   (Ziko et al. 2006.15486)

Features f have length 1, for which cosines and the distances of the first paper say the same. The second
also moves the means beforehand, which is left out. Both have one number, chosen on validation tasks.

Axes: T tasks, W ways, N queries, F features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flown.context.centroids import unit_means
from flown.tasks import Episodes

SHARPNESSES = (2.0, 5.0, 10.0, 20.0, 40.0)
STRENGTHS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0)
_ROUNDS = 20
_NEIGHBOURS = 3


def soft_kmeans(tasks: Episodes, sharpness: float = 10.0) -> Tensor:
    """Logits (T, N, W) of the nearest mean after the means have moved to the queries once."""
    support, query = F.normalize(tasks.support, dim=2), F.normalize(tasks.query, dim=2)
    means = F.normalize(unit_means(tasks.support, tasks.labels, tasks.ways), dim=2)
    shares = (sharpness * query @ means.transpose(1, 2)).softmax(dim=2)
    member = F.one_hot(tasks.labels, tasks.ways).to(shares.dtype)
    weights, seen = torch.cat([member, shares], dim=1), torch.cat([support, query], dim=1)
    means = weights.transpose(1, 2) @ seen / weights.sum(dim=1)[..., None]
    logits: Tensor = sharpness * query @ F.normalize(means, dim=2).transpose(1, 2)
    return logits


def laplacian(tasks: Episodes, strength: float = 0.5) -> Tensor:
    """Logits (T, N, W) of the nearest mean, smoothed over neighbouring queries."""
    query = F.normalize(tasks.query, dim=2)
    means = F.normalize(unit_means(tasks.support, tasks.labels, tasks.ways), dim=2)
    near = -torch.cdist(query, means).square()
    similar = query @ query.transpose(1, 2)
    similar.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    neighbours = min(_NEIGHBOURS, query.shape[1] - 1)
    graph = torch.zeros_like(similar).scatter_(2, similar.topk(neighbours, dim=2).indices, 1.0)
    logits = near
    for _ in range(_ROUNDS):
        logits = near + strength * graph @ logits.softmax(dim=2)
    return logits
