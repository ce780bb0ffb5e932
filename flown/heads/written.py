"""The head that is whole networks: written for the labelled images by the any-task generator.

Their vote needs no temperature: how sure they are follows from the labelled images (`anytask.ridge`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flown.anytask.model import AnyTask
from flown.generator.model import Flown
from flown.heads import calibrate, unknown
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

    def __init__(self, support: Pictures, ways: int) -> None:
        self.model: AnyTask = Flown.from_pretrained(GENERATOR)
        channels = max(image.shape[0] for image in support.images)
        self.support = Support(_pixels(support, channels), support.labels)
        self.ways, self.channels = ways, channels
        self.networks = self._networks(self.support)
        self.fewest = int(torch.bincount(support.labels, minlength=ways).min())

    def calibrate(self) -> tuple[Tensor | None, Tensor]:
        """Probabilities (n, W) of labelled pictures that were left out, and their rows (n,)."""
        if self.fewest < 2:
            return None, torch.empty(0, dtype=torch.long)

        def fit(images: Tensor, labels: Tensor, asked: Tensor, _: int) -> Tensor:
            shape = self.support.images.shape[1:]
            found = []
            for x, y, others in zip(images, labels, asked, strict=True):
                networks = self._networks(Support(x.unflatten(1, shape), y))
                found.append(vote(networks, others.unflatten(1, shape)))
            return torch.stack(found)

        flat = self.support.images.flatten(1)
        return calibrate.leave_one_out(fit, flat, self.support.labels, self.ways)

    def batch(self, classes: tuple[str, ...], task: str) -> WeightBatch:
        """The networks."""
        named = self.model.generate(*self.support, NETWORKS, classes=classes)
        named.provenance |= {"model": GENERATOR, "support": task, "classes": list(classes)}
        return named

    def probabilities(self, queries: Pictures) -> Tensor:
        """Probabilities (N, C) of pictures."""
        return vote(self.networks, _pixels(queries, self.channels))

    def novelty(self, rate: float, queries: Pictures) -> Tensor:
        """Distances (N,) from the nearest class, in units of what a part `rate` of them exceed.

        Raises:
            FlownError: no class has two pictures, or a rate that is none.
        """

        def score(seen: Support, asked: Tensor) -> Tensor:
            return unknown.of_networks(self._networks(seen), seen, asked)

        most = unknown.limit(unknown.left_out(self.support, score), rate)
        asked = _pixels(queries, self.channels)
        return unknown.of_networks(self.networks, self.support, asked) / most

    def _networks(self, support: Support) -> WeightBatch:
        return self.model.generate(*support, NETWORKS)


def are_strokes(pictures: Pictures, ways: int) -> bool:
    """Whether labelled pictures are drawings, signs or characters, for which networks can be written."""
    model: AnyTask = Flown.from_pretrained(GENERATOR)
    if ways > model.config.tasks.ways:
        return False
    images = stack(pictures.images, SIDE)
    return float(model.shares(images, pictures.labels)[0]) > 0.5


@torch.no_grad()
def vote(networks: WeightBatch, images: Tensor) -> Tensor:
    """Mean probabilities (N, C) of networks for uint8 images (N, c, H, W)."""
    p = [
        networks.logits(networks.preprocess(some)).softmax(dim=2).mean(dim=0)
        for some in images.split(500)
    ]
    return torch.cat(p)


def _pixels(pictures: Pictures, channels: int) -> Tensor:
    """Pictures as one tensor (N, channels, 32, 32), whatever their sizes."""
    images = stack(pictures.images, SIDE)
    if images.shape[1] > channels:  # colour where the labelled ones are grey
        images = images.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
    return images.expand(-1, channels, -1, -1)
