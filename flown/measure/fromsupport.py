"""What a support set gives without a generator: centroids of pixels, and training on it.

Functions take `Episodes` of float images that are standardised by each support set and return the
accuracy in percent of every task's queries, (T,).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.nets.batched import stacked
from flown.tasks import Episodes
from flown.weights.layout import WeightLayout

_TASKS = 10  # at a time: small groups of networks stay in cache


def nearest_centroid(tasks: Episodes) -> Tensor:
    """Nearest class mean in pixels, or in whatever the images' numbers are."""
    support, query = tasks.support.flatten(2), tasks.query.flatten(2)
    member = F.one_hot(tasks.labels, tasks.ways).to(support.dtype)
    means = member.mT @ support / member.sum(dim=1)[..., None]
    return _percent(torch.cdist(query, means).argmin(dim=-1), tasks)


def trained(
    net: nn.Module,
    layout: WeightLayout,
    starts: Tensor,
    tasks: Episodes,
    learning_rate: float,
    steps: Sequence[int],
) -> list[Tensor]:
    """Accuracies of networks trained on their support sets, after each of the numbers of `steps`.

    Full batches, cross-entropy, Adam.

    Args:
        starts: a network a task, (T, D).
        steps: in rising order.
    """
    found: list[list[Tensor]] = [[] for _ in steps]
    for first in range(0, len(starts), _TASKS):
        chosen = slice(first, first + _TASKS)
        part = tasks.part(chosen)
        vectors = starts[chosen].clone().requires_grad_()
        optimizer = torch.optim.Adam([vectors], learning_rate)
        for step in range(1, steps[-1] + 1):
            logits = stacked.forward(net, layout.unpack(vectors), part.support)
            # The sum: each network's own gradient, which Adam follows number by number.
            loss = F.cross_entropy(logits.flatten(0, 1), part.labels.flatten(), reduction="sum")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in steps:
                with torch.no_grad():
                    logits = stacked.forward(net, layout.unpack(vectors), part.query)
                found[steps.index(step)].append(_percent(logits.argmax(-1), part))
    return [torch.cat(parts) for parts in found]


def _percent(found: Tensor, tasks: Episodes) -> Tensor:
    return 100 * (found == tasks.targets).float().mean(dim=1)
