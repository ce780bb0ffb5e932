"""Measuring a file of generated networks on a data set, with a zoo beside it for novelty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flown import tasks as data
from flown.measure.evaluate import predictions
from flown.measure.novelty import l2_ratio, largest_iou, mutual_iou
from flown.weights.batch import WeightBatch
from flown.zoo import Zoo


def evaluate_file(
    file: Path | str, name: str, zoo_path: Path | None, top: int = 5
) -> Iterator[str]:
    """Lines of a report: chosen on validation images, measured on test images.

    Raises:
        FlownError: broken file, other classes than the data's, a zoo of other networks.
    """
    batch = WeightBatch.load(file)
    images = data.in_order(data.load(name), batch.layout.task.classes, str(file))
    zoo = Zoo.open(zoo_path) if zoo_path else None
    if not batch.buffers:
        batch = batch.calibrated(images.train.images)
    wrong = predictions(batch, images.test.images) != images.test.labels
    val = (predictions(batch, images.val.images) == images.val.labels).float().mean(dim=1)
    test = 100 * (1 - wrong.float().mean(dim=1))
    spread = f" ± {float(test.std()):.1f}" if len(test) > 1 else ""
    yield f"all {len(test)}: {float(test.mean()):.1f}{spread} % of {len(images.test)} test images"
    yield (
        f"median {float(test.median()):.1f}, min {float(test.min()):.1f}, "
        f"max {float(test.max()):.1f}"
    )
    if len(test) > top:
        best = test[val.argsort(descending=True, stable=True)[:top]]
        yield f"top {top} of {len(test)} by validation: {float(best.mean()):.1f} %"
    yield f"IoU of errors among them: {mutual_iou(wrong):.2f}"
    if zoo is None:
        return
    task = batch.layout.task.name
    last = zoo.select(task=task if task in zoo.tasks else zoo.tasks[0], epochs=[-1])
    train = last.select(split="train").batch(last.tasks[0])
    held_out = last.select(split="held-out").batch(last.tasks[0])
    batch.layout.check_same_weights(train.layout, str(zoo_path))
    ratio = l2_ratio(batch.vectors, train.vectors, held_out.vectors)
    theirs = data.in_order(images, train.layout.task.classes, str(zoo_path))
    ready = train.calibrated(theirs.train.images)
    wrong_train = predictions(ready, theirs.test.images) != theirs.test.labels
    accuracy = 100 * (1 - wrong_train.float().mean())
    yield f"zoo '{last.tasks[0]}', {len(train)} training networks: {float(accuracy):.1f} %"
    yield f"L2 to the nearest of them over held-out's own: {float(ratio.mean()):.2f}"
    yield f"largest IoU of errors with one of them: {float(largest_iou(wrong, wrong_train).mean()):.2f}"
