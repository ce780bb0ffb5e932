"""The tasks that a model was trained for, by their contexts: which one a support set is like.

    nearest(c)     = argmin_i |c - m_i|,     m_i the mean of task i's contexts in training
    familiar(c, i) = c  where |c - m| <= r for its nearest task, r its reach: as far as any context of
                        training lies from m;
                     else m_i + (c - m_i) r_i / |c - m_i|

A flow has seen no condition out of reach. Under contexts of images unlike any (USPS, for one that knows
MNIST, lies half as far again) single networks do not work at all; brought into reach, they do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class KnownTasks(nn.Module):
    """Means (tasks, classes * width) of training's contexts, and their reach (tasks,)."""

    means: Tensor
    reach: Tensor

    def __init__(self, means: Tensor, reach: Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means, persistent=False)
        self.register_buffer("reach", reach, persistent=False)

    @classmethod
    def of(cls, bank: Tensor) -> KnownTasks:
        """From contexts (tasks, draws, classes, width)."""
        flat = bank.flatten(2)
        means = flat.mean(dim=1)
        return cls(means, (flat - means[:, None]).norm(dim=2).amax(dim=1))

    def replace(self, index: int, draws: Tensor) -> None:
        """Task `index` has other contexts from now on, (draws, classes, width)."""
        own = KnownTasks.of(draws[None])
        self.means[index], self.reach[index] = own.means[0], own.reach[0]

    def nearest(self, context: Tensor, among: Sequence[int] = ()) -> tuple[int, bool]:
        """The task whose mean is nearest to a context (classes, width); whether that is in its reach.

        Args:
            among: indices of the tasks to choose from, such as those of as many classes; () is all.
        """
        distances = (self.means - context.flatten()).norm(dim=1)
        places = list(among) or list(range(len(distances)))
        index = places[int(distances[places].argmin())]
        return index, bool(distances[index] <= self.reach[index])

    def familiar(self, context: Tensor, index: int) -> Tensor:
        """The context, brought into task `index`'s reach if it is in none's."""
        if self.nearest(context)[1]:
            return context
        mean = self.means[index].view_as(context)
        distance = (context - mean).norm()
        return torch.lerp(mean, context, (self.reach[index] / distance).clamp(max=1))
