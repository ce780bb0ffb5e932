"""What a draw of tasks is to the model, and what networks written for it compute on its images.

Axes: T tasks, s networks a task, beside each other in n = T s; N hidden neurons, C classes, m numbers a
token, K support images and Q queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flown.anytask.model import AnyTask, resized, standardised
from flown.anytask.ridge import with_one
from flown.anytask.trunk import Seen
from flown.anytask.writer import Writer
from flown.tasks import Episodes


def seen(model: AnyTask, tasks: Episodes, samples: int) -> Seen:
    """What the model sees of the support sets, each `samples` times.

    Args:
        tasks: float images in [0, 1].
    """
    support = standardised(tasks.support, tasks.support)
    found = model.trunk.see(support.expand(-1, -1, 3, -1, -1), tasks.labels, tasks.ways)
    return found.repeat(samples)


def logits(writer: Writer, tasks: Episodes, x: Tensor, shares: Tensor) -> Tensor:
    """Logits (T, s, K + Q, C) of support images and queries by the networks of x (n, N + C, m).

    Args:
        tasks: float images in [0, 1]. shares: of the base networks, (n, E).
    """
    count, samples = len(writer.neurons), len(x) // len(tasks.labels)
    support, query = (
        resized(standardised(part, tasks.support), writer.kind.size).repeat_interleave(samples, 0)
        for part in (tasks.support, tasks.query)
    )
    body, features = writer.write_body(x[:, :count], shares, support)
    labels = tasks.labels.repeat_interleave(samples, dim=0)
    head = writer.write_head(x[:, count:], shares, features, labels)
    features = torch.cat([features, writer.compute(body, query)], dim=1)
    found: Tensor = (with_one(features) @ head.mT).unflatten(0, (-1, samples))
    return found


def of_queries(writer: Writer, tasks: Episodes, x: Tensor, shares: Tensor) -> Tensor:
    """Logits (T, s, Q, C) of queries alone."""
    return logits(writer, tasks, x, shares)[:, :, tasks.support.shape[1] :]
