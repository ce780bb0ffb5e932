"""Few-shot episodes: classes and images drawn at random from a labelled set, as rows of that set.

An episode is a task of W ways: W random classes, K support images (shots) and Q query images of each.
Axes: T episodes, W ways, K shots, Q queries a class, F features. Rows are sorted by class; support and
queries of an episode share no image. Any tensor with one row an image is gathered by the rows:

    >>> features = torch.arange(12.0)[:, None]  # of twelve images
    >>> pool = ClassPool(torch.arange(12) // 4, classes=torch.arange(3))
    >>> generator = torch.Generator().manual_seed(0)
    >>> episodes = pool.draw(ways=2, shots=1, queries=3, count=5, generator=generator)
    >>> episodes.labels[0].tolist(), episodes.targets[0].tolist()
    ([0, 1], [0, 0, 0, 1, 1, 1])
    >>> episodes.gather(features).query.shape
    torch.Size([5, 6, 1])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from flown.base.errors import FlownError

SAMPLER = 2  # raised when the same seed draws other images; files that rest on a draw record it


class Episodes(NamedTuple):
    """T episodes of one size, sorted by class.

    `support` (T, W K) and `query` (T, W Q) are numbers of rows of a set, after `gather` those rows,
    (T, W K, ...) and (T, W Q, ...). `labels` and `targets` are their classes, 0 to W - 1; `classes`
    (T, W) are the numbers of those classes in the set.
    """

    support: Tensor
    labels: Tensor
    query: Tensor
    targets: Tensor
    classes: Tensor

    @classmethod
    def of(cls, support: Tensor, query: Tensor, classes: Tensor) -> Episodes:
        """From supports (T, W K, ...) and queries (T, W Q, ...) sorted by class, and classes (T, W)."""
        count, ways = classes.shape
        labels, targets = (
            torch.arange(ways, device=classes.device)
            .repeat_interleave(part.shape[1] // ways)
            .expand(count, -1)
            for part in (support, query)
        )
        return cls(support, labels, query, targets, classes)

    @classmethod
    def join(cls, parts: Sequence[Episodes]) -> Episodes:
        """All episodes of several batches of one size."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @property
    def ways(self) -> int:
        """Classes of each episode."""
        return self.classes.shape[1]

    @property
    def shots(self) -> int:
        """Support images of each class."""
        return self.support.shape[1] // self.ways

    def gather(self, source: Tensor) -> Episodes:
        """The same episodes with the rows of `source` (N, ...) in place of their numbers."""
        return self._replace(support=source[self.support], query=source[self.query])

    def part(self, rows: slice | Tensor) -> Episodes:
        """Those episodes of `rows`."""
        return Episodes(*(tensor[rows] for tensor in self))

    def first_shots(self, shots: int) -> Episodes:
        """The same episodes with only the first `shots` support images of each class."""
        first = self.support.unflatten(1, (self.ways, -1))[:, :, :shots].flatten(1, 2)
        return Episodes.of(first, self.query, self.classes)

    def to(self, device: torch.device | str) -> Episodes:
        """The same episodes on a device."""
        return Episodes(*(tensor.to(device) for tensor in self))


class ClassPool:
    """The rows of a labelled set that show some of its classes, ready to draw from.

    Args:
        labels: class numbers (N,), one a row of the set.
        classes: the numbers of the classes to draw from, as in `ManyClass.class_split`.
        repeat: whether a class with too few images gives some of them again, instead of an error.
    """

    def __init__(
        self, labels: Tensor, classes: Tensor | Sequence[int], repeat: bool = False
    ) -> None:
        self.classes, self.repeat = torch.as_tensor(classes, dtype=torch.int64), repeat
        order = labels.argsort(stable=True)
        ordered, wanted = labels[order].long(), self.classes.to(labels.device)
        first = torch.searchsorted(ordered, wanted).tolist()
        last = torch.searchsorted(ordered, wanted, right=True).tolist()
        self.rows = [order[i:j] for i, j in zip(first, last, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def draw(
        self, ways: int, shots: int, queries: int, generator: torch.Generator, count: int = 1
    ) -> Episodes:
        """`count` random episodes, as rows of the set; the first are the same for any count.

        Raises:
            FlownError: a size below 1, fewer classes than ways, or a class with too few images.
        """
        if min(ways, shots, queries, count) < 1:
            raise FlownError(
                f"episodes need {ways=}, {shots=}, {queries=} and {count=} of 1 or more"
            )
        if ways > len(self):
            raise FlownError(f"{ways} ways asked for, there are {len(self)} classes")
        self._require(shots + queries)
        chosen, rows = [], []
        for _ in range(count):
            places = torch.randperm(len(self), generator=generator)[:ways]
            chosen.append(places)
            rows.append(self._images(places.tolist(), shots + queries, generator))
        images = torch.stack(rows)  # (T, W, K + Q)
        support, query = images.split([shots, queries], dim=2)
        return Episodes.of(support.flatten(1), query.flatten(1), self.classes[torch.stack(chosen)])

    def draw_support(self, shots: int, generator: torch.Generator) -> Tensor:
        """Rows (C K,) of `shots` random images of every class, in the order of the classes.

        Raises:
            FlownError: no class, no shot, or a class with too few images.
        """
        if shots < 1 or not len(self):
            raise FlownError(
                f"a support set needs an image of some class: shots={shots}, {len(self)} classes"
            )
        self._require(shots)
        return self.draw_places(range(len(self)), shots, generator)

    def draw_places(self, places: Sequence[int], shots: int, generator: torch.Generator) -> Tensor:
        """As `draw_support`, of the classes at `places` among the pool's, in that order.

        They must have enough images.
        """
        return self._images(places, shots, generator).flatten()

    def _images(self, places: Sequence[int], each: int, generator: torch.Generator) -> Tensor:
        """Rows (W, each) of random images of the classes at `places`."""
        return torch.stack([self._random(self.rows[place], each, generator) for place in places])

    def _random(self, rows: Tensor, each: int, generator: torch.Generator) -> Tensor:
        """`each` of the rows; with fewer, all of them in one random order after another."""
        rounds = -(-each // len(rows))
        orders = [torch.randperm(len(rows), generator=generator) for _ in range(rounds)]
        return rows[torch.cat(orders)[:each]]

    def _require(self, images: int) -> None:
        fewest = min(range(len(self)), key=lambda place: len(self.rows[place]))
        if (count := len(self.rows[fewest])) < (1 if self.repeat else images):
            label = int(self.classes[fewest])
            raise FlownError(f"class {label} has {count} images, {images} are needed")


def cpu_generator(generator: torch.Generator) -> torch.Generator:
    """A generator on the CPU, where sets lie, that follows from one on any device."""
    seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed))


def check_disjoint(class_split: Mapping[str, Tensor]) -> None:
    """Raises FlownError when two parts (`train`, `val`, `test`) share a class."""
    for first, second in combinations(class_split, 2):
        if shared := sorted(set(class_split[first].tolist()) & set(class_split[second].tolist())):
            raise FlownError(
                f"class {shared[0]} is in both '{first}' and '{second}'; an accuracy on classes of "
                "the training is no few-shot accuracy"
            )
