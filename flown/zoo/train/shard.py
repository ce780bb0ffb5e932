"""A shard: networks trained together and stored in one file, resumable at every epoch.

Each network has its own initialisation and its own data order, both drawn from its seed, and
networks do not affect each other: recipe and seeds alone decide a shard's bits. Networks of a
subset start at their base and differ in their data orders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from flown import nets
from flown.base.errors import TrainingError
from flown.base.files import load_tensors, save_tensors
from flown.nets.batched import batchnorm, stacked
from flown.tasks import ImageData, ManyClass, TaskTable
from flown.weights import construction
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout
from flown.zoo.rows import Row, checksum, write_rows
from flown.zoo.train.base import load_base
from flown.zoo.train.lessons import lessons
from flown.zoo.train.recipes import Recipe
from flown.zoo.train.trainers import Trainer, prepared, trainer

SIZE = 16  # networks a shard; an interruption costs them an epoch
MANY = 512  # of random tasks, whose epochs are short
_MEASURE = 2000  # training images on which the training accuracy is measured
_NAMES = "kept", "train", "val"  # names of what is kept of a step, in this order
Kept: TypeAlias = dict[int, tuple[Tensor, ...]]  # step -> vectors (n, D), accuracies (n,) and (n,)


@dataclass(frozen=True)
class Plan:
    """The settings that decide a zoo's bits."""

    recipe: Recipe
    models: int
    seed: int
    held_out: float

    @property
    def shards(self) -> list[list[int]]:
        """The models of each shard."""
        size = SIZE if self.recipe.tasks is None else MANY
        return [part.tolist() for part in torch.arange(self.models).split(size)]

    @property
    def base_seed(self) -> int:
        """The seed of the base network of a subset zoo; no other network has it."""
        return self.seed * 1_000_003 + 1_000_002

    def model_seed(self, model: int) -> int:
        return self.seed * 1_000_003 + self.recipe.repetition(model)

    def json(self) -> dict[str, object]:
        recipe = self.recipe.model_dump(mode="json")
        return {
            "recipe": recipe,
            "models": self.models,
            "seed": self.seed,
            "held_out": self.held_out,
        }


def initial(layout: WeightLayout, init: str, seed: int) -> dict[str, Tensor]:
    """One network's fresh parameters by a recipe's rule, from its seed.

    `default` takes the values of the network's constructor, as numbers of shape () always do.
    """
    ruled = init != "default" or layout.net in nets.DEFAULT_INITIALISED
    made: dict[str, Tensor] = {}
    if not ruled or () in layout.shapes:
        net = construction.build_seeded(layout, seed)
        made = {name: parameter.detach() for name, parameter in net.named_parameters()}
    if not ruled:
        return {name: made[name] for name in layout.names}
    generator = torch.Generator().manual_seed(seed)
    tensors, fan_in, shift = {}, 1, ""
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if not shape:
            tensors[name] = made[name]
            continue
        value = torch.empty(shape)
        if len(shape) > 1:
            fan_in = value[0].numel()
        elif name.endswith("weight"):  # of a normalisation
            tensors[name], shift = value.fill_(1), f"{name.removesuffix('weight')}bias"
            continue
        if name == shift:
            value.zero_()
        elif (
            init == "default"
        ):  # as PyTorch's layers: kaiming_uniform with a = sqrt(5), biases alike
            value.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
        elif len(shape) == 1:
            value.fill_(0.01)
        elif init == "uniform":
            value.uniform_(0, 1, generator=generator)
        else:
            nn.init.kaiming_uniform_(value, generator=generator)
        tensors[name] = value
    return tensors


class Shard:
    """The networks `members` of a zoo, trained together."""

    def __init__(
        self,
        plan: Plan,
        layout: WeightLayout,
        images: ImageData | ManyClass,
        out: Path,
        index: int,
        device: str = "cpu",
    ) -> None:
        self.plan, self.recipe, self.layout, self.out = plan, plan.recipe, layout, out
        self.members, self.device = plan.shards[index], device
        self.note, self.lessons = "", lessons(self.recipe, images, plan.seed)
        self.weights, self.index = weights_file(out, index), index_file(out, index)
        self.progress = out / f"progress-{index:05d}.safetensors"
        self.seeds = [plan.model_seed(model) for model in self.members]
        self.steps = self.lessons.count // self.recipe.batch_size  # an epoch
        self.start: Tensor | None = None
        self.frozen: dict[str, Tensor] | None = None
        self.shared = construction.drawn_once(layout, plan.base_seed)  # buffers of whole networks
        if self.recipe.subset is not None:
            self.start, self.frozen = load_base(layout, out)
        self.net = self._trained()

    def _trained(self) -> nn.Module:
        """The network in training mode; frozen layers stay in eval mode."""
        net = construction.fill(self.layout.architecture.build(), self.shared).train(
            self.frozen is None
        )
        norms = batchnorm.layers(net)
        varying = [x for x in norms if {f"{x}.weight", f"{x}.bias"} & set(self.layout.names)]
        return batchnorm.by_batch(net, varying if self.frozen is not None else norms)

    @property
    def done(self) -> bool:
        return self.index.exists()

    def epochs(self) -> Iterator[int]:
        """Trains, yielding after every epoch; skips what is on disk already."""
        if self.done:
            yield self.recipe.epochs
            return
        # Networks with frozen tensors are large, and so are their inputs.
        self.lessons.prepare(self.layout.architecture if self.frozen is None else None)
        variants = [self.recipe.variant(model) for model in self.members]
        engine = trainer(
            self.net,
            self.layout,
            self._starts(variants),
            self.lessons.train,
            self.recipe.batch_size,
            [v.learning_rate for v in variants],
            [v.weight_decay for v in variants],
            self.device,
            self.frozen,
        )
        kept: Kept = {}
        for epoch in range(self._restore(engine, kept) + 1, self._last + 1):
            for step in self._epoch(engine, epoch):
                kept[step] = (engine.vectors.cpu().clone(),)
                if self.frozen is None:
                    kept[step] += self._accuracies(engine.vectors)
                    self.note = f"validation accuracy {float(kept[step][2].mean()):.1f} %"
            self._checkpoint(engine, epoch, kept)
            yield epoch
        if self.frozen is not None:  # together, so that frozen layers run once for all checkpoints
            vectors = torch.cat([entry[0] for entry in kept.values()])
            found = self._accuracies(vectors.to(self.device))
            split = zip(*(accuracy.split(len(self.members)) for accuracy in found), strict=True)
            kept = {step: (kept[step][0], *some) for step, some in zip(kept, split, strict=True)}
        self._finish(kept)
        if self._last < self.recipe.epochs:
            yield self.recipe.epochs

    @property
    def _last(self) -> int:
        """The epoch after which nothing is kept."""
        return -(-self.recipe.kept_steps(self.steps)[-1] // self.steps)

    def _starts(self, variants: Sequence[Recipe]) -> Tensor:
        """The weights at which training begins, (n, D)."""
        if self.start is not None:
            return self.start.repeat(len(variants), 1)
        starts = [
            initial(self.layout, variant.init, seed)
            for variant, seed in zip(variants, self.seeds, strict=True)
        ]
        return self.layout.pack({k: torch.stack([s[k] for s in starts]) for k in starts[0]})

    def _epoch(self, engine: Trainer, epoch: int) -> Iterator[int]:
        """Trains an epoch and stops at each step whose weights are kept."""
        n, first, size = self.lessons.count, (epoch - 1) * self.steps, self.recipe.batch_size
        seeds = [self.plan.seed] * len(self.seeds) if self.recipe.shared_order else self.seeds
        orders = torch.stack(
            [
                torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000 + epoch))
                for seed in seeds
            ]
        )
        known = [self.lessons.lesson(model, "train") for model in self.members]
        pairs = list(zip(known, orders, strict=True))
        rows = torch.stack([lesson.rows[order] for lesson, order in pairs])
        labels = torch.stack([lesson.labels[order] for lesson, order in pairs])
        stops = [s for s in self.recipe.kept_steps(self.steps) if first < s <= first + self.steps]
        done = first
        for stop in sorted({*stops, first + self.steps}):
            part = slice((done - first) * size, (stop - first) * size)
            losses = engine.run(rows[:, part], labels[:, part], done)
            sound = torch.isfinite(losses) & torch.isfinite(engine.vectors.cpu()).all(dim=1)
            if not sound.all():
                seed = self.seeds[int((~sound).nonzero()[0])]
                raise TrainingError(
                    f"{self.recipe.name}: the network of seed {seed} diverged in epoch {epoch}; "
                    "lower the learning rate"
                )
            done = stop
            if stop in stops:
                yield stop

    @torch.no_grad()
    def _accuracies(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """Training and validation accuracies (n,), BatchNorm calibrated on batches like training's."""
        batch = WeightBatch(self.layout, vectors, frozen=self.frozen or self.shared)
        if self.lessons.seen is None:
            return tuple(self._own_accuracies(batch, part) for part in ("train", "val"))
        batch = batch.calibrated(self.lessons.seen, batch_size=self.recipe.batch_size)
        found = []
        for name, pool in (("train", self.lessons.train[:_MEASURE]), ("val", self.lessons.val)):
            labels = self.lessons.lesson(0, name).labels[: len(pool)].to(self.device)
            hits = [
                (batch.logits(self._seen(images)).argmax(-1) == wanted).sum(dim=1)
                for images, wanted in zip(pool.split(250), labels.split(250), strict=True)
            ]
            found.append(100 * torch.stack(hits).sum(dim=0).cpu() / len(labels))
        return tuple(found)

    def _own_accuracies(self, batch: WeightBatch, part: str) -> Tensor:
        """Accuracies (n,) of networks each on images of its own task."""
        pool, found = getattr(self.lessons, part), []
        for start in range(0, len(batch), SIZE):
            chosen = slice(start, start + SIZE)
            members = self.members[chosen]
            known = [self.lessons.lesson(model, part) for model in members]
            images = self._seen(pool[torch.stack([lesson.rows for lesson in known])])
            labels = torch.stack([lesson.labels for lesson in known]).to(self.device)
            tensors = self.layout.unpack(batch.vectors[chosen])
            logits = stacked.forward(batch.network, tensors, images)
            found.append(100 * (logits.argmax(-1) == labels).float().mean(dim=1).cpu())
        return torch.cat(found)

    def _seen(self, images: Tensor) -> Tensor:
        return prepared(self.layout.architecture, images.to(self.device))

    def _checkpoint(self, engine: Trainer, epoch: int, kept: Kept) -> None:
        state = {"vectors": engine.vectors, "moments": engine.moments}
        for step, entry in kept.items():
            state |= {f"{name}.{step}": tensor for name, tensor in zip(_NAMES, entry, strict=False)}
        save_tensors(self.progress, state, {"epoch": str(epoch)})

    def _restore(self, engine: Trainer, kept: Kept) -> int:
        if not self.progress.exists():
            return 0
        state, about = load_tensors(self.progress)
        engine.vectors.copy_(state["vectors"])
        engine.moments.copy_(state["moments"])
        for step in self.recipe.kept_steps(self.steps):
            names = [f"{name}.{step}" for name in _NAMES]
            if names[0] in state:
                kept[step] = tuple(state[name] for name in names if name in state)
        return int(about["epoch"])

    def _finish(self, kept: Kept) -> None:
        """Writes the weights, then their index: an index means that the shard is complete."""
        name = self.weights.name
        save_tensors(self.weights, self.layout.unpack(torch.cat([e[0] for e in kept.values()])))
        rows = [
            Row(
                task=self.lessons.task(model).id,
                model=model,
                seed=self.seeds[i],
                epoch=_epoch(step, self.steps),
                step=step,
                split="",
                train_accuracy=round(float(train[i]), 3),
                val_accuracy=round(float(val[i]), 3),
                shard=name,
                offset=k * len(self.members) + i,
                checksum=checksum(vectors[i]),
                grid=self.recipe.cell(model),
            )
            for k, (step, (vectors, train, val)) in enumerate(kept.items())
            for i, model in enumerate(self.members)
        ]
        write_rows(self.index, rows)
        self.progress.unlink(missing_ok=True)


def weights_file(out: Path, index: int) -> Path:
    return out / f"weights-{index:05d}.safetensors"


def index_file(out: Path, index: int) -> Path:
    return out / f"index-{index:05d}.jsonl"


def _epoch(step: int, steps: int) -> float | int:
    """Whole epochs as integers; 2.5 is the middle of the third."""
    return step // steps if step % steps == 0 else round(step / steps, 4)


def splits(models: int, seed: int, held_out: float) -> Sequence[str]:
    """The split of each model, `train` or `held-out`, by the zoo's seed."""
    count = min(max(1, round(models * held_out)), models - 1) if held_out > 0 else 0
    order = torch.randperm(models, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:count])
    return ["held-out" if model in chosen else "train" for model in range(models)]


def split_rows(plan: Plan, rows: Sequence[Row], tasks: TaskTable) -> list[Row]:
    """The rows of a zoo with their split: by random task, by model, or by time for a lone network.

    The last checkpoints of a lone network are held out: neighbours in time are near-duplicates, and
    a random draw would put them on both sides.
    """
    if plan.recipe.tasks is not None:
        return [
            row._replace(split="train" if tasks[row.task].split == "train" else "held-out")
            for row in rows
        ]
    if plan.models > 1:
        split = splits(plan.models, plan.seed, plan.held_out)
        return [row._replace(split=split[row.model]) for row in rows]
    steps = sorted({row.step for row in rows})
    count = min(max(1, round(len(steps) * plan.held_out)), len(steps) - 1)
    late = steps[len(steps) - count :] if plan.held_out > 0 else []
    return [row._replace(split="held-out" if row.step in late else "train") for row in rows]
