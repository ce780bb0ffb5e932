"""The protocol of contexts and their registry.

A context turns the class outputs of a frozen support encoder into the vector that conditions the
flow. It is small and trained with the flow; the support encoder is not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from torch import Tensor, nn

from flown.base.errors import unknown
from flown.context.head import ContextHead


class Context(Protocol):
    """What the flow needs of a context."""

    def __call__(self, outputs: Tensor) -> Tensor:
        """Class outputs (B, C, width) to contexts (B, 128)."""


CONTEXTS: dict[str, Callable[[int, int], nn.Module]] = {
    "ordered": partial(ContextHead, mode="ordered"),
    "mean": partial(ContextHead, mode="mean"),
}


def build(name: str, classes: int, width: int) -> nn.Module:
    """The context of that name for up to `classes` classes of `width` numbers.

    Raises:
        FlownError: no context has that name.
    """
    if name not in CONTEXTS:
        raise unknown("context", name, CONTEXTS)
    return CONTEXTS[name](classes, width)
