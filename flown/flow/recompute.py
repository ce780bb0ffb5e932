"""A velocity that is computed again in the backward pass: memory for recomputation's time.

`torch.utils.checkpoint` drops the activations of an evaluation but keeps its graph, whose nodes are
what grows with the number of a solver's steps. Here one node stands for an evaluation, and what it
keeps is its point x (n, *L); graph and activations live for one evaluation at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.flow.velocity import BoundVelocity


class Recomputed:
    """v(x, t) with the same values and gradients.

    What v depends on beside x and t is found on the first call: the leaves of its graph, however the
    condition that is bound to it was computed.

    Raises:
        FlownError: in the backward pass, when a later call depends on a parameter that the first
            did not, whose gradient would be lost.
    """

    def __init__(self, velocity: BoundVelocity) -> None:
        self.velocity = velocity
        self.parameters: tuple[Tensor, ...] | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.velocity(x, t)
        if self.parameters is None:
            self.parameters = _leaves(self.velocity(x.detach(), t))
        v: Tensor = _Evaluation.apply(self.velocity, t, x, *self.parameters)
        return v


class _Evaluation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, velocity: BoundVelocity, t: Tensor, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.velocity = velocity
        ctx.save_for_backward(t, x, *parameters)
        device = x.device.type
        ctx.cast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return velocity(x, t)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        t, x, *parameters = ctx.saved_tensors
        with torch.enable_grad(), torch.autocast(*ctx.cast):
            x = x.detach().requires_grad_()
            v = ctx.velocity(x, t)
        if not {id(p) for p in _leaves(v)} <= {id(p) for p in (x, *parameters)}:
            raise FlownError(
                "recompute: the velocity must depend on the same parameters at all times"
            )
        # The graph is kept for the part of it, the condition's, that all evaluations share.
        found = torch.autograd.grad(
            v, (x, *parameters), gradient, retain_graph=True, allow_unused=True
        )
        return None, None, *found


def _leaves(value: Tensor) -> tuple[Tensor, ...]:
    """The leaves of a tensor's graph, each once, in the order in which they are met."""
    found, seen, waiting = [], set(), [value.grad_fn]
    if value.grad_fn is None and value.requires_grad:
        return (value,)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [after for after, _ in node.next_functions]
    return tuple(found)
