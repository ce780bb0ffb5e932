"""From CAML's class outputs to the context vector c (FLoWN A.4.2).

    ordered: c = W_2 silu(W_1 [LN o_1; ...; LN o_C])
    mean:    c = W_2 silu(W_1 mean_k LN o_k)

`ordered` depends on the order of the classes, as in the paper; `mean` does not. A class whose output is
all zeros is absent: tasks with fewer classes are padded with zeros.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.errors import FlownError, unknown

CONTEXT_DIM = 128


class ContextHead(nn.Module):
    """Class outputs (B, C, width) to contexts (B, 128).

    Raises:
        FlownError: an unknown mode.
    """

    def __init__(
        self, classes: int, width: int, mode: Literal["ordered", "mean"] = "ordered"
    ) -> None:
        super().__init__()
        if mode not in ("ordered", "mean"):
            raise unknown("context mode", mode, ("ordered", "mean"))
        self.classes, self.width, self.mode = classes, width, mode
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width * (classes if mode == "ordered" else 1), 2 * CONTEXT_DIM)
        self.second = nn.Linear(2 * CONTEXT_DIM, CONTEXT_DIM)

    def forward(self, outputs: Tensor) -> Tensor:
        """(B, C, width) to (B, 128).

        Raises:
            FlownError: another width, or in `ordered` more classes than the head was built for.
        """
        if outputs.ndim != 3 or outputs.shape[2] != self.width:
            got = tuple(outputs.shape)
            raise FlownError(f"context: expected class outputs (B, C, {self.width}), got {got}")
        present = (outputs != 0).any(dim=2, keepdim=True)  # (B, C, 1)
        x = self.norm(outputs) * present
        if self.mode == "mean":
            x = x.sum(dim=1) / present.sum(dim=1).clamp_min(1)
        elif (missing := self.classes - outputs.shape[1]) < 0:
            raise FlownError(f"context: {outputs.shape[1]} classes, built for {self.classes}")
        else:
            x = F.pad(x, (0, 0, 0, missing)).flatten(1)  # (B, classes * width)
        return self.second(F.silu(self.first(x)))  # type: ignore[no-any-return]
