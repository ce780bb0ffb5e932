"""Which of two base networks a support set speaks for.

    logit p = logit gate + 1.7 z,   z = mean(d) / sqrt(v / n),   v = (sum (d - mean(d))^2 + 1) / n

d_i is by how much likelier the first one makes the label of image i than the second: by ridge regressions
on what they compute, which have not seen the image and are closed-form. A few images tell little, so what
counts is how sure their mean is: 1.7 z is the logit of the normal probability that the first is better. The
gate sees images alone, and with one image a class it decides alone. The 1 in v keeps two images that agree
from deciding everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flown.anytask.ridge import confidence
from flown.anytask.writer import Writer

_PROBIT = 1.702  # logit(Phi(z)) / z, nearly


def weigh(writer: Writer, shares: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Shares (1, E) of base networks after the support set's labels.

    Args:
        shares: the gate's, (1, E). images: as networks read them, (K, c, S, S). labels: (K,).
    """
    telling = labels.bincount()[labels] > 1
    if shares.shape[1] == 1 or not telling.any():
        return shares
    first, second = (
        _log_p(writer, alone, images, labels)[telling]
        for alone in torch.eye(2, dtype=shares.dtype, device=shares.device)[:, None]
    )
    ahead = first - second
    mean, n = ahead.mean(), len(ahead)
    z = mean / ((((ahead - mean).square().sum() + 1) / n) / n).sqrt()
    logit = shares.log()[0, 0] - shares.log()[0, 1] + _PROBIT * z
    return torch.stack([logit, -logit]).sigmoid()[None]


def _log_p(writer: Writer, shares: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Log probabilities (K,) of the images' labels by heads that have not seen them."""
    ways = int(labels.max()) + 1
    x = shares.new_zeros(1, len(writer.neurons) + ways, len(writer.head_decoder))
    hidden, rows = x.split([len(writer.neurons), ways], dim=1)
    _, features = writer.write_body(hidden, shares, images)
    told = writer.left_out(rows, shares, features, labels)
    log_p = (confidence(told, labels) * told[0]).log_softmax(dim=1)
    return log_p.gather(1, labels[:, None])[:, 0]
