"""A shard: networks trained together and stored in one file, resumable at every epoch.

Each network has its own initialisation and its own data order, both drawn from its seed, and no
network meets another: a shard's bits depend on nothing but the recipe and the seeds in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flown import nets
from flown.data import ImageData
from flown.errors import TrainingError
from flown.files import load_tensors, save_tensors
from flown.layout import WeightLayout
from flown.nets import stacked
from flown.zoo.recipes import Recipe
from flown.zoo.store import Row, checksum, write_rows
from flown.zoo.trainers import Trainer, trainer

SIZE = 16  # networks a shard: what an interruption may cost an epoch of
_MEASURE = 2000  # training images on which the training accuracy is measured


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

    def model_seed(self, model: int) -> int:
        return self.seed * 1_000_003 + self.recipe.repetition(model)

    def json(self) -> dict[str, object]:
        recipe = self.recipe.model_dump(mode="json")
        return {"recipe": recipe, "models": self.models, "seed": self.seed,
                "held_out": self.held_out}  # fmt: skip


def initial(layout: WeightLayout, init: str, seed: int) -> dict[str, Tensor]:
    """One network's fresh parameters by a recipe's rule, from its seed."""
    generator = torch.Generator().manual_seed(seed)
    tensors, fan_in = {}, 1
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        value = torch.empty(shape)
        if len(shape) > 1:
            fan_in = value[0].numel()
        if init == "default":  # PyTorch's: kaiming_uniform with a = sqrt(5), biases alike
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

    def __init__(self, plan: Plan, layout: WeightLayout, images: ImageData, out: Path,
                 index: int, device: str = "cpu") -> None:  # fmt: skip
        self.plan, self.recipe, self.layout, self.out = plan, plan.recipe, layout, out
        self.members, self.device = plan.shards[index], device
        self.stem, self.note, self.images = f"{index:05d}", "", images
        self.seeds = [plan.model_seed(model) for model in self.members]
        limit = self.recipe.max_train_images
        self.train = images.train.images[:limit], images.train.labels[:limit]
        self.steps = len(self.train[0]) // self.recipe.batch_size  # an epoch
        self.net = nets.build_for(layout)

    @property
    def done(self) -> bool:
        return (self.out / f"index-{self.stem}.jsonl").exists()

    def epochs(self) -> Iterator[int]:
        """Trains, yielding after every epoch; skips what is on disk already."""
        if self.done:
            yield self.recipe.epochs
            return
        task = self.layout.task
        x, y = task.preprocess(self.train[0]).contiguous(), self.train[1]
        val = task.preprocess(self.images.val.images), self.images.val.labels
        variants = [self.recipe.variant(model) for model in self.members]
        starts = [
            initial(self.layout, variant.init, seed)
            for variant, seed in zip(variants, self.seeds, strict=True)
        ]
        vectors = self.layout.pack({k: torch.stack([s[k] for s in starts]) for k in starts[0]})
        engine = trainer(self.net, self.layout, vectors, x, y, self.recipe.batch_size,
                         [v.learning_rate for v in variants], [v.weight_decay for v in variants],
                         self.device)  # fmt: skip
        kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for epoch in range(self._restore(engine, kept) + 1, self.recipe.epochs + 1):
            for step in self._epoch(engine, epoch):
                some = engine.vectors[:, :]
                accuracies = (self._accuracy(some, x[:_MEASURE], y[:_MEASURE]),
                              self._accuracy(some, *val))  # fmt: skip
                kept[step] = (some.cpu().clone(), *accuracies)
                self.note = f"validation accuracy {float(accuracies[1].mean()):.1f} %"
            self._checkpoint(engine, epoch, kept)
            yield epoch
        self._finish(kept)

    def _epoch(self, engine: Trainer, epoch: int) -> Iterator[int]:
        """Trains an epoch, stopping at each step whose weights are to be kept."""
        n, first, size = len(self.train[0]), (epoch - 1) * self.steps, self.recipe.batch_size
        seeds = [self.plan.seed] * len(self.seeds) if self.recipe.shared_order else self.seeds
        orders = torch.stack([
            torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000 + epoch))
            for seed in seeds
        ])  # fmt: skip
        stops = [s for s in self.recipe.kept_steps(self.steps) if first < s <= first + self.steps]
        done = first
        for stop in sorted({*stops, first + self.steps}):
            part = orders[:, (done - first) * size : (stop - first) * size]
            losses = engine.run(part, done)
            if not torch.isfinite(losses).all():
                seed = self.seeds[int((~torch.isfinite(losses)).nonzero()[0])]
                raise TrainingError(
                    f"{self.recipe.name}: the network of seed {seed} diverged in epoch {epoch}; "
                    "lower the learning rate"
                )
            done = stop
            if stop in stops:
                yield stop

    @torch.no_grad()
    def _accuracy(self, vectors: Tensor, x: Tensor, y: Tensor) -> Tensor:
        tensors, device = self.layout.unpack(vectors), vectors.device
        hits = [
            (stacked.forward(self.net, tensors, some).argmax(-1) == labels).sum(dim=1)
            for some, labels in zip(x.to(device).split(250), y.to(device).split(250), strict=True)
        ]
        return 100 * torch.stack(hits).sum(dim=0).cpu() / len(y)

    def _checkpoint(self, engine: Trainer, epoch: int,
                    kept: dict[int, tuple[Tensor, Tensor, Tensor]]) -> None:  # fmt: skip
        state = {"vectors": engine.vectors, "moments": engine.moments}
        for step, (vectors, train, val) in kept.items():
            state |= {f"kept.{step}": vectors, f"train.{step}": train, f"val.{step}": val}
        save_tensors(self.out / f"progress-{self.stem}.safetensors", state, {"epoch": str(epoch)})

    def _restore(self, engine: Trainer, kept: dict[int, tuple[Tensor, Tensor, Tensor]]) -> int:
        path = self.out / f"progress-{self.stem}.safetensors"
        if not path.exists():
            return 0
        state, about = load_tensors(path)
        engine.vectors.copy_(state["vectors"])
        engine.moments.copy_(state["moments"])
        for step in self.recipe.kept_steps(self.steps):
            if f"kept.{step}" in state:
                kept[step] = state[f"kept.{step}"], state[f"train.{step}"], state[f"val.{step}"]
        return int(about["epoch"])

    def _finish(self, kept: dict[int, tuple[Tensor, Tensor, Tensor]]) -> None:
        """Weights first, their index after them: the index says that the shard is whole."""
        name = f"weights-{self.stem}.safetensors"
        save_tensors(self.out / name, self.layout.unpack(torch.cat([e[0] for e in kept.values()])))
        rows = [
            Row(task=self.layout.task.name, model=model, seed=self.seeds[i],
                epoch=_epoch(step, self.steps), step=step, split="",
                train_accuracy=round(float(train[i]), 3), val_accuracy=round(float(val[i]), 3),
                shard=name, offset=k * len(self.members) + i, checksum=checksum(vectors[i]),
                grid=self.recipe.cell(model))
            for k, (step, (vectors, train, val)) in enumerate(kept.items())
            for i, model in enumerate(self.members)
        ]  # fmt: skip
        write_rows(self.out / f"index-{self.stem}.jsonl", rows)
        (self.out / f"progress-{self.stem}.safetensors").unlink(missing_ok=True)


def _epoch(step: int, steps: int) -> float | int:
    """Whole epochs as integers; 2.5 is the middle of the third."""
    return step // steps if step % steps == 0 else round(step / steps, 4)


def splits(plan: Plan) -> Sequence[str]:
    """The split of each model, `train` or `held-out`, by the zoo's seed."""
    models = plan.models
    count = min(max(1, round(models * plan.held_out)), models - 1) if plan.held_out > 0 else 0
    order = torch.randperm(models, generator=torch.Generator().manual_seed(plan.seed)).tolist()
    held_out = set(order[:count])
    return ["held-out" if model in held_out else "train" for model in range(models)]
