"""What the generator of heads is told of a task, and a head as rows, each in the task's own frame.

    head (W F + W,) = rows w_k (F + 1,), the weight and bias of class k
    z_k = [s_k; u_k]:  s_k the mean of class k's support,
    u_k = sum_q p(k | q) f_q / sum_q p(k | q),  p = softmax_k(10 cos(f_q, s_k)),  queries unlabelled

Without queries u_k = s_k. Images of another kind lie elsewhere in feature space, wider apart or closer
together: all this happens in a task's own frame f' = (f - c) / r, c the mean of its images, or without
queries of the s_k, and r the length of a support image from there on average, and a head is carried
over exactly,

    w . f + b = (r w) . f' + (b + w . c).

Axes: T tasks, W ways, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flown.heads.classifiers import centroids
from flown.heads.tasks import Tasks

_SHARPNESS = 10.0  # of queries' soft assignment to classes, times the cosine


def split_heads(heads: Tensor, ways: int) -> Tensor:
    """Heads (..., W F + W) as rows (..., W, F + 1)."""
    weight, bias = heads.split([heads.shape[-1] - ways, ways], dim=-1)
    return torch.cat([weight.unflatten(-1, (ways, -1)), bias[..., None]], dim=-1)


def join_rows(rows: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    return torch.cat([rows[..., :-1].flatten(-2), rows[..., -1]], dim=-1)


@dataclass(frozen=True)
class Described:
    """What tasks say: z (T, W, 2 F) of each class in the task's frame; the frame, (T, F) and (T,)."""

    classes: Tensor
    centre: Tensor
    radius: Tensor

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, rows: slice | Tensor) -> Described:
        return Described(self.classes[rows], self.centre[rows], self.radius[rows])

    @classmethod
    def join(cls, parts: Sequence[Described]) -> Described:
        """All tasks of several."""
        return cls(
            *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls))
        )

    def repeated(self, n: int) -> Described:
        """Every task n times."""
        return self[torch.arange(len(self)).repeat_interleave(n)]

    def permuted(self, order: Tensor) -> Described:
        """The same tasks with their classes in another order (W,)."""
        return replace(self, classes=self.classes[:, order])

    def framed(self, rows: Tensor) -> Tensor:
        """Rows (T, W, F + 1) of heads, carried into the tasks' frames."""
        weight, bias = rows[..., :-1], rows[..., -1:]
        carried = bias + (weight * self.centre[:, None]).sum(dim=2, keepdim=True)
        return torch.cat([self.radius[:, None, None] * weight, carried], dim=2)

    def unframed(self, rows: Tensor) -> Tensor:
        """The inverse of `framed`."""
        weight = rows[..., :-1] / self.radius[:, None, None]
        bias = rows[..., -1:] - (weight * self.centre[:, None]).sum(dim=2, keepdim=True)
        return torch.cat([weight, bias], dim=2)


def describe(tasks: Tasks, queries: bool = True) -> Described:
    """What the flow is told of tasks; `queries`: whether the unlabelled queries enter."""
    labels = tasks.labels.expand(len(tasks.support), -1)
    return describe_support(tasks.support, labels, tasks.ways, tasks.query if queries else None)


def describe_support(
    support: Tensor, labels: Tensor, ways: int, query: Tensor | None = None
) -> Described:
    """What supports (T, S, F) with labels (T, S), and unlabelled queries (T, N, F), say.

    Classes may differ in their number of images.
    """
    means = centroids(support, labels, ways)  # (T, W, F)
    seen = means if query is None else torch.cat([support, query], dim=1)
    centre = seen.mean(dim=1)  # (T, F)
    radius = (support - centre[:, None]).norm(dim=2).mean(dim=1).clamp_min(1e-6)
    means = means - centre[:, None]
    soft = means
    if query is not None:
        query = query - centre[:, None]
        cosines = F.normalize(query, dim=2) @ F.normalize(means, dim=2).transpose(1, 2)
        shares = (_SHARPNESS * cosines).softmax(dim=2)  # (T, W Q, W)
        soft = shares.transpose(1, 2) @ query / shares.sum(dim=1)[..., None].clamp_min(1e-6)
    return Described(torch.cat([means, soft], dim=2) / radius[:, None, None], centre, radius)
