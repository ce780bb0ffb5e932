"""The report card: how good, how new, and compared with what.

Every figure is on test images; whatever is chosen is chosen on validation images. Methods share
the number of networks and the selection. Support sets are drawn from training images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flown.baselines import BASELINES
from flown.data import ImageData, Split, Support, draw_support
from flown.evaluate import predictions
from flown.model import Flown, Samples
from flown.novelty import l2_ratio, largest_iou, mutual_iou
from flown.progress import bar
from flown.provenance import Row
from flown.weights import WeightBatch
from flown.zoo import Zoo

SUPPORTS = 5  # support sets that share the n samples, so that none is one lucky draw
_PROBE = 500  # images for what only illustrates: trajectory and confusion
_FEW = 10  # samples whose trajectory is decoded and drawn


@dataclass
class Measured:
    """Networks of one method on one task: accuracies (n,) in percent and novelty."""

    val: Tensor
    test: Tensor
    ratio: Tensor | None = None
    iou: Tensor | None = None
    diversity: float | None = None

    def top(self, k: int) -> Tensor:
        """Test accuracies of the k networks that are best on validation images."""
        return self.test[self.val.argsort(descending=True, stable=True)[:k]]


@dataclass
class TaskCard:
    """Everything measured on one task."""

    task: str
    methods: dict[str, Measured]
    on_others: dict[str, float | None] = field(default_factory=dict)
    shuffled: float | None = None
    times: list[float] = field(default_factory=list)
    along: list[float] = field(default_factory=list)
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
    solver: str
    steps: int
    seed: int
    counts: dict[str, dict[str, int]]

    @property
    def confusion(self) -> list[list[float | None]]:
        """Row: generated for, column: tested on; mean accuracy in percent."""
        return [[card.on_others[other] for other in self.tasks] for card in self.tasks.values()]

    def rows(self) -> list[Row]:
        """The card in the schema of `results.json`."""
        return [row for card in self.tasks.values() for row in _rows(card, self.top)]


def report_card(model: Flown, zoo: Zoo, images: Mapping[str, ImageData], *, n: int = 50, top: int = 5,
                shots: int = 5, seed: int = 0, solver: str = "euler",
                steps: int = 100) -> Card:  # fmt: skip
    """Measures a model against its zoo on every task.

    Args:
        images: image data by task, the same as in fitting.
        n: networks generated a task, over `SUPPORTS` support sets; `top` of them are chosen.
    """
    cards, counts = {}, {}
    supports = {task: _supports(images[task], shots, seed) for task in model.tasks}
    with bar("report card", len(model.tasks)) as update:
        for index, task in enumerate(model.tasks):
            cards[task] = _task_card(model, zoo, images, supports, task, n, seed, solver, steps)
            parts = images[task]
            counts[task] = {"train": len(parts.train), "val": len(parts.val),
                            "test": len(parts.test)}  # fmt: skip
            update(index + 1, task)
    return Card(cards, n, top, solver, steps, seed, counts)


def _supports(images: ImageData, shots: int, seed: int) -> list[Support]:
    generator = torch.Generator().manual_seed(seed + 10_007)
    return [
        draw_support(images.train, len(images.classes), shots, generator) for _ in range(SUPPORTS)
    ]


def _sample(model: Flown, supports: list[Support], n: int, seed: int, solver: str, steps: int,
            task: str | None = None, trajectory: bool = False) -> list[Samples]:  # fmt: skip
    """n samples, shared out over the support sets."""
    shares = [len(part) for part in torch.arange(n).chunk(len(supports))]
    return [
        model.sample(some.images, some.labels, share, seed + i, solver, steps, task=task,
                     trajectory=trajectory and i == 0)
        for i, (some, share) in enumerate(zip(supports, shares, strict=False))
    ]  # fmt: skip


def _joined(samples: list[Samples]) -> WeightBatch:
    """One batch of all samples that are of the first one's task."""
    first = samples[0].batch
    return WeightBatch(first.layout, torch.cat([s.batch.vectors for s in samples]))


def _task_card(model: Flown, zoo: Zoo, images: Mapping[str, ImageData],
               supports: Mapping[str, list[Support]], task: str, n: int, seed: int, solver: str,
               steps: int) -> TaskCard:  # fmt: skip
    last = zoo.select(task=task, epochs=[-1])
    train = last.select(split="train").batch(task)
    held_out = last.select(split="held-out").batch(task)
    data = images[task]
    samples = _sample(model, supports[task], n, seed, solver, steps, task, trajectory=True)
    generated = _joined(samples)
    wrong_train = _wrong(train, data.test)
    generator = torch.Generator().manual_seed(seed)
    batches = {"flown": generated, "zoo": train, "zoo-held-out": held_out,
               "reconstruction-train": model.reconstruct(train[:n]),
               "reconstruction-held-out": model.reconstruct(held_out)}  # fmt: skip
    batches |= {name: draw(train, n, generator) for name, draw in BASELINES.items()}
    methods = {}
    for name, batch in batches.items():
        wrong = wrong_train if name == "zoo" else _wrong(batch, data.test)
        val = 100 * (1 - _wrong(batch, data.val).float().mean(dim=1))
        methods[name] = Measured(val, 100 * (1 - wrong.float().mean(dim=1)))
        if name != "zoo":
            methods[name].ratio = l2_ratio(batch.vectors, train.vectors, held_out.vectors)
            methods[name].iou = largest_iou(wrong, wrong_train)
        methods[name].diversity = mutual_iou(wrong)
    card = TaskCard(task, methods, seconds=sum(s.seconds for s in samples), nfe=samples[0].nfe)
    for other in model.tasks:
        card.on_others[other] = _mean_accuracy(generated, images[other])
    others = [t for t in model.tasks if t != task]
    if others:
        shuffled = [
            _joined(_sample(model, supports[other][:1], max(2, n // len(others)), seed, solver,
                            steps, task))
            for other in others
        ]  # fmt: skip
        figures = [_mean_accuracy(batch, data) or 0.0 for batch in shuffled]
        card.shuffled = sum(figures) / len(figures)
    _follow(card, model, samples[0], data)
    card.latents = {"zoo": model.encode(train).flatten(1), "held-out": model.encode(held_out).flatten(1),
                    "samples": torch.cat([s.latents for s in samples]).flatten(1),
                    "source": torch.cat([s.source for s in samples]).flatten(1)}  # fmt: skip
    return card


def _wrong(batch: WeightBatch, split: Split) -> Tensor:
    """Masks (n, N) of wrong predictions."""
    return predictions(batch, split.images) != split.labels


def _mean_accuracy(batch: WeightBatch, data: ImageData) -> float | None:
    """Mean test accuracy on a probe of another task's images; None when class counts differ."""
    if len(batch.layout.task.classes) != len(data.classes):
        return None
    probe = data.test[:_PROBE]
    return float(100 * (1 - _wrong(batch, probe).float().mean()))


def _follow(card: TaskCard, model: Flown, samples: Samples, data: ImageData) -> None:
    """Accuracy of the networks decoded at eleven times on the way from source to weights."""
    assert samples.path is not None
    places = torch.linspace(0, len(samples.path) - 1, 11).round().long()
    for place in places.tolist():
        batch = model.decode(samples.path[place, :_FEW], card.task)
        card.times.append(float(samples.times[place]))
        accuracy = 100 * (1 - _wrong(batch, data.val[:_PROBE]).float().mean())
        card.along.append(float(accuracy))
    card.path = samples.path[:, :_FEW].flatten(2)


def _rows(card: TaskCard, top: int) -> list[Row]:
    def row(method: str, metric: str, values: Tensor, selection: str) -> Row:
        std = float(values.std()) if len(values) > 1 else None
        spread = {"median": float(values.median()), "min": float(values.min()),
                  "max": float(values.max())} if metric == "accuracy" else {}  # fmt: skip
        return {"dataset": card.task, "method": method, "metric": metric,
                "value": float(values.mean()), "std": std, "n": len(values),
                "selection": selection, "epoch": None, "paper": None, **spread}  # fmt: skip

    rows = []
    for name, m in card.methods.items():
        rows.append(row(name, "accuracy", m.test, "all"))
        if len(m.test) > top and not name.startswith("reconstruction"):
            rows.append(row(name, "accuracy", m.top(top), f"val-top{top}-of-{len(m.test)}"))
        if m.ratio is not None and m.iou is not None:
            rows.append(row(name, "l2-ratio", m.ratio, "all"))
            rows.append(row(name, "max-iou", m.iou, "all"))
        if m.diversity is not None:
            rows.append(row(name, "diversity-iou", torch.tensor([m.diversity]), "all"))
    n = len(card.methods["flown"].test)
    for other, value in card.on_others.items():
        if value is not None:
            rows.append({**row("flown", f"accuracy-on-{other}", torch.tensor([value]), "all"), "n": n})
    if card.shuffled is not None:
        rows.append(row("flown-shuffled-context", "accuracy", torch.tensor([card.shuffled]), "all"))
    return rows
