"""The report card: accuracy and novelty of generated networks beside baselines.

Every figure is on test images, by the rules of `flown.measure.reference`. Methods share the number
of networks and the selection. Support sets are validation images, because contexts of training
images trained the flow. The top networks are chosen on other validation images than those of the
support sets. Beside them stands what each support set gives without a generator: `pixel-centroid`, the
nearest class mean in pixels, and `support-only`, a network trained on it alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from flown.base.errors import FlownError, unknown
from flown.base.progress import bar
from flown.base.provenance import Row, digest
from flown.context.tokens import Contexts
from flown.flow.samplers import Samples
from flown.generator.model import Flown
from flown.measure.baselines import fitting
from flown.measure.fromsupport import pixel_centroid, support_only
from flown.measure.lookup import Lookup
from flown.measure.reference import CHOICE, Measured, Reference, accuracy, deviation
from flown.tasks import ImageData, Split, Support, draw_support, in_order
from flown.weights.batch import WeightBatch
from flown.zoo import Zoo

SUPPORTS = 5  # support sets that share the n samples: one alone could be a lucky draw
_FEW = 10  # samples whose trajectory is drawn


@dataclass
class TaskCard:
    """The measurements on one task.

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
        """Whether the confusion matrix compares two tasks or more."""
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
    steps: int | None = None,
    full: bool = True,
) -> Card:
    """Measures a model against its zoo on every task.

    Args:
        images: image data by task, the same as in fitting.
        n: networks generated a task, over `SUPPORTS` support sets; `top` of them are chosen.
        shots: images a class in a support set, of the validation part.
        full: False leaves out confusion, shuffled contexts and trajectories.

    Raises:
        FlownError: n or top < 1, a task without images or training networks, too few validation
            images for support sets, unknown solver.
    """
    steps = model.config.flow.steps if steps is None else steps
    if n < 1 or top < 1:
        raise FlownError(f"report card: n and top must be at least 1, got {n} and {top}")
    for task in zoo.tasks:
        if task not in images:
            raise FlownError(f"report card: {unknown('task', task, images)}")
    images = {
        task: in_order(images[task], zoo.tasks[task].classes, "report card") for task in zoo.tasks
    }
    supports: dict[str, list[Support]] = {}
    whole = {zoo.tasks[task].dataset: images[task] for task in zoo.tasks}
    if model.config.context.mode != "none":
        images, supports = _set_apart({t: images[t] for t in zoo.tasks}, shots, seed)
    same = zoo.layouts == model.space.joint.layouts
    layouts = {
        task: zoo.place(task) if same else model.space.place(zoo.layout(task)) for task in zoo.tasks
    }
    lookup = None
    if model.support is not None:
        known = list(zoo.tasks.values())
        lookup = Lookup(Contexts(model.support, known, whole, model.config.context, model.classes))
    sampler = _Sampler(model, supports, layouts, n, seed, solver, steps, lookup)
    cards = {}
    with bar("report card", len(zoo.tasks)) as update:
        for index, task in enumerate(zoo.tasks):
            cards[task] = _task_card(sampler, zoo, images, task, full)
            update(index + 1, task)
    counts = {task: _counts(images[task]) for task in zoo.tasks}
    device = str(model.device)
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


def _set_apart(
    images: Mapping[str, ImageData], shots: int, seed: int
) -> tuple[dict[str, ImageData], dict[str, list[Support]]]:
    """Support sets of validation images, and the image data without them."""
    left, supports = {}, {}
    for task, data in images.items():
        draw, classes = torch.Generator().manual_seed(seed + 10_007), len(data.classes)
        places = Split(torch.arange(len(data.val)), data.val.labels)
        drawn = [draw_support(places, classes, shots, draw) for _ in range(SUPPORTS)]
        supports[task] = [Support(data.val.images[rows], labels) for rows, labels in drawn]
        unused = torch.ones(len(data.val), dtype=torch.bool)
        unused[torch.cat([rows for rows, _ in drawn])] = False
        if not unused.any():
            raise FlownError(
                f"report card: all {len(unused)} validation images of '{task}' are in support sets, "
                f"none is left to choose networks on; ask for fewer shots than {shots}"
            )
        left[task] = replace(data, val=data.val[unused.nonzero().flatten()])
    return left, supports


def _counts(data: ImageData) -> dict[str, int]:
    return {"train": len(data.train), "val": min(CHOICE, len(data.val)), "test": len(data.test)}


@dataclass
class _Sampler:
    """Draws networks from a model by the card's settings; `supports` is empty without context."""

    model: Flown
    supports: Mapping[str, list[Support]]
    layouts: Mapping[str, int]
    n: int
    seed: int
    solver: str
    steps: int
    lookup: Lookup | None = None

    def draw(self, task: str, context: str, n: int, trajectory: bool = False) -> list[Samples]:
        """n networks for `task`, spread over the support sets of the task `context`."""
        drawn = []
        for i, share in enumerate(torch.arange(n).tensor_split(SUPPORTS)):
            if not len(share):
                continue
            images, labels = self.supports[context][i] if self.supports else (None, None)
            drawn.append(
                self.model.sample(
                    images,
                    labels,
                    len(share),
                    self.seed + i,
                    self.solver,
                    self.steps,
                    layout=self.layouts[task],
                    trajectory=trajectory and i == 0,
                )
            )
        return drawn

    def recognised(self, task: str, classes: int) -> float | None:
        """Percent of the support sets whose class tokens are most like the task's own."""
        if self.lookup is None:
            return None
        found = [
            self.lookup.task(self.model.context(*support, self.seed), classes)
            for support in self.supports[task]
        ]
        return 100 * found.count(task) / len(found)


def _joined(samples: list[Samples]) -> WeightBatch:
    return samples[0].batch.on(torch.cat([s.batch.vectors for s in samples]))


def _task_card(
    sampler: _Sampler, zoo: Zoo, images: Mapping[str, ImageData], task: str, full: bool
) -> TaskCard:
    model, n = sampler.model, sampler.n
    samples = sampler.draw(task, task, n, trajectory=full)
    generated = _joined(samples)
    reference = Reference(
        images[task], zoo, task, epochs=model.config.epochs, device=generated.vectors.device
    )
    train, held_out = reference.train, reference.held_out
    batches = {"flown": generated} | _compared(sampler, zoo, task, train, held_out)
    methods = reference.zoo() | {name: reference.measure(x) for name, x in batches.items()}
    methods |= _from_supports(sampler, reference, task)
    card = TaskCard(task, methods, sampler.recognised(task, len(images[task].classes)))
    card.seconds = sum(s.seconds for s in samples)
    card.nfe = max(s.nfe for s in samples)
    if full:
        _explain(card, sampler, reference, images, generated)
        _follow(card, model, sampler.layouts[task], samples[0], reference)
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
    init = zoo.recipe(task).get("init", "default")
    found = fitting(train, init)
    return batches | {name: draw(train, sampler.n, generator) for name, draw in found.items()}


def _from_supports(sampler: _Sampler, reference: Reference, task: str) -> dict[str, Measured]:
    """What the support sets alone give."""
    if not sampler.supports:
        return {}
    supports, train = sampler.supports[task], reference.train
    val, test = (pixel_centroid(supports, x) for x in (reference.choice, reference.test))
    found = {"pixel-centroid": Measured(val, test)}
    if (trained := support_only(train, supports, sampler.seed, sampler.model.device)) is not None:
        found["support-only"] = reference.measure(trained)
    return found


def _explain(
    card: TaskCard,
    sampler: _Sampler,
    reference: Reference,
    images: Mapping[str, ImageData],
    generated: WeightBatch,
) -> None:
    """Does the context decide? Confusion of tasks, and networks from other tasks' support sets."""
    classes = len(images[card.task].classes)
    others = [t for t in sampler.layouts if t != card.task]
    comparable = [t for t in others if len(images[t].classes) == classes]
    card.on_others = dict.fromkeys(others)
    card.on_others[card.task] = card.methods["flown"].test
    found = reference.wrong(generated, *(images[other].test for other in comparable))
    card.on_others |= dict(zip(comparable, map(accuracy, found), strict=True))
    if comparable:
        share = -(-sampler.n // len(comparable))
        drawn = [_joined(sampler.draw(card.task, other, share)) for other in comparable]
        wrong = [reference.wrong(batch, reference.test)[0] for batch in drawn]
        card.shuffled = accuracy(torch.cat(wrong))


def _follow(
    card: TaskCard, model: Flown, layout: int, samples: Samples, reference: Reference
) -> None:
    """Accuracy of the networks decoded at eleven times on the way from source to weights."""
    if samples.path is None or samples.times is None:
        return
    path = samples.path[:, :_FEW]
    places = sorted({round(i * (len(path) - 1) / 10) for i in range(11)})
    card.times = samples.times.cpu()[places]
    decoded = model.decode(path[places].flatten(0, 1), layout)
    (wrong,) = reference.wrong(decoded, reference.test)
    card.along = accuracy(wrong).view(len(places), -1)
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
        "std": deviation(values),
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
    rows += [
        {**row("flown", metric, torch.zeros(1)), "value": float(value), "n": n}
        for metric, value in cost.items()
        if value is not None
    ]
    return rows
