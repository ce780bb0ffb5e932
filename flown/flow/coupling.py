"""Which source sample travels to which data sample.

    independent: q(x_0, x_1) = p_0(x_0) p_1(x_1)
    ot:          the permutation pi of the batch that minimises sum_i |x_0[pi(i)] - x_1[i]|^2

A coupling re-orders x_0 alone, so that x_1 and its context stay put (`flown.flow.semidiscrete` is the
other kind, which chooses x_1). Optimal transport (OT-CFM of Tong et al.) is exact and stays within one
context group: across groups the law of x_0 given c would no longer be p_0, from which generation starts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Coupling = Callable[[Tensor, Tensor, "Tensor | None", "torch.Generator | None"], Tensor]


def independent(
    x0: Tensor, x1: Tensor, groups: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """x0 as drawn: fresh draws are independent of x1 already."""
    return x0


@torch.no_grad()
def ot(
    x0: Tensor, x1: Tensor, groups: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """x0 (B, *L) re-ordered to the least total squared distance to x1 (B, *L).

    Args:
        groups: integer labels (B,); rows are exchanged only with rows of the same label.
    """
    from scipy.optimize import linear_sum_assignment  # half a second that only `ot` needs

    order = torch.arange(len(x0), device=x0.device)
    labels = torch.zeros_like(order) if groups is None else groups
    for label in torch.unique(labels):
        rows = (labels == label).nonzero()[:, 0]
        cost = torch.cdist(x1[rows].flatten(1).double(), x0[rows].flatten(1).double()).square()
        _, column = linear_sum_assignment(cost.cpu().numpy())
        order[rows] = rows[torch.as_tensor(column, device=rows.device)]
    return x0[order]


COUPLINGS: dict[str, Coupling] = {"independent": independent, "ot": ot}
