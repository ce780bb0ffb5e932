"""The head that is whole networks: written for the labelled images by the any-task generator.

Their vote needs no temperature: how sure they are follows from the labelled images (`anytask.ridge`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from flown.anytask.model import AnyTask
from flown.generator.model import Flown
from flown.heads import calibrate, unknown
from flown.measure.evaluate import probabilities
from flown.tasks import Pictures, Support, stack
from flown.tasks.stream import SIDE
from flown.weights.batch import WeightBatch

GENERATOR = "flown-any"
NETWORKS = 20


class Written:
    """Networks for labelled pictures.

    Raises:
        FlownError: more classes than the generator writes networks for.
    """

    tau = 1.0

    def __init__(self, support: Pictures, classes: tuple[str, ...]) -> None:
        self.model, self.ways = generator(), len(classes)
        self.channels = max(image.shape[0] for image in support.images)
        self.support = Support(self.see(support.images), support.labels)
        self.networks = self.model.generate(*self.support, NETWORKS, classes=classes)
        self.fewest = int(torch.bincount(support.labels, minlength=self.ways).min())

    def calibrate(self) -> tuple[Tensor | None, Tensor]:
        """Probabilities (n, W) of labelled pictures that were left out, and their rows (n,)."""
        if self.fewest < 2:
            return None, torch.empty(0, dtype=torch.long)

        def fit(images: Tensor, labels: Tensor, asked: Tensor, _: int) -> Tensor:
            shape = self.support.images.shape[1:]
            found = []
            for x, y, others in zip(images, labels, asked, strict=True):
                networks = self._networks(Support(x.unflatten(1, shape), y))
                found.append(probabilities(networks, others.unflatten(1, shape)))
            return torch.stack(found)

        flat = self.support.images.flatten(1)
        return calibrate.leave_one_out(fit, flat, self.support.labels, self.ways)

    def batch(self, classes: tuple[str, ...], task: str) -> WeightBatch:
        """The networks."""
        made = {"model": GENERATOR, "support": task, "classes": list(classes)}
        self.networks.provenance |= made
        return self.networks

    def see(self, pictures: Sequence[Tensor]) -> Tensor:
        """Pictures as one tensor (N, channels, 32, 32), whatever their sizes."""
        images = stack(pictures, SIDE)
        if images.shape[1] > self.channels:  # colour where the labelled ones are grey
            images = images.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
        return images.expand(-1, self.channels, -1, -1)

    def probabilities(self, seen: Tensor) -> Tensor:
        """Probabilities (N, C) of pictures as `see` gives them."""
        return probabilities(self.networks, seen)

    def novelty(self, rate: float, seen: Tensor) -> Tensor:
        """Distances (N,) from the nearest class, in units of what a part `rate` of them exceed.

        Raises:
            FlownError: no class has two pictures, or a rate that is none.
        """

        def score(support: Support, asked: Tensor) -> Tensor:
            return unknown.of_networks(self._networks(support), support, asked)

        most = unknown.limit(unknown.left_out(self.support, score), rate)
        return unknown.of_networks(self.networks, self.support, seen) / most

    def _networks(self, support: Support) -> WeightBatch:
        return self.model.generate(*support, NETWORKS)


@functools.cache
def generator() -> AnyTask:
    """The generator that ships."""
    found: AnyTask = Flown.from_pretrained(GENERATOR)
    return found


def are_strokes(pictures: Pictures, ways: int) -> bool:
    """Whether labelled pictures are drawings, signs or characters, for which networks can be written."""
    model = generator()
    if ways > model.config.tasks.ways:
        return False
    images = stack(pictures.images, SIDE)
    return float(model.shares(images, pictures.labels)[0]) > 0.5
