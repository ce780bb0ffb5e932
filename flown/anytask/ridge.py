"""The head that a support set determines: ridge regression of its classes on features.

    R = (A'A + l I)^-1 A'Y,   A = [features, 1],   l = shrink |A|^2 / K

Bertinetto et al. 2019 (1805.08136), section 3.2; the smaller of the two equal systems is solved.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_DOUBLINGS = torch.linspace(-3, 3, 19)  # of a head's confidence, that are tried


def ridge(features: Tensor, labels: Tensor, ways: int, shrink: Tensor | float) -> Tensor:
    """Rows of a last layer, weights and bias, (n, C, F + 1).

    Args:
        features: of support sets, (n, K, F). labels: (n, K). shrink: the penalty, a number for all or
            (n, 1, 1), in units of the mean square norm of a row of A.
    """
    a, wanted = with_one(features), _wanted(labels, ways, features)
    dual = a.shape[1] < a.shape[2]
    gram = a @ a.mT if dual else a.mT @ a
    gram = gram + _penalty(a, shrink) * torch.eye(gram.shape[1], dtype=a.dtype, device=a.device)
    solved = torch.linalg.solve(gram, wanted if dual else a.mT @ wanted)
    rows: Tensor = (a.mT @ solved if dual else solved).mT
    return rows


def left_out(features: Tensor, labels: Tensor, ways: int, shrink: Tensor | float) -> Tensor:
    """What regressions without them say of images, (n, K, C).

    Images are left out in rounds, the next of every class at a time: a class that lacks one more than
    the others is guessed less, the more so the less features tell. A class's only image stays. With
    H = AA'(AA' + l I)^-1 it is Y_B - (I - H_BB)^-1 (Y_B - (HY)_B) for a round B, without regressions.

    Args:
        labels: (K,); others as of `ridge`.
    """
    a, wanted = with_one(features), _wanted(labels, ways, features)
    gram = a @ a.mT
    eye = torch.eye(gram.shape[1], dtype=a.dtype, device=a.device)
    hat = torch.linalg.solve(gram + _penalty(a, shrink) * eye, gram)
    fitted = hat @ wanted
    found: Tensor = fitted.clone()
    errors = wanted - fitted
    turn = turns(labels)
    for place in range(1, int(turn.max()) + 1):
        rows = (turn == place).nonzero().flatten()
        kept = eye[rows][:, rows] - hat[:, rows][:, :, rows]
        found[:, rows] = wanted[rows] - torch.linalg.solve(kept, errors[:, rows])
    return found


def turns(labels: Tensor) -> Tensor:
    """In which round an image is left out, (K,): 1 for the first of its class, 0 for a class's only one."""
    member = F.one_hot(labels)
    place = (member.cumsum(dim=0) * member).sum(dim=1)
    return place * (labels.bincount()[labels] > 1)


def confidence(logits: Tensor, labels: Tensor) -> float:
    """By what the heads of n networks are multiplied so that their mean prediction is as sure as it is right.

    The likeliest factor for images that were left out, with a normal prior of one doubling around 1.
    Images that are alone in their class say nothing.

    Args:
        logits: of each image by heads without it, (n, K, C). labels: (K,).
    """
    telling = labels.bincount()[labels] > 1
    logits, asked = logits[:, telling], labels[telling]
    asked = asked.expand(len(logits), -1)[..., None]
    losses = []
    for doublings in _DOUBLINGS.tolist():
        log_p = (2**doublings * logits).log_softmax(-1).gather(2, asked)[..., 0]
        mean = log_p.logsumexp(dim=0) - math.log(len(log_p))
        losses.append(doublings**2 / 2 - float(mean.sum()))
    found: float = 2.0 ** _DOUBLINGS.tolist()[losses.index(min(losses))]
    return found


def with_one(features: Tensor) -> Tensor:
    """Features (..., F + 1), the last of which a bias multiplies."""
    return F.pad(features, (0, 1), value=1.0)


def _wanted(labels: Tensor, ways: int, like: Tensor) -> Tensor:
    return F.one_hot(labels, ways).to(like.dtype) - 1 / ways


def _penalty(a: Tensor, shrink: Tensor | float) -> Tensor:
    return shrink * a.square().sum(dim=(1, 2), keepdim=True) / a.shape[1]
