"""What the generator of heads is told of a task, and a head as rows, each in the task's own frame.

    head (W F + W,) = rows w_k (F + 1,), the weight and bias of class k
    z_k = [s_k; u_k]:  s_k the mean of class k's support,
    u_k = sum_q p(k | q) f_q / sum_q p(k | q),  p = softmax_k(10 cos(f_q, s_k)),  queries unlabelled

Without queries u_k = s_k. Images of another kind lie elsewhere in feature space, wider apart or closer
together: all this happens in a task's own frame f' = (f - c) / r, c the mean of its images and r the
length of a support image from there on average, and a head is carried over exactly,

    w . f + b = (r w) . f' + (b + w . c).

Axes: T tasks, W ways, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flown.fewshot.tasks import Tasks

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
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

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
    seen = torch.cat([tasks.support, tasks.query], dim=1) if queries else tasks.support
    centre = seen.mean(dim=1)  # (T, F)
    support, query = tasks.support - centre[:, None], tasks.query - centre[:, None]
    radius = support.norm(dim=2).mean(dim=1).clamp_min(1e-6)
    means = support.unflatten(1, (tasks.ways, -1)).mean(dim=2)  # (T, W, F)
    soft = means
    if queries:
        cosines = F.normalize(query, dim=2) @ F.normalize(means, dim=2).transpose(1, 2)
        shares = (_SHARPNESS * cosines).softmax(dim=2)  # (T, W Q, W)
        soft = shares.transpose(1, 2) @ query / shares.sum(dim=1)[..., None].clamp_min(1e-6)
    return Described(torch.cat([means, soft], dim=2) / radius[:, None, None], centre, radius)
