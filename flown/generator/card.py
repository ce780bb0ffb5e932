"""The report card: how good, how new, and compared with what.

Every figure is on test images; whatever is chosen is chosen on validation images. Methods share
the number of networks and the selection. Support sets and BatchNorm statistics are of training
images. Novelty is measured against every checkpoint that the model was fitted on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flown.base.errors import FlownError, unknown
from flown.base.progress import bar
from flown.base.provenance import Row, digest
from flown.generator.model import Flown, Samples
from flown.measure.baselines import fitting
from flown.measure.evaluate import predictions
from flown.measure.novelty import (
    held_out_distance,
    largest_iou,
    mutual_iou,
    nearest_distance,
    same_seed,
)
from flown.tasks import ImageData, Split, Support, draw_support, in_order
from flown.weights.batch import WeightBatch
from flown.zoo import Zoo

SUPPORTS = 5  # support sets that share the n samples, so that none is one lucky draw
CHOICE = 2000  # validation images, at most, that the top networks are chosen on
_FEW, _BATCH = 10, 32  # samples whose trajectory is drawn; images a batch to calibrate BatchNorm on


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


@dataclass
class TaskCard:
    """Everything measured on one task.

    `on_others` is the row of the confusion matrix, None where class counts differ; `shuffled`
    holds the networks generated from other tasks' support sets; `along` (times, few) the accuracy
    on the way from source to weights; `path` (times, few, L).
    """

    task: str
    methods: dict[str, Measured]
    recognised: float | None = None
    on_others: dict[str, Tensor | None] = field(default_factory=dict)
    shuffled: Tensor | None = None
    times: Tensor | None = None
    along: Tensor | None = None
    latents: dict[str, Tensor] = field(default_factory=dict)
    path: Tensor | None = None
    seconds: float = 0.0
    nfe: int = 0


@dataclass
class Card:
    """The report card of a model, task by task."""

    tasks: dict[str, TaskCard]
    n: int
    top: int
    shots: int
    solver: str
    steps: int
    seed: int
    device: str
    zoo: str
    config_hash: str
    counts: dict[str, dict[str, int]]

    @property
    def confusion(self) -> list[list[float | None]]:
        """Row: generated for, column: tested on; mean accuracy in percent."""
        rows = [[row.on_others.get(other) for other in self.tasks] for row in self.tasks.values()]
        return [[None if x is None else float(x.mean()) for x in row] for row in rows]

    @property
    def compares_tasks(self) -> bool:
        """Whether the confusion matrix says anything."""
        return len(self.tasks) > 1 and any(card.on_others for card in self.tasks.values())

    def rows(self) -> list[Row]:
        """The card in the schema of `results.json`."""
        return [row for card in self.tasks.values() for row in _rows(card, self.top)]


def report_card(
    model: Flown,
    zoo: Zoo,
    images: Mapping[str, ImageData],
    *,
    n: int = 50,
    top: int = 5,
    shots: int = 5,
    seed: int = 0,
    solver: str = "euler",
    steps: int = 100,
    full: bool = True,
) -> Card:
    """Measures a model against its zoo on every task.

    Args:
        images: image data by task, the same as in fitting.
        n: networks generated a task, over `SUPPORTS` support sets; `top` of them are chosen.
        shots: images a class in a support set.
        full: False leaves out what only explains: confusion, shuffled contexts, trajectories.

    Raises:
        FlownError: n or top < 1, a task without images or training networks, unknown solver.
    """
    if n < 1 or top < 1:
        raise FlownError(f"report card: n and top must be at least 1, got {n} and {top}")
    for task in model.tasks:
        if task not in images:
            raise FlownError(f"report card: {unknown('task', task, images)}")
    images = {
        x.task.name: in_order(images[x.task.name], x.task.classes, "report card")
        for x in model.joint.layouts
    }
    supports = {task: _supports(images[task], shots, seed) for task in model.tasks}
    sampler = _Sampler(model, supports, n, seed, solver, steps)
    cards = {}
    with bar("report card", len(model.tasks)) as update:
        for index, task in enumerate(model.tasks):
            cards[task] = _task_card(sampler, zoo, images, task, full)
            update(index + 1, task)
    counts = {task: _counts(images[task]) for task in model.tasks}
    device = str(model.standardizer.mean.device)
    return Card(
        cards,
        n,
        top,
        shots,
        solver,
        steps,
        seed,
        device,
        zoo.identity,
        digest(model.config),
        counts,
    )


def _supports(images: ImageData, shots: int, seed: int) -> list[Support]:
    draw, classes = torch.Generator().manual_seed(seed + 10_007), len(images.classes)
    return [draw_support(images.train, classes, shots, draw) for _ in range(SUPPORTS)]


def _counts(data: ImageData) -> dict[str, int]:
    return {"train": len(data.train), "val": min(CHOICE, len(data.val)), "test": len(data.test)}


@dataclass
class _Sampler:
    """Draws networks from a model by the card's settings."""

    model: Flown
    supports: Mapping[str, list[Support]]
    n: int
    seed: int
    solver: str
    steps: int

    def draw(self, task: str, context: str, n: int, trajectory: bool = False) -> list[Samples]:
        """n networks for `task`, shared out over the support sets of the task `context`."""
        drawn = []
        for i, share in enumerate(torch.arange(n).tensor_split(SUPPORTS)):
            if not len(share):
                continue
            some = self.supports[context][i]
            drawn.append(
                self.model.sample(
                    some.images,
                    some.labels,
                    len(share),
                    self.seed + i,
                    self.solver,
                    self.steps,
                    task=task,
                    trajectory=trajectory and i == 0,
                )
            )
        return drawn

    def recognised(self, task: str) -> float | None:
        """Percent of the support sets from which the model tells the task by itself."""
        if self.model.config.context.mode == "none":
            return None
        names = [
            self.model.sample(
                s.images, s.labels, 1, self.seed, self.solver, 1
            ).batch.layout.task.name
            for s in self.supports[task]
        ]
        return 100 * names.count(task) / len(names)


def _joined(samples: list[Samples]) -> WeightBatch:
    return samples[0].batch.on(torch.cat([s.batch.vectors for s in samples]))


def _wrong(batch: WeightBatch, data: ImageData, *splits: Split) -> list[Tensor]:
    """Masks (n, N) of wrong predictions on each split; `data` is the networks' own."""
    vectors, places = batch.vectors.unique(dim=0, return_inverse=True)  # equal networks run once
    ready = batch.on(vectors).calibrated(data.train.images, batch_size=_BATCH)
    return [predictions(ready, x.images)[places].cpu() != x.labels for x in splits]


def _accuracy(wrong: Tensor) -> Tensor:
    return 100 * (1 - wrong.float().mean(dim=1))


def _part(zoo: Zoo, task: str, split: str) -> WeightBatch | None:
    return zoo.select(split=split).batch(task) if any(r.split == split for r in zoo.rows) else None


class _Reference:
    """One task's zoo: what every method is measured against."""

    def __init__(
        self, zoo: Zoo, task: str, epochs: tuple[int, ...], data: ImageData, device: torch.device
    ) -> None:
        fitted = zoo.select(task=task, epochs=epochs or None)
        seen = fitted.select(split="train")
        # Of a lone network there is one last checkpoint, or it is held out: all stand for it.
        lone = len({row.seed for row in seen.rows}) == 1
        last = fitted if lone else zoo.select(task=task, epochs=[-1])
        self.data, self.device = data, device
        self.train = last.select(split="train").batch(task)
        self.held_out = _part(last, task, "held-out")
        self.epoch = None if lone and len(seen) > 1 else last.rows[0].epoch
        self.vectors = seen.batch(task).vectors
        (self.wrong,) = _wrong(self.train.on(self.vectors).to(device), data, data.test)
        self.unit = None
        if self.held_out is not None:
            self.unit = held_out_distance(self.vectors, self.held_out.vectors)
        self.same = None
        if not lone:
            own = [row.seed for row in last.select(split="train").rows]
            self.same = same_seed(own, [row.seed for row in seen.rows])
        order = torch.randperm(len(data.val), generator=torch.Generator().manual_seed(0))
        self.choice = data.val[order[:CHOICE]]

    def measure(self, batch: WeightBatch, excluded: Tensor | None = None) -> Measured:
        """Accuracy and novelty; `excluded` (n, training) are pairs of networks of one seed."""
        val, wrong = _wrong(batch.to(self.device), self.data, self.choice, self.data.test)
        measured = Measured(_accuracy(val), _accuracy(wrong), diversity=mutual_iou(wrong))
        if self.unit is not None:
            distances = nearest_distance(batch.vectors.cpu(), self.vectors, excluded)
            measured.ratio = distances / self.unit
            measured.iou = largest_iou(wrong, self.wrong, excluded)
        return measured

    def zoo(self) -> dict[str, Measured]:
        """Training networks, each against those of other seeds, and held-out ones."""
        found = {"zoo": self.measure(self.train, self.same)}
        if self.same is None:  # one seed: there is nothing to leave out and compare with
            found["zoo"].ratio = found["zoo"].iou = None
        if self.held_out is not None:
            found["zoo-held-out"] = self.measure(self.held_out)
        for measured in found.values():
            measured.epoch = self.epoch
        return found


def _task_card(
    sampler: _Sampler, zoo: Zoo, images: Mapping[str, ImageData], task: str, full: bool
) -> TaskCard:
    model, n = sampler.model, sampler.n
    samples = sampler.draw(task, task, n, trajectory=full)
    generated = _joined(samples)
    reference = _Reference(zoo, task, model.config.epochs, images[task], generated.vectors.device)
    train, held_out = reference.train, reference.held_out
    batches = {"flown": generated} | _compared(sampler, zoo, task, train, held_out)
    methods = reference.zoo() | {name: reference.measure(x) for name, x in batches.items()}
    card = TaskCard(task, methods, sampler.recognised(task))
    card.seconds = sum(s.seconds for s in samples)
    card.nfe = max(s.nfe for s in samples)
    if full:
        _explain(card, sampler, images, generated)
        _follow(card, model, samples[0], images[task])
        encoded = {"zoo": train, "held-out": held_out}
        card.latents = {k: model.encode(x).flatten(1).cpu() for k, x in encoded.items() if x}
        card.latents["samples"] = torch.cat([s.latents for s in samples]).flatten(1).cpu()
        card.latents["source"] = torch.cat([s.source for s in samples]).flatten(1).cpu()
    return card


def _compared(
    sampler: _Sampler, zoo: Zoo, task: str, train: WeightBatch, held_out: WeightBatch | None
) -> dict[str, WeightBatch]:
    """Reconstructions and baselines, by method."""
    batches = {"reconstruction-train": sampler.model.reconstruct(train[: sampler.n])}
    if held_out is not None:
        batches["reconstruction-held-out"] = sampler.model.reconstruct(held_out)
    generator = torch.Generator().manual_seed(sampler.seed)
    init = zoo.about.get("recipes", {}).get(task, {}).get("init", "default")
    found = fitting(train, init)
    return batches | {name: draw(train, sampler.n, generator) for name, draw in found.items()}


def _explain(
    card: TaskCard, sampler: _Sampler, images: Mapping[str, ImageData], generated: WeightBatch
) -> None:
    """Does the context decide? Confusion of tasks, and networks from others' support sets."""
    classes = len(images[card.task].classes)
    others = [t for t in sampler.model.tasks if t != card.task]
    comparable = [t for t in others if len(images[t].classes) == classes]
    card.on_others = dict.fromkeys(others)
    card.on_others[card.task] = card.methods["flown"].test
    own = images[card.task]
    found = _wrong(generated, own, *(images[other].test for other in comparable))
    card.on_others |= dict(zip(comparable, map(_accuracy, found), strict=True))
    if comparable:
        share = -(-sampler.n // len(comparable))
        drawn = [_joined(sampler.draw(card.task, other, share)) for other in comparable]
        card.shuffled = torch.cat([_accuracy(_wrong(x, own, own.test)[0]) for x in drawn])


def _follow(card: TaskCard, model: Flown, samples: Samples, data: ImageData) -> None:
    """Accuracy of the networks decoded at eleven times on the way from source to weights."""
    if samples.path is None or samples.times is None:
        return
    path = samples.path[:, :_FEW]
    places = sorted({round(i * (len(path) - 1) / 10) for i in range(11)})
    card.times = samples.times.cpu()[places]
    (wrong,) = _wrong(model.decode(path[places].flatten(0, 1), card.task), data, data.test)
    card.along = _accuracy(wrong).view(len(places), -1)
    card.path = path.flatten(2).cpu()


def _row(
    dataset: str,
    method: str,
    metric: str,
    values: Tensor,
    selection: str = "all",
    epoch: float | None = None,
) -> Row:
    spread = {}
    if metric == "accuracy":
        spread = {
            "median": float(values.quantile(0.5)),
            "min": float(values.min()),
            "max": float(values.max()),
        }
    return {
        "dataset": dataset,
        "method": method,
        "metric": metric,
        "value": float(values.mean()),
        "std": float(values.std()) if len(values) > 1 else None,
        "n": len(values),
        "selection": selection,
        "epoch": epoch,
        "paper": None,
        **spread,
    }


def _rows(card: TaskCard, top: int) -> list[Row]:
    row = partial(_row, card.task)
    rows = []
    for name, m in card.methods.items():
        rows.append(row(name, "accuracy", m.test, epoch=m.epoch))
        if len(m.test) > top and not name.startswith("reconstruction"):
            chosen = f"val-top{top}-of-{len(m.test)}"
            rows.append(row(name, "accuracy", m.top(top), chosen, m.epoch))
        if m.ratio is not None and m.iou is not None:
            rows.append(row(name, "l2-ratio", m.ratio))
            rows.append(row(name, "max-iou", m.iou))
        if m.diversity is not None:
            rows.append(
                {**row(name, "diversity-iou", torch.tensor([m.diversity])), "n": len(m.test)}
            )
    for other, values in card.on_others.items():
        if values is not None:
            rows.append(row("flown", f"accuracy-on-{other}", values))
    if card.shuffled is not None:
        rows.append(row("flown-shuffled-context", "accuracy", card.shuffled))
    if card.times is not None and card.along is not None:
        rows += [
            {**row("flown", "accuracy-along", values, "first-support-set"), "t": float(t)}
            for t, values in zip(card.times, card.along, strict=True)
        ]
    cost = {"seconds": card.seconds, "nfe": card.nfe, "recognised": card.recognised}
    n = len(card.methods["flown"].test)
    one = torch.zeros(1)
    rows += [
        {**row("flown", metric, one), "value": float(value), "n": n}
        for metric, value in cost.items()
        if value is not None
    ]
    return rows
