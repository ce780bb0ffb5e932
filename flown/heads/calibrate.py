"""Calibrated confidences: a temperature, and the calibration error that remains.

    p = softmax(logits / tau),   tau minimises sum_i -log p_i(y_i) + (log tau - log tau_0)^2 / (2 s^2)

tau is fitted to the support set alone, where every class has two images or more: one image of each
class is left out at a time, and classified by a head that has not seen it. (A single image left out
would leave its class smaller than the others: on validation tasks of 5 images a class, ridge regression
then has an accuracy of 28 %, not 58 %.) A few images determine tau poorly, above all when all of them
are classified correctly (tau would go to 0); the second term draws it to tau_0, the best temperature on
meta-validation tasks.

Source: temperature scaling, expected calibration error: Guo et al. 1706.04599.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SPREAD = 0.3  # s: deviation of log tau from task to task
_GRID = torch.logspace(-3, 2, 501)
_MOST = 50  # rounds of leaving images out, at most
_TOGETHER = 10  # rounds at once
_TOGETHER_LOGITS = 2_000_000

# (support (T, S, F), labels (T, S), queries (T, N, F), ways) -> logits (T, N, W)
Fit = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def leave_one_out(fit: Fit, features: Tensor, labels: Tensor, ways: int) -> tuple[Tensor, Tensor]:
    """Logits (n, W) of images by heads that have not seen them, and the images' rows (n,), sorted.

    Args:
        features: (S, F), with labels (S,); every class has two images or more. Of a class with more
            than 50, only the first 50 are left out.
    """
    members = [(labels == k).nonzero().flatten() for k in range(ways)]
    rounds = min(_MOST, max(map(len, members)))
    # (rounds, W): a class with fewer images starts again; repetitions are dropped below
    out = torch.stack([rows[torch.arange(rounds) % len(rows)] for rows in members], dim=1)
    new = torch.stack([torch.arange(rounds) < len(rows) for rows in members], dim=1)
    kept = torch.ones(rounds, len(labels), dtype=torch.bool).scatter_(1, out, False)
    kept_rows = kept.nonzero()[:, 1].reshape(rounds, -1)  # (rounds, S - W)
    logits = torch.cat(
        [
            fit(features[seen], labels[seen], features[left], ways)
            for seen, left in zip(kept_rows.split(_TOGETHER), out.split(_TOGETHER), strict=True)
        ]
    )
    rows, found = out[new], logits[new]
    order = rows.argsort()
    return found[order], rows[order]


def temperature(logits: Tensor, labels: Tensor, prior: float | None = None) -> float:
    """The most likely tau for logits (n, W) with labels (n,); `prior` is tau_0."""
    grid = _GRID.to(logits.device)
    logits = logits - logits.gather(1, labels[:, None])  # -log p(y) is their logsumexp
    parts = grid.split(max(1, _TOGETHER_LOGITS // max(1, logits.numel())))
    sums = [(logits / tau[:, None, None]).logsumexp(dim=2).sum(dim=1) for tau in parts]
    loss = torch.cat(sums)
    if prior is not None:
        loss = loss + (grid / prior).log().square() / (2 * _SPREAD**2)
    return float(grid[loss.argmin()])


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error in percent: |confidence - accuracy| of bins, weighted by their size.

    Args:
        probabilities: (N, W); labels (N,).
        bins: of equal width; a bin's confidence is the mean of its images'.

    >>> probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1]])  # 90 % sure, correct on half of both
    >>> round(calibration_error(probabilities, torch.tensor([0, 1])), 1)
    40.0
    """
    confidence, chosen = probabilities.max(dim=1)
    bin_of = (confidence * bins).long().clamp_max(bins - 1)
    gap = (chosen == labels).float() - confidence
    sums = torch.zeros(bins, device=gap.device).index_add_(0, bin_of, gap)
    return 100 * float(sums.abs().sum() / len(labels))
