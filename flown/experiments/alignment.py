"""The effect of alignment on a zoo: distances, and accuracies between its networks."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from flown import tasks as data
from flown.measure.evaluate import evaluate
from flown.weights.batch import WeightBatch
from flown.zoo import Zoo
from flown.zoo.align.align import Spread, spread


def compare(
    before: Zoo, after: Zoo, pairs: int = 100, seed: int = 0
) -> Iterator[tuple[str, Spread, Spread]]:
    """Each task with the spread of its last training checkpoints in both zoos, same pairs.

    Accuracies are measured on validation images. Tasks whose data is not installed are left out.
    """
    here = {source.name for source in data.available() if source.present}
    for task in before.tasks:
        if task not in here:
            continue
        val = data.in_order(data.load(task), before.tasks[task].classes, task).val

        def accuracy(
            batch: WeightBatch, images: Tensor = val.images, labels: Tensor = val.labels
        ) -> Tensor:
            return evaluate(batch, images, labels)

        found = []
        for zoo in (before, after):
            batch = zoo.select(task=task, split="train", epochs=[-1]).batch(task)
            found.append(spread(batch, accuracy, pairs, seed))
        yield task, found[0], found[1]
