"""The baseline that generates nothing: networks of the training task that a support set is most like.

    task(s) = argmin_i |c(s) - m_i|,   c the class tokens of s, m_i their mean over draws of task i

What a generator returns has to be better than this to be more than retrieval.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.context.tokens import Contexts

DRAWS = 8  # support sets of each task whose tokens are averaged


class Lookup:
    """The mean class tokens (classes, width) of tasks; tasks with as many classes compare.

    Args:
        contexts: draws tokens of the tasks' own training images.
    """

    def __init__(self, contexts: Contexts, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tasks = contexts.tasks
        self.means = torch.stack(
            [contexts.sets([i] * DRAWS, generator).mean(dim=0) for i in range(len(contexts.tasks))]
        )

    def task(self, tokens: Tensor, classes: int) -> str:
        """The id of the task whose mean tokens are nearest to a support set's (classes, width).

        Raises:
            FlownError: no task has so many classes.
        """
        places = [i for i, task in enumerate(self.tasks) if len(task.classes) == classes]
        if not places:
            raise FlownError(f"lookup: no known task has {classes} classes")
        distances = (self.means[places] - tokens).flatten(1).norm(dim=1)
        return self.tasks[places[int(distances.argmin())]].id
