"""Measuring a file of generated networks on a data set, with a zoo beside it for novelty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from flown import tasks as data
from flown.base.errors import FlownError
from flown.measure.reference import Evaluator, Reference, deviation
from flown.weights.batch import WeightBatch
from flown.zoo import Zoo


def evaluate_file(
    file: Path | str,
    name: str,
    zoo_path: Path | None,
    top: int = 5,
    epochs: Sequence[int] = (),
) -> Iterator[str]:
    """Lines of a report: chosen on validation images, measured on test images.

    Args:
        epochs: those of the zoo that the generator was fitted on; empty means all.

    Raises:
        FlownError: broken file, other classes than the data's, a zoo of other networks.
    """
    batch = WeightBatch.load(file)
    images = data.load(name)
    if batch.task is not None:
        images = data.in_order(images, batch.task.classes, str(file))
    classes = batch.layout.architecture.outputs
    if classes != len(images.classes):
        raise FlownError(
            f"{file}: networks of {classes} classes, '{name}' has {len(images.classes)}"
        )
    evaluator, task = Evaluator(images), ""
    if zoo_path:
        zoo = Zoo.open(zoo_path)
        task_id = batch.task.id if batch.task else ""
        task = next(x for x in (task_id, name, *zoo.tasks) if x in zoo.tasks)
        batch.layout.check_same_weights(zoo.layout(task), str(zoo_path))
        evaluator = Reference(images, zoo, task, epochs=epochs)
    found = evaluator.measure(batch)
    test, std = found.test, deviation(found.test)
    spread = "" if std is None else f" ± {std:.1f}"
    yield f"all {len(test)}: {float(test.mean()):.1f}{spread} % of {len(images.test)} test images"
    yield (
        f"median {float(test.quantile(0.5)):.1f}, min {float(test.min()):.1f}, "
        f"max {float(test.max()):.1f}"
    )
    if len(test) > top:
        best = float(found.top(top).mean())
        yield f"top {top} of {len(test)} by validation: {best:.1f} %"
    yield f"IoU of errors among them: {found.diversity:.2f}"
    if not isinstance(evaluator, Reference):
        return
    known = evaluator.zoo()["zoo"].test
    yield f"zoo '{task}', {len(known)} training networks: {float(known.mean()):.1f} %"
    if found.ratio is None or found.iou is None:
        yield "the zoo holds no network out: novelty has no unit"
        return
    yield f"L2 to the nearest of them over held-out's own: {float(found.ratio.mean()):.2f}"
    yield f"largest IoU of errors with one of them: {float(found.iou.mean()):.2f}"
