"""Training a zoo: many networks at once, shard by shard, resumable at every epoch.

Each network has its own initialisation and its own data order, both drawn from its seed, so a
shard's result depends on nothing but the recipe and the seeds in it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown import data, nets
from flown.errors import FlownError, TrainingError
from flown.files import load_tensors, prepare_output, read_json, save_tensors, write_json
from flown.layout import Task, WeightLayout
from flown.nets import stacked
from flown.progress import bar
from flown.version import __version__
from flown.zoo.recipes import Recipe
from flown.zoo.recipes import recipe as recipe_by_name
from flown.zoo.store import Row, Zoo, read_rows, write_rows

SHARD = 16  # networks trained together; a shard is what an interruption may cost an epoch of
_MEASURE = 2000  # training images on which the training accuracy is measured


def train(
    recipe: Recipe | str,
    models: int,
    out: Path | str,
    *,
    scale: str = "cpu",
    seed: int = 0,
    held_out: float = 1 / 6,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    images: data.ImageData | None = None,
) -> Zoo:
    """Trains `models` networks by a recipe and writes the zoo.

    Args:
        recipe: a recipe or its name; `scale` is for names.
        held_out: the share of networks (by seed) kept from everything that learns from the zoo.
        images: the data, where `recipe.dataset` is not a name that `flown.data` knows.
        resume: continue a training that was interrupted; it ends with the same weights.

    Raises:
        FlownError: fewer than two models, unknown names, `out` exists, or is another zoo's.
        TrainingError: a network diverged (named by its seed).
    """
    if models < 2:
        raise FlownError(
            f"a zoo needs at least 2 models (one to train on, one held out), got {models}"
        )
    recipe = recipe_by_name(recipe, scale) if isinstance(recipe, str) else recipe
    out = prepare_output(out, overwrite, resume)
    plan = {
        "recipe": recipe.model_dump(mode="json"), "models": models, "seed": seed,
        "held_out": held_out,
    }  # fmt: skip
    if (out / "progress.json").exists() and read_json(out / "progress.json") != plan:
        raise FlownError(f"{out}: holds a zoo begun with another recipe, seed or number of models")
    if resume and (out / "zoo.json").exists():
        return Zoo.open(out)
    images = images or data.load(recipe.dataset)
    layout = layout_for(recipe, images)
    write_json(out / "progress.json", plan)
    _keep_freed_memory()
    shard_of = torch.arange(models).split(SHARD)
    done = recipe.epochs * len(shard_of)
    with bar(f"zoo {recipe.name}", done) as update:
        for index, members in enumerate(shard_of):
            trainer = _Shard(recipe, layout, images, out, index, members.tolist(), seed, device)
            for epoch in trainer.epochs():
                update(index * recipe.epochs + epoch, trainer.note)
    split = _split(models, held_out, seed)
    parts = sorted(out.glob("index-*.jsonl"))
    rows = [
        Row(**{**vars(row), "split": split[row.model]}) for part in parts for row in read_rows(part)
    ]
    about = {"recipes": {layout.task.name: plan["recipe"]}, "seed": seed, "flown": __version__}
    zoo = Zoo.write(out, [layout], rows, about)
    for scratch in [out / "progress.json", *parts]:
        scratch.unlink()
    return zoo


def layout_for(recipe: Recipe, images: data.ImageData) -> WeightLayout:
    """The layout, task metadata included, of the networks that a recipe trains."""
    channels = 1 if recipe.grey else images.train.images.shape[1]
    task = Task(
        name=recipe.dataset, channels=channels, size=nets.INPUT_SIZES[recipe.net],
        mean=recipe.mean, std=recipe.std, classes=images.classes, activation=recipe.activation,
    )  # fmt: skip
    net = nets.build(recipe.net, channels, len(images.classes), recipe.activation)
    return WeightLayout.of(net, recipe.net, task)


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


def _split(models: int, held_out: float, seed: int) -> list[str]:
    count = min(max(1, round(models * held_out)), models - 1) if held_out > 0 else 0
    order = torch.randperm(models, generator=torch.Generator().manual_seed(seed)).tolist()
    return ["held-out" if model in set(order[:count]) else "train" for model in range(models)]


def _keep_freed_memory() -> None:
    """Asks glibc to keep freed blocks: returning activations to the kernel at every step costs a third."""
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library: nothing but time is lost
        return


class _Shard:
    """The networks `members` of a zoo, trained together."""

    def __init__(self, recipe: Recipe, layout: WeightLayout, images: data.ImageData, out: Path,
                 index: int, members: list[int], seed: int, device: str) -> None:  # fmt: skip
        self.recipe, self.layout, self.out, self.members = recipe, layout, out, members
        self.stem = f"{index:05d}"
        self.seeds = [seed * 1_000_003 + model for model in members]
        self.device = torch.device(device)
        self.note = ""
        self.images, self.index = images, index
        task = layout.task
        self.net = nets.build(layout.net, task.channels, len(task.classes), task.activation)

    def epochs(self) -> Iterator[int]:
        """Trains, yielding after every epoch; skips what is on disk already."""
        if (self.out / f"index-{self.stem}.jsonl").exists():
            yield self.recipe.epochs
            return
        task, train = self.layout.task, self.images.train
        limit = self.recipe.max_train_images
        self.x = task.preprocess(train.images[:limit]).contiguous().to(self.device)
        self.y = train.labels[:limit].to(self.device)
        self.val_x = task.preprocess(self.images.val.images).to(self.device)
        self.val_y = self.images.val.labels.to(self.device)
        starts = [initial(self.layout, self.recipe.init, seed) for seed in self.seeds]
        self.tensors = {
            name: torch.stack([start[name] for start in starts]).to(self.device).requires_grad_()
            for name in self.layout.names
        }
        self.optimizer = torch.optim.Adam(
            self.tensors.values(), self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay, fused=True,
        )  # fmt: skip
        kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for epoch in range(self._restore(kept) + 1, self.recipe.epochs + 1):
            self._epoch(epoch)
            if epoch in self.recipe.kept:
                accuracies = (
                    self._accuracy(self.x[:_MEASURE], self.y[:_MEASURE]),
                    self._accuracy(self.val_x, self.val_y),
                )
                kept[epoch] = (self._vectors(), *accuracies)
                self.note = f"validation accuracy {float(accuracies[1].mean()):.1f} %"
            self._checkpoint(epoch, kept)
            yield epoch
        self._finish(kept)

    def _epoch(self, epoch: int) -> None:
        size, n = self.recipe.batch_size, len(self.x)
        orders = torch.stack([
            torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000 + epoch))
            for seed in self.seeds
        ]).to(self.device)  # fmt: skip
        total = torch.zeros(len(self.seeds), device=self.device)
        for start in range(0, n - n % size, size):
            rows = orders[:, start : start + size]  # (n, B)
            logits = stacked.forward(self.net, self.tensors, self.x[rows])
            labels = self.y[rows]
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            losses = loss.unflatten(0, labels.shape).mean(dim=1)  # (n,)
            self.optimizer.zero_grad()
            losses.sum().backward()
            self.optimizer.step()
            total += losses.detach()
        if not torch.isfinite(total).all():
            seed = self.seeds[int((~torch.isfinite(total)).nonzero()[0])]
            raise TrainingError(
                f"{self.recipe.name}: the network of seed {seed} diverged in epoch {epoch}; "
                "lower the learning rate"
            )

    @torch.no_grad()
    def _accuracy(self, x: Tensor, y: Tensor) -> Tensor:
        hits = [
            (stacked.forward(self.net, self.tensors, some).argmax(-1) == labels).sum(dim=1)
            for some, labels in zip(x.split(250), y.split(250), strict=True)
        ]
        return 100 * torch.stack(hits).sum(dim=0).cpu() / len(y)

    def _vectors(self) -> Tensor:
        return self.layout.pack(self.tensors).detach().cpu()

    def _checkpoint(self, epoch: int, kept: dict[int, tuple[Tensor, Tensor, Tensor]]) -> None:
        state = {f"weights.{k}": v for k, v in self.tensors.items()}
        for name, tensor in self.tensors.items():
            for key, value in self.optimizer.state[tensor].items():
                state[f"{key}.{name}"] = value
        for e, (vectors, train_accuracy, val_accuracy) in kept.items():
            state |= {f"kept.{e}": vectors, f"train.{e}": train_accuracy, f"val.{e}": val_accuracy}
        save_tensors(self.out / f"progress-{self.stem}.safetensors", state, {"epoch": str(epoch)})

    def _restore(self, kept: dict[int, tuple[Tensor, Tensor, Tensor]]) -> int:
        path = self.out / f"progress-{self.stem}.safetensors"
        if not path.exists():
            return 0
        state, about = load_tensors(path)
        for name, tensor in self.tensors.items():
            tensor.data.copy_(state[f"weights.{name}"])
            self.optimizer.state[tensor] = {
                "step": state[f"step.{name}"],
                **{k: state[f"{k}.{name}"].to(self.device) for k in ("exp_avg", "exp_avg_sq")},
            }
        for e in self.recipe.kept:
            if f"kept.{e}" in state:
                kept[e] = state[f"kept.{e}"], state[f"train.{e}"], state[f"val.{e}"]
        return int(about["epoch"])

    def _finish(self, kept: dict[int, tuple[Tensor, Tensor, Tensor]]) -> None:
        """Shard first, its index after it: the index says that the shard is whole."""
        shard = f"weights-{self.stem}.safetensors"
        vectors = torch.cat([entry[0] for entry in kept.values()])
        save_tensors(self.out / shard, self.layout.unpack(vectors))
        steps = len(self.x) // self.recipe.batch_size
        rows = [
            Row(
                task=self.layout.task.name, model=model, seed=seed, epoch=epoch, step=epoch * steps,
                split="", train_accuracy=round(float(train[i]), 3),
                val_accuracy=round(float(val[i]), 3), shard=shard, offset=k * len(self.members) + i,
            )
            for k, (epoch, (_, train, val)) in enumerate(kept.items())
            for i, (model, seed) in enumerate(zip(self.members, self.seeds, strict=True))
        ]  # fmt: skip
        write_rows(self.out / f"index-{self.stem}.jsonl", rows)
        (self.out / f"progress-{self.stem}.safetensors").unlink(missing_ok=True)
