"""CAML on few-shot tasks: as a classifier of its own, and as the context of generated heads.

A class's context is the mean of CAML's outputs at images of the class:

    support alone:  o_k = mean over the support images i of class k of CAML(support, x_i)
    with queries:   o_k = sum_q p(k | q) o_q / sum_q p(k | q),  o_q = CAML(support, x_q)

Queries carry no label: p is CAML's own softmax over the task's classes (FLoWN A.4.2 lets the queries
in without saying how they find their class; true labels would hand the answer to the generator).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.context import CAML
from flown.heads.classifiers import centroids
from flown.heads.tasks import Tasks

_TOKENS = 16384  # that go through CAML at once


def caml_outputs(caml: CAML, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """CAML's outputs (T, N, width) at queries (T, N, F), in parts.

    Args:
        support: (T, S, F), standardised as CAML's training features were; labels (T, S).
    """
    step = max(1, _TOKENS // (query.shape[1] * (support.shape[1] + 1)))
    each = max(1, _TOKENS // (support.shape[1] + 1))  # of a single task with many queries
    parts = []
    for i in range(0, len(support), step):
        some = slice(i, i + step)
        rows = query[some].split(each, dim=1)
        parts.append(torch.cat([caml(support[some], labels[some], q) for q in rows], dim=1))
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


def in_context(tasks: Tasks, caml: CAML) -> Tensor:
    """CAML as a few-shot classifier: logits (T, W Q, W); nothing is trained."""
    labels = tasks.labels.expand(len(tasks.support), -1)
    return caml_logits(caml, tasks.support, labels, tasks.query, tasks.ways)


@torch.no_grad()
def class_context(tasks: Tasks, caml: CAML, queries: bool = True) -> Tensor:
    """Each class's context, (T, W, width), from the support and, unlabelled, the queries."""
    labels = tasks.labels.expand(len(tasks.support), -1)
    if not queries:
        return centroids(
            caml_outputs(caml, tasks.support, labels, tasks.support), labels, tasks.ways
        )
    outputs = caml_outputs(caml, tasks.support, labels, tasks.query)
    shares = caml.output_proj(outputs)[..., : tasks.ways].softmax(dim=2)  # (T, W Q, W)
    sums = shares.transpose(1, 2) @ outputs
    found: Tensor = sums / shares.sum(dim=1)[..., None].clamp_min(1e-6)
    return found
