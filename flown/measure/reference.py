"""The one yardstick: how good networks of a task are, and how new beside the networks of a zoo.

    accuracy    percent of the validation and of the test images
    ratio       distance to the nearest network of the zoo / the mean of this for held-out networks
    iou         largest agreement of errors with a network of the zoo
    diversity   mean agreement of errors among the networks themselves

All experiments measure with it, so these rules hold for all of them:

- BatchNorm: networks that carry statistics of their own keep them. For all others the statistics are
  estimated on 50 batches of 64 training images, the default of `WeightBatch.calibrated`.
- Selection: the top k are chosen on at most `CHOICE` validation images and shown on test images.
- Novelty is measured against every checkpoint that a generator was fitted on: the training networks
  at `epochs`, all epochs where none is named. Held-out networks at these epochs are the unit. Of a
  lone network the held-out checkpoints are the last ones, whichever epochs were fitted on.
- The zoo's own figures are of the last of these epochs, or of all of them (`every`). A single
  training network is always shown at all of them.
- Identity: the checkpoints of one task and one `Row.model` are one network. A seed is no identity:
  the networks of a grid may share one, and imported networks have none.
- Standard deviations are of a sample, divided by n - 1; one network has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.measure.evaluate import predictions
from flown.measure.novelty import (
    held_out_distance,
    largest_iou,
    mutual_iou,
    nearest_distance,
    same_network,
)
from flown.tasks import ImageData, Split
from flown.weights.batch import WeightBatch
from flown.zoo import Zoo
from flown.zoo.rows import Row

CHOICE = 2000  # validation images, at most, that the top networks are chosen on


@dataclass
class Measured:
    """Networks of one method on one task: accuracies (n,) in percent and novelty.

    `ratio` and `iou` are (n,), see `flown.measure.novelty`; None without held-out networks.
    """

    val: Tensor
    test: Tensor
    ratio: Tensor | None = None
    iou: Tensor | None = None
    diversity: float | None = None
    epoch: float | None = None

    def top(self, k: int) -> Tensor:
        """Test accuracies of the k networks that are best on validation images."""
        return self.test[self.val.argsort(descending=True, stable=True)[:k]]


def deviation(values: Tensor) -> float | None:
    """Standard deviation of a sample (n,), divided by n - 1; None for a single value."""
    return float(values.std()) if len(values) > 1 else None


def at_most(split: Split, most: int | None) -> Split:
    """At most so many images, drawn at random, always the same."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    return split if most is None else split[order[:most]]


def accuracy(wrong: Tensor) -> Tensor:
    """Percent (n,) of right predictions from masks (n, N) of wrong ones."""
    return 100 * (1 - wrong.float().mean(dim=1))


class Evaluator:
    """A task's images, and the figures of networks that need no zoo.

    Args:
        images: those of the networks' own task.
        most: at most so many validation and test images, where evaluation is what costs.
        device: where networks are run; figures are on the CPU.
    """

    def __init__(
        self, images: ImageData, most: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.images, self.device = images, device
        self.test = at_most(images.test, most)
        self.choice = at_most(images.val, min(CHOICE, most or CHOICE))

    def wrong(self, batch: WeightBatch, *splits: Split) -> list[Tensor]:
        """Masks (n, N) of wrong predictions on each split, of networks that are made ready to run."""
        batch, rows = batch.to(self.device), torch.arange(len(batch))
        if not batch.buffers:
            # Equal networks, which lookups and adaptations return, run once.
            vectors, rows = batch.vectors.unique(dim=0, return_inverse=True)
            batch = batch.on(vectors).calibrated(self.images.train.images)
        rows = rows.to(self.device)
        return [predictions(batch, x.images)[rows].cpu() != x.labels for x in splits]

    def measure(self, batch: WeightBatch) -> Measured:
        """Validation and test accuracies, and how much the networks' errors agree."""
        val, test = self.wrong(batch, self.choice, self.test)
        return Measured(accuracy(val), accuracy(test), diversity=mutual_iou(test))


class Reference(Evaluator):
    """One task's networks of a zoo, measured once, and the figures of others beside them.

    Args:
        task: the zoo's, whose images these are.
        epochs: the checkpoints that a generator was fitted on, as in `Zoo.select`; () is all.
        every: all of these checkpoints stand for the zoo, not those of the last epoch alone.

    Attributes:
        train, held_out: the networks that stand for the zoo; `held_out` is None where there is none.
        vectors: all checkpoints (m, D) that novelty is measured against.
        unit: the mean distance of held-out networks to the nearest of these, None without any.
        epoch: of `train`, None where it holds checkpoints of several.

    Raises:
        FlownError: no training network at these epochs; held-out networks are copies of training ones.
    """

    def __init__(
        self,
        images: ImageData,
        zoo: Zoo,
        task: str,
        *,
        epochs: Sequence[int] = (),
        every: bool = False,
        most: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(images, most, device)
        whole = zoo.select(task=task)
        fitted = whole.select(epochs=epochs or None)
        lone = len(set(map(_identity, whole.rows))) == 1
        seen = _part(fitted, "train")
        if seen is None:
            raise FlownError(
                f"{zoo.path}: task '{task}' has no training network in epochs {tuple(epochs)}; of a "
                "lone network the last checkpoints are held out: epochs () takes all"
            )
        self.single = len(set(map(_identity, seen.rows))) == 1
        last, every = max(row.epoch for row in seen.rows), every or self.single
        known = seen.batch(task)
        self._places = [i for i, row in enumerate(seen.rows) if every or row.epoch == last]
        self.vectors, self.train = known.vectors, known[self._places]
        shown = [seen.rows[i] for i in self._places]
        self.epoch = last if all(row.epoch == last for row in shown) else None
        models = [row.model for row in seen.rows]
        self._same = same_network([row.model for row in shown], models)
        self._val, self._test = self.wrong(known, self.choice, self.test)
        self.unit: float | None = None
        self.held_out: WeightBatch | None = None
        held = _part(whole if lone else fitted, "held-out")
        if held is not None:
            other = held.batch(task)
            self.unit = held_out_distance(self.vectors, other.vectors)
            final = max(row.epoch for row in held.rows)
            self.held_out = other[
                [i for i, row in enumerate(held.rows) if every or row.epoch == final]
            ]

    def measure(self, batch: WeightBatch) -> Measured:
        """Accuracies, novelty and diversity."""
        return self._measured(batch.vectors, *self.wrong(batch, self.choice, self.test))

    def zoo(self) -> dict[str, Measured]:
        """Training networks, each beside the other networks of the zoo, and held-out ones."""
        places, vectors = self._places, self.train.vectors
        val, test = self._val[places], self._test[places]
        found = {"zoo": self._measured(vectors, val, test, self._same)}
        if self.single:  # there is no other network to compare it with
            found["zoo"].ratio = found["zoo"].iou = None
        if self.held_out is not None:
            found["zoo-held-out"] = self.measure(self.held_out)
        for measured in found.values():
            measured.epoch = self.epoch
        return found

    def _measured(
        self, vectors: Tensor, val: Tensor, test: Tensor, excluded: Tensor | None = None
    ) -> Measured:
        """`excluded` (n, m): pairs that are of one network and do not count."""
        found = Measured(accuracy(val), accuracy(test), diversity=mutual_iou(test))
        if self.unit is not None:
            found.ratio = nearest_distance(vectors.cpu(), self.vectors, excluded) / self.unit
            found.iou = largest_iou(test, self._test, excluded)
        return found


def _identity(row: Row) -> tuple[str, int]:
    return row.task, row.model


def _part(zoo: Zoo, split: str) -> Zoo | None:
    return zoo.select(split=split) if any(row.split == split for row in zoo.rows) else None
