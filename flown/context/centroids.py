"""Class means of support features, and the nearest of them by angle.

    m_k = mean of class k's features,    logits_k = cos(f, m_k)

Axes: T episodes, S support images, N queries, W ways, F features. Classes may differ in their number
of images.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def class_means(support: Tensor, labels: Tensor, ways: int) -> Tensor:
    """The mean of each class (T, W, F) of supports (T, S, F) with labels (T, S); 0 without images.

    >>> import torch
    >>> support = torch.tensor([[[1.0, 3.0], [3.0, 5.0], [0.0, 2.0]]])
    >>> class_means(support, torch.tensor([[1, 1, 0]]), ways=2)
    tensor([[[0., 2.],
             [2., 4.]]])
    """
    member = F.one_hot(labels, ways).to(support.dtype)  # (T, S, W)
    sums: Tensor = member.transpose(1, 2) @ support
    return sums / member.sum(dim=1).clamp_min(1)[..., None]


def unit_means(support: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Class means of length 1, (T, W, F), of features brought to length 1."""
    return F.normalize(class_means(F.normalize(support, dim=2), labels, ways), dim=2)


def cosine_logits(support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
    """Cosines (T, N, W) of queries (T, N, F) and the classes' `unit_means`."""
    means = unit_means(support, labels, ways)
    return F.normalize(query, dim=2) @ means.transpose(1, 2)
