"""One prototype context a training task: which task a support set resembles, and how closely.

    nearest(c)    = argmin_i |c - m_i|,   m_i the mean of task i's contexts in training
    project(c, i) = c  where |c - m| <= r for the nearest mean m, r the radius of its task:
                       the largest distance of a training context from m;
                    else m_i + (c - m_i) r_i / |c - m_i|

A flow has seen no condition outside these balls. The contexts of very different images (USPS, for a
model of MNIST, lies 1.5 radii away) give networks that fail; projected onto the ball, they give networks
that work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Prototypes(nn.Module):
    """Means (tasks, classes * width) of the training contexts, and radii (tasks,) around them."""

    means: Tensor
    radius: Tensor

    def __init__(self, means: Tensor, radius: Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means, persistent=False)
        self.register_buffer("radius", radius, persistent=False)

    @classmethod
    def of(cls, bank: Tensor) -> Prototypes:
        """From contexts (tasks, draws, classes, width)."""
        flat = bank.flatten(2)
        means = flat.mean(dim=1)
        return cls(means, (flat - means[:, None]).norm(dim=2).amax(dim=1))

    def replace(self, index: int, draws: Tensor) -> None:
        """Gives task `index` the contexts (draws, classes, width) in place of its former ones."""
        new = Prototypes.of(draws[None])
        self.means[index], self.radius[index] = new.means[0], new.radius[0]

    def nearest(self, context: Tensor, among: Sequence[int] = ()) -> tuple[int, bool]:
        """The task whose mean is nearest to a context (classes, width); whether within its radius.

        Args:
            among: indices of the tasks to choose from, such as those of as many classes; () is all.
        """
        distances = (self.means - context.flatten()).norm(dim=1)
        places = list(among) or list(range(len(distances)))
        index = places[int(distances[places].argmin())]
        return index, bool(distances[index] <= self.radius[index])

    def project(self, context: Tensor, index: int) -> Tensor:
        """A context outside of all balls, moved onto task `index`'s; any other as it is."""
        if self.nearest(context)[1]:
            return context
        mean = self.means[index].view_as(context)
        distance = (context - mean).norm()
        return torch.lerp(mean, context, (self.radius[index] / distance).clamp(max=1))
