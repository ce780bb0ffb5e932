"""Measuring a file of generated networks on a data set, or a model on the zoo that it was fitted on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from flown import tasks as data
from flown.base.errors import FlownError
from flown.base.files import read_json
from flown.base.provenance import provenance, write_results
from flown.base.run import Run
from flown.context.tokens import Images
from flown.generator import files, modelcard
from flown.generator.card import Card, report_card
from flown.generator.data import task_images
from flown.generator.heldout import HeldOutCard, held_out_card, holds_out_tasks
from flown.generator.model import Flown
from flown.measure.reference import Evaluator, Reference, deviation
from flown.report import write_report
from flown.weights.batch import WeightBatch
from flown.zoo import Zoo


def evaluate_model(
    folder: Path,
    zoo_path: Path,
    out: Path | None = None,
    top: int = 5,
    *,
    images: Images | None = None,
    overwrite: bool = False,
    device: str = "cpu",
) -> Card | HeldOutCard:
    """The report card of a model: over held-out tasks where the zoo is split by task, else by name.

    The model keeps it in its own README.

    Args:
        out: a folder for `results.json` and `report.html`.
        top: of a card by name, how many networks are chosen.
        images: by data set; loaded by the data sets' names otherwise.

    Raises:
        FlownError: no model fitted on a zoo, or as the cards.
    """
    start = time.monotonic()
    model = Flown.from_pretrained(folder).to(device)
    if not isinstance(model, Flown):
        raise FlownError(f"{folder}: was fitted on no zoo; `flown reproduce anytask` measures it")
    zoo = Zoo.open(zoo_path)
    run = None
    if out is not None:
        plan = {"evaluate": str(folder), "zoo": zoo.identity}
        run = Run(out, plan, resume=False, overwrite=overwrite, sources=[folder, zoo_path])
        run.claim()
    names = sorted({task.dataset for task in zoo.tasks.values()})
    images = images or {name: data.load_any(name) for name in names}
    card: Card | HeldOutCard
    if holds_out_tasks(zoo):
        card = held_out_card(model, zoo, images)
    else:
        by_task = {task.id: task_images(task, images) for task in zoo.tasks.values()}
        card = report_card(model, zoo, by_task, top=top)
    rows = card.rows()
    model.card["rows"] = modelcard.kept(rows)
    files.write_card(folder, model.card, modelcard.render(model))
    if run is not None:
        run.begin()
        about = provenance(model.config, card.counts, time.monotonic() - start, device)
        write_results(run.path / "results.json", "evaluate", "cpu", about, rows)
        past = folder.parent / "history.json"
        histories = read_json(past) if past.is_file() else {}
        write_report(run.path / "report.html", "flown: report card", card, histories, about)
    return card


def evaluate_file(
    file: Path | str,
    name: str,
    zoo_path: Path | None,
    top: int = 5,
    epochs: Sequence[int] = (),
    device: str = "cpu",
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
    evaluator, task = Evaluator(images, device=device), ""
    if zoo_path:
        zoo = Zoo.open(zoo_path)
        task_id = batch.task.id if batch.task else ""
        task = next(x for x in (task_id, name, *zoo.tasks) if x in zoo.tasks)
        batch.layout.check_same_weights(zoo.layout(task), str(zoo_path))
        evaluator = Reference(images, zoo, task, epochs=epochs, device=device)
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
