"""Class tokens of a task, which condition the generator of heads, and a head as rows in the task's frame.

    head (W F + W,) = rows w_k (F + 1,), the weight and bias of class k
    z_k = [s_k; u_k]:  s_k the mean of class k's support,
    u_k = sum_q p(k | q) f_q / sum_q p(k | q),  p = softmax_k(10 cos(f_q, s_k)),  queries unlabelled

Without queries u_k = s_k. Images of another kind lie elsewhere in feature space, wider apart or closer
together. Tokens and heads are therefore in the task's frame f' = (f - c) / r: c is the mean of its images,
without queries the mean of the s_k, and r the mean distance of a support image from c. The change of
frame is exact for a head:

    w . f + b = (r w) . f' + (b + w . c).

Axes: T tasks, W ways, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flown.context.centroids import class_means
from flown.tasks import Episodes

_SHARPNESS = 10.0  # factor of the cosines in the soft assignment of queries to classes


def split_heads(heads: Tensor, ways: int) -> Tensor:
    """Heads (..., W F + W) as rows (..., W, F + 1): each class's weight, and its bias.

    >>> split_heads(torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0, 20.0]), ways=2)
    tensor([[ 1.,  2., 10.],
            [ 3.,  4., 20.]])
    """
    weight, bias = heads.split([heads.shape[-1] - ways, ways], dim=-1)
    return torch.cat([weight.unflatten(-1, (ways, -1)), bias[..., None]], dim=-1)


def join_rows(rows: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    return torch.cat([rows[..., :-1].flatten(-2), rows[..., -1]], dim=-1)


@dataclass(frozen=True)
class ClassTokens:
    """Tokens z (T, W, 2 F) of each class in its task's frame; the frames' centres (T, F), radii (T,)."""

    tokens: Tensor
    centre: Tensor
    radius: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Tensor) -> ClassTokens:
        return ClassTokens(self.tokens[rows], self.centre[rows], self.radius[rows])

    def to(self, device: torch.device | str) -> ClassTokens:
        """The same on a device."""
        return ClassTokens(self.tokens.to(device), self.centre.to(device), self.radius.to(device))

    @classmethod
    def join(cls, parts: Sequence[ClassTokens]) -> ClassTokens:
        """The tasks of all parts."""
        return cls(
            *(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls))
        )

    def repeated(self, n: int) -> ClassTokens:
        """Each task n times."""
        return self[torch.arange(len(self)).repeat_interleave(n)]

    def permuted(self, order: Tensor) -> ClassTokens:
        """The same tasks with their classes in another order (W,)."""
        return replace(self, tokens=self.tokens[:, order])

    def framed(self, rows: Tensor) -> Tensor:
        """Rows (T, W, F + 1) of heads in the tasks' frames."""
        weight, bias = rows[..., :-1], rows[..., -1:]
        carried = bias + (weight * self.centre[:, None]).sum(dim=2, keepdim=True)
        return torch.cat([self.radius[:, None, None] * weight, carried], dim=2)

    def unframed(self, rows: Tensor) -> Tensor:
        """The inverse of `framed`."""
        weight = rows[..., :-1] / self.radius[:, None, None]
        bias = rows[..., -1:] - (weight * self.centre[:, None]).sum(dim=2, keepdim=True)
        return torch.cat([weight, bias], dim=2)


def class_tokens(tasks: Episodes, queries: bool = True) -> ClassTokens:
    """The class tokens of tasks; `queries`: whether the unlabelled queries enter."""
    query = tasks.query if queries else None
    return support_tokens(tasks.support, tasks.labels, tasks.ways, query)


def support_tokens(
    support: Tensor, labels: Tensor, ways: int, query: Tensor | None = None
) -> ClassTokens:
    """The class tokens of supports (T, S, F) with labels (T, S), and of unlabelled queries (T, N, F).

    Classes may differ in their number of images.
    """
    means = class_means(support, labels, ways)  # (T, W, F)
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
    return ClassTokens(torch.cat([means, soft], dim=2) / radius[:, None, None], centre, radius)
