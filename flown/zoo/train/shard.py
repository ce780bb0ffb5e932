"""A shard: networks trained together and stored in one file, resumable at every epoch.

Each network has its own initialisation and its own data order, both drawn from its seed, and no
network meets another: a shard's bits depend on nothing but the recipe and the seeds in it. Networks
of a subset begin at their base, and have their data orders to differ by.
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
from flown.nets.batched import batchnorm
from flown.tasks import ImageData
from flown.weights import construction
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout
from flown.zoo.rows import Row, checksum, write_rows
from flown.zoo.train.base import load_base
from flown.zoo.train.recipes import Recipe
from flown.zoo.train.trainers import Trainer, prepared, trainer

SIZE = 16  # networks a shard: what an interruption may cost an epoch of
_MEASURE = 2000  # training images on which the training accuracy is measured
_NAMES = "kept", "train", "val"  # of what is kept of a step, in files and in this order
Kept: TypeAlias = dict[int, tuple[Tensor, ...]]  # step -> vectors (n, D), accuracies (n,) and (n,)


@dataclass(frozen=True)
class Plan:
    """Everything that decides a zoo's bits."""

    recipe: Recipe
    models: int
    seed: int
    held_out: float

    @property
    def shards(self) -> list[list[int]]:
        """The models of each shard."""
        return [part.tolist() for part in torch.arange(self.models).split(SIZE)]

    @property
    def base_seed(self) -> int:
        """The seed of the base network of a subset zoo: none of its networks'."""
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

    `default` is what the network's own constructor gives; a number of shape () always is.
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
        images: ImageData,
        out: Path,
        index: int,
        device: str = "cpu",
    ) -> None:
        self.plan, self.recipe, self.layout, self.out = plan, plan.recipe, layout, out
        self.members, self.device = plan.shards[index], device
        self.note, self.images = "", images
        self.weights, self.index = weights_file(out, index), index_file(out, index)
        self.progress = out / f"progress-{index:05d}.safetensors"
        self.seeds = [plan.model_seed(model) for model in self.members]
        limit = self.recipe.max_train_images
        self.train = images.train.images[:limit], images.train.labels[:limit]
        self.steps = len(self.train[0]) // self.recipe.batch_size  # an epoch
        self.start: Tensor | None = None
        self.rest: dict[str, Tensor] | None = None
        self.shared = construction.drawn_once(layout, plan.base_seed)  # buffers of whole networks
        if self.recipe.subset is not None:
            self.start, self.rest = load_base(layout, out)
        self.net = self._trained()

    def _trained(self) -> nn.Module:
        """The network in training mode; of a frozen rest no layer is in it."""
        net = construction.fill(self.layout.build(), self.shared).train(self.rest is None)
        norms = batchnorm.layers(net)
        own = [x for x in norms if {f"{x}.weight", f"{x}.bias"} & set(self.layout.names)]
        return batchnorm.by_batch(net, own if self.rest is not None else norms)

    @property
    def done(self) -> bool:
        return self.index.exists()

    def epochs(self) -> Iterator[int]:
        """Trains, yielding after every epoch; skips what is on disk already."""
        if self.done:
            yield self.recipe.epochs
            return
        (x, y), val = self.train, (self.images.val.images, self.images.val.labels)
        if self.rest is None:  # networks with a frozen rest are large, and so are their inputs
            x, val = self._prepared(x), (self._prepared(val[0]), val[1])
        variants = [self.recipe.variant(model) for model in self.members]
        engine = trainer(
            self.net,
            self.layout,
            self._starts(variants),
            x,
            y,
            self.recipe.batch_size,
            [v.learning_rate for v in variants],
            [v.weight_decay for v in variants],
            self.device,
            self.rest,
        )
        parts = (x[:_MEASURE], y[:_MEASURE]), val
        kept: Kept = {}
        for epoch in range(self._restore(engine, kept) + 1, self._last + 1):
            for step in self._epoch(engine, epoch):
                kept[step] = (engine.vectors.cpu().clone(),)
                if self.rest is None:
                    kept[step] += self._accuracies(engine.vectors, parts)
                    self.note = f"validation accuracy {float(kept[step][2].mean()):.1f} %"
            self._checkpoint(engine, epoch, kept)
            yield epoch
        if self.rest is not None:  # at once: what is frozen then runs once for all checkpoints
            vectors = torch.cat([entry[0] for entry in kept.values()])
            found = self._accuracies(vectors.to(self.device), parts)
            split = zip(*(accuracy.split(len(self.members)) for accuracy in found), strict=True)
            kept = {step: (kept[step][0], *some) for step, some in zip(kept, split, strict=True)}
        self._finish(kept)
        if self._last < self.recipe.epochs:
            yield self.recipe.epochs

    @property
    def _last(self) -> int:
        """The epoch after which nothing is kept."""
        return -(-self.recipe.kept_steps(self.steps)[-1] // self.steps)

    def _prepared(self, images: Tensor) -> Tensor:
        return self.layout.task.preprocess(images).contiguous()

    def _starts(self, variants: Sequence[Recipe]) -> Tensor:
        """Where the networks begin, (n, D)."""
        if self.start is not None:
            return self.start.repeat(len(variants), 1)
        starts = [
            initial(self.layout, variant.init, seed)
            for variant, seed in zip(variants, self.seeds, strict=True)
        ]
        return self.layout.pack({k: torch.stack([s[k] for s in starts]) for k in starts[0]})

    def _epoch(self, engine: Trainer, epoch: int) -> Iterator[int]:
        """Trains an epoch, stopping at each step whose weights are to be kept."""
        n, first, size = len(self.train[0]), (epoch - 1) * self.steps, self.recipe.batch_size
        seeds = [self.plan.seed] * len(self.seeds) if self.recipe.shared_order else self.seeds
        orders = torch.stack(
            [
                torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000 + epoch))
                for seed in seeds
            ]
        )
        stops = [s for s in self.recipe.kept_steps(self.steps) if first < s <= first + self.steps]
        done = first
        for stop in sorted({*stops, first + self.steps}):
            part = orders[:, (done - first) * size : (stop - first) * size]
            losses = engine.run(part, done)
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
    def _accuracies(
        self, vectors: Tensor, parts: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, ...]:
        """Accuracies (n,) on each part, BatchNorm calibrated on batches like those of training."""
        bare = WeightBatch(self.layout, vectors, rest=self.rest or self.shared)
        batch = bare.calibrated(self.train[0], batch_size=self.recipe.batch_size)
        found = []
        for x, y in parts:
            hits = [
                (batch.logits(self._seen(some)).argmax(-1) == labels).sum(dim=1)
                for some, labels in zip(x.split(250), y.to(self.device).split(250), strict=True)
            ]
            found.append(100 * torch.stack(hits).sum(dim=0).cpu() / len(y))
        return tuple(found)

    def _seen(self, images: Tensor) -> Tensor:
        return prepared(self.layout.task, images.to(self.device))

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
        """Weights first, their index after them: the index says that the shard is whole."""
        name = self.weights.name
        save_tensors(self.weights, self.layout.unpack(torch.cat([e[0] for e in kept.values()])))
        rows = [
            Row(
                task=self.layout.task.name,
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


def split_rows(plan: Plan, rows: Sequence[Row]) -> list[Row]:
    """The rows of a zoo with their split: by model, or by time where there is but one.

    Of a lone network the last checkpoints are held out. Neighbours in time are near-duplicates: a
    draw would put one on either side.
    """
    if plan.models > 1:
        split = splits(plan.models, plan.seed, plan.held_out)
        return [row._replace(split=split[row.model]) for row in rows]
    steps = sorted({row.step for row in rows})
    count = min(max(1, round(len(steps) * plan.held_out)), len(steps) - 1)
    late = steps[len(steps) - count :] if plan.held_out > 0 else []
    return [row._replace(split="held-out" if row.step in late else "train") for row in rows]
