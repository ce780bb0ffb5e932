"""CAML as a classifier of few-shot tasks, for many tasks at once; nothing is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.context import CAML
from flown.tasks import Episodes

_TOKENS = 16384  # tokens through CAML at once


def caml_outputs(caml: CAML, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """CAML's outputs (T, N, width) at queries (T, N, F), in parts.

    Args:
        support: (T, S, F), standardised as CAML's training features were; labels (T, S).
    """
    step = max(1, _TOKENS // (query.shape[1] * (support.shape[1] + 1)))
    each = max(1, _TOKENS // (support.shape[1] + 1))  # queries at once, of a task with many
    parts = []
    for i in range(0, len(support), step):
        tasks = slice(i, i + step)
        queries = query[tasks].split(each, dim=1)
        outputs = [caml(support[tasks], labels[tasks], part) for part in queries]
        parts.append(torch.cat(outputs, dim=1))
    return torch.cat(parts)


@torch.no_grad()
def caml_logits(caml: CAML, support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
    """Logits (T, N, W) at queries (T, N, F).

    Raises:
        FlownError: more ways than CAML has label vectors, or features of another length.
    """
    if ways > caml.config.ways:
        raise FlownError(
            f"caml: {ways} classes, it was trained for up to {caml.config.ways}; "
            "use another head, or train one with more CAMLConfig.ways"
        )
    scores: Tensor = caml.output_proj(caml_outputs(caml, support, labels, query))
    return scores[..., :ways]


def in_context(tasks: Episodes, caml: CAML) -> Tensor:
    """Logits (T, W Q, W) at the tasks' queries."""
    return caml_logits(caml, tasks.support, tasks.labels, tasks.query, tasks.ways)
