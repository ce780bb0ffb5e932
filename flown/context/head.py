"""From CAML's class outputs to the context vector c (FLoWN A.4.2).

`ordered` concatenates the classes' outputs, as the paper does, and passes two linear layers: the
context knows which class is which. `mean` pools over classes first and does not.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT_DIM = 128


class ContextHead(nn.Module):
    """Class outputs (B, C, width) to contexts (B, 128)."""

    def __init__(self, classes: int, width: int, mode: Literal["ordered", "mean"] = "ordered") -> None:
        super().__init__()
        self.mode = mode
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width * (classes if mode == "ordered" else 1), 2 * CONTEXT_DIM)
        self.second = nn.Linear(2 * CONTEXT_DIM, CONTEXT_DIM)

    def forward(self, outputs: Tensor) -> Tensor:
        x = self.norm(outputs)
        x = x.flatten(1) if self.mode == "ordered" else x.mean(dim=1)
        return self.second(F.silu(self.first(x)))  # type: ignore[no-any-return]
