"""ELMES: label embeddings as an equal-length, maximally equiangular set (Fifty et al. 2310.10971).

    E = sqrt(C / (C - 1)) (I - 1 1^T / C),   rows e_i with |e_i| = 1 and e_i . e_j = -1 / (C - 1)

rotated into `dim` dimensions by a fixed orthonormal frame. Any permutation of the labels is an isometry
of the set, so that no label differs from another:

    >>> frame = elmes(classes=3, dim=8)
    >>> (frame @ frame.T).round(decimals=3)
    tensor([[ 1.0000, -0.5000, -0.5000],
            [-0.5000,  1.0000, -0.5000],
            [-0.5000, -0.5000,  1.0000]])
"""

from __future__ import annotations

import torch
from torch import Tensor

from flown.base.errors import FlownError


def elmes(classes: int, dim: int, seed: int = 50) -> Tensor:
    """The frame (classes, dim).

    Raises:
        FlownError: fewer than two classes, or more than `dim`.
    """
    if not 2 <= classes <= dim:
        raise FlownError(f"elmes: needs 2 <= classes <= dim, got {classes} classes in {dim}")
    centred = torch.eye(classes, dtype=torch.float64) - 1 / classes
    frame = (classes / (classes - 1)) ** 0.5 * centred
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(dim, classes, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(gaussian)  # (dim, classes), orthonormal columns
    rotated: Tensor = frame @ rotation.T
    return rotated.float()
