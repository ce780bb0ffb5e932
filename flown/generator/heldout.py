"""The report card over held-out tasks: many tasks that no training saw, a support set of each.

Methods have the same tasks, support sets and queries, so that they are compared in pairs. Accuracies
are of all networks, none chosen, on images that no training saw:

    flown                   networks generated for the support set
    flown-shuffled-context  those generated for the task before, if it has as many classes
    pixel-centroid          the nearest mean of a class's support images, in pixels
    support-only            a network trained on the support set alone, where networks are plain
    nearest                 lookup: networks of the training task whose support sets are most alike,
                            among the first 2,000
    zoo-mean                the mean of all training networks
    zoo-held-out            the zoo's own networks of the task, which learnt from its training images
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.base.progress import bar
from flown.base.provenance import Row, digest
from flown.context.tokens import Contexts, Images
from flown.generator.data import task_images
from flown.generator.model import Flown
from flown.measure.fromsupport import nearest_centroid, support_only
from flown.measure.interval import Interval, interval
from flown.measure.lookup import Lookup
from flown.measure.reference import Evaluator, accuracy, deviation
from flown.tasks import ClassPool, Episodes, ImageData, ManyClass, Split, Support, Task, TaskDraw
from flown.weights.batch import WeightBatch
from flown.zoo import Zoo

_QUERIES = 20  # of each class, at most
_KNOWN = 2000  # training tasks that the lookup knows, at most
_CHUNK = 4096  # networks read at a time: a zoo may be larger than the memory


@dataclass
class HeldOutCard:
    """Mean accuracies (T,) in percent by method, NaN where a method has no network of a task."""

    tasks: list[Task]
    accuracies: dict[str, Tensor]
    n: int
    shots: int
    solver: str
    steps: int
    seed: int
    device: str
    zoo: str
    config_hash: str
    counts: dict[str, int]

    def mean(self, method: str) -> Interval:
        """The mean accuracy over tasks."""
        return interval(self.accuracies[method])

    def ahead(self, method: str) -> Interval:
        """How far generated networks are ahead of a method, over the tasks that it has."""
        return interval(self.accuracies["flown"] - self.accuracies[method])

    def rows(self) -> list[Row]:
        """The card in the schema of `results.json`: a row a method, `difference` to it included."""
        datasets = ", ".join(sorted({task.dataset for task in self.tasks}))
        rows = []
        for method, values in self.accuracies.items():
            mean, half, tasks = self.mean(method)
            row: Row = {"dataset": datasets, "method": method, "metric": "accuracy", "value": mean}
            row |= {"std": deviation(values[~values.isnan()]), "interval": half, "n": tasks}
            row |= {"selection": "all", "epoch": None, "paper": None}
            if method != "flown":
                ahead = self.ahead(method)
                row |= {"difference": ahead.mean, "difference_interval": ahead.half}
            rows.append(row)
        return rows


def holds_out_tasks(zoo: Zoo) -> bool:
    """Whether a zoo is split by task, or of tasks drawn at random: its card is over held-out tasks."""
    return any(task.split != "train" or _draw(zoo, task) for task in zoo.tasks.values())


def held_out_tasks(zoo: Zoo, images: Images, count: int) -> list[Task]:
    """At most `count` tasks that no training saw: the zoo's own of split `test`, or else of `val`.

    Of a zoo without any, `count` tasks drawn anew as its recipe says.

    Raises:
        FlownError: the zoo's tasks were all trained on, and no recipe draws others.
    """
    for split in ("test", "val"):
        if found := [task for task in zoo.tasks.values() if task.split == split]:
            return found[:count]
    known = next(iter(zoo.tasks.values()))
    draw, source = _draw(zoo, known), images[known.dataset]
    if draw is None or not isinstance(source, ManyClass):
        raise FlownError(f"{zoo.path}: all of its tasks were trained on, none is held out")
    numbers = range(len(zoo.tasks), len(zoo.tasks) + count)
    return [draw.task(source, number, zoo.about.get("seed", 0)) for number in numbers]


def _draw(zoo: Zoo, task: Task) -> TaskDraw | None:
    values = zoo.recipe(task.id).get("tasks")
    return TaskDraw.parse(values, f"{zoo.path}: recipe") if values else None


def held_out_card(
    model: Flown,
    zoo: Zoo,
    images: Images,
    *,
    tasks: Sequence[Task] | int = 100,
    n: int = 10,
    shots: int | None = None,
    seed: int = 0,
    solver: str = "euler",
    steps: int | None = None,
) -> HeldOutCard:
    """Measures a model on tasks that no training saw.

    Args:
        images: by data set, the same as in fitting.
        tasks: what to measure on, or how many of `held_out_tasks`.
        n: networks generated for each task.
        shots: images a class in a support set; by default as many as in training.

    Raises:
        FlownError: n < 1, no task, a task that was trained on, or too few images of a class.
    """
    shots = shots or model.config.context.shots
    steps = model.config.flow.steps if steps is None else steps
    chosen = held_out_tasks(zoo, images, tasks) if isinstance(tasks, int) else list(tasks)
    if n < 1 or not chosen:
        raise FlownError(f"report card: {n} networks for {len(chosen)} tasks; take 1 or more")
    controls = _Controls(model, zoo, images)
    if seen := [task.id for task in chosen if task.id in controls.train.tasks]:
        raise FlownError(f"report card: task '{seen[0]}' was trained on; give tasks that were not")
    found: dict[str, list[float]] = {}
    generator, before = torch.Generator().manual_seed(seed), None
    queries = 0
    with bar("report card", len(chosen)) as update:
        for place, task in enumerate(chosen):
            data = task_images(task, images)
            episode = _episode(data, shots, generator)
            support, labels = episode.support[0], episode.labels[0]
            made = model.sample(support, labels, n, seed + place, solver, steps).batch
            batches = {"flown": made} | controls.batches(task, made, support, labels)
            if before is not None and before.layout == made.layout:
                batches["flown-shuffled-context"] = before
            values = _measured(data, episode, batches, model.device)
            for method, value in values.items():
                found.setdefault(method, [torch.nan] * len(chosen))[place] = value
            before, queries = made, queries + episode.query.shape[1]
            update(place + 1, task.id)
    counts = {"tasks": len(chosen), "training tasks": len(controls.train.tasks), "queries": queries}
    return HeldOutCard(
        chosen,
        {method: torch.tensor(values) for method, values in found.items()},
        n,
        shots,
        solver,
        steps,
        seed,
        str(model.device),
        zoo.identity,
        digest(model.config),
        counts,
    )


def _episode(data: ImageData, shots: int, generator: torch.Generator) -> Episodes:
    """One support set and queries of a task, of its validation and test images, classes in order."""
    images = torch.cat([data.val.images, data.test.images])
    classes = len(data.classes)
    pool = ClassPool(torch.cat([data.val.labels, data.test.labels]), range(classes))
    fewest = min(map(len, pool.rows))
    queries = min(_QUERIES, fewest - shots)
    if queries < 1:
        raise FlownError(
            f"report card: a class of task '{data.name}' has {fewest} images that no training saw, "
            f"support sets take {shots}; ask for fewer shots"
        )
    rows = pool.draw_places(range(classes), shots + queries, generator).view(1, classes, -1)
    support, query = rows.split([shots, queries], dim=2)
    episode = Episodes.of(support.flatten(1), query.flatten(1), torch.arange(classes)[None])
    return episode.gather(images)


def _measured(
    data: ImageData, episode: Episodes, batches: dict[str, WeightBatch], device: torch.device
) -> dict[str, float]:
    """Mean accuracy of each method's networks on the queries."""
    evaluator, query = Evaluator(data, device=device), Split(episode.query[0], episode.targets[0])
    found = {
        method: float(accuracy(evaluator.wrong(batch, query)[0]).mean())
        for method, batch in batches.items()
    }
    pixels = episode._replace(support=episode.support.float(), query=episode.query.float())
    return found | {"pixel-centroid": float(nearest_centroid(pixels))}


class _Controls:
    """What a support set gives without a generator, alone or with the zoo's last fitted epoch."""

    def __init__(self, model: Flown, zoo: Zoo, images: Images) -> None:
        self.model = model
        self.zoo = zoo.select(epochs=model.config.epochs or None).select(epochs=[-1])
        self.train = self.zoo.select(split="train")
        self.lookup: Lookup | None = None
        if model.support is not None:
            known = list(self.train.tasks.values())[:_KNOWN]
            config = model.config.context
            self.lookup = Lookup(Contexts(model.support, known, images, config, model.classes))
        self.means = [self._mean(layout) for layout in sorted({x.layout for x in self.train.rows})]

    def _mean(self, layout: int) -> WeightBatch:
        """The mean of the training networks of a layout, one network."""
        rows = [i for i, row in enumerate(self.train.rows) if row.layout == layout]
        parts = [rows[i : i + _CHUNK] for i in range(0, len(rows), _CHUNK)]
        total = torch.stack([self.train.read(part).sum(dim=0) for part in parts]).sum(dim=0)
        frozen = self.zoo.frozen_of(layout)
        return WeightBatch(self.zoo.layouts[layout], total[None] / len(rows), frozen=frozen)

    def batches(
        self, task: Task, made: WeightBatch, support: Tensor, labels: Tensor
    ) -> dict[str, WeightBatch]:
        """Networks by method; `made` are those generated for the same support set."""
        found = {}
        for mean in self.means:
            if mean.layout == made.layout:
                found["zoo-mean"] = mean
        if self.lookup is not None:
            tokens = self.model.context(support, labels)
            found["nearest"] = self.train.batch(self.lookup.task(tokens, len(task.classes)))
        alone = support_only(made, [Support(support, labels)], device=self.model.device)
        if alone is not None:
            found["support-only"] = alone
        if task.id in self.zoo.tasks:
            found["zoo-held-out"] = self.zoo.batch(task.id)
        return found
