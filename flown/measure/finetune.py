"""Training the networks of a batch further, all at once, on any images (FLoWN 3.1, Table 3).

Networks are trained as a zoo's are (`flown.zoo.train.trainers`), from their own weights and with Adam's
moments at zero. The data order of network i follows from the seed and i alone: two batches that are
fine-tuned with one seed see the same images in the same order, and freshly initialised networks
become, bit for bit, what a zoo's recipe makes of them.

    OUT.progress.safetensors   after every epoch, until all is done
    OUT                        the networks, `WeightBatch`'s file
    OUT with suffix .json      losses and accuracies by epoch; written last
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from torch import Tensor

from flown.base.config import Config
from flown.base.errors import FlownError, TrainingError
from flown.base.files import load_tensors, read_json, save_tensors, write_json
from flown.base.memory import check_fits
from flown.base.output import OutputFile
from flown.base.progress import bar
from flown.measure.evaluate import evaluate
from flown.nets.batched import batchnorm
from flown.tasks import ImageData, Task, in_order
from flown.version import __version__
from flown.weights import construction
from flown.weights.batch import WeightBatch
from flown.zoo.rows import checksum
from flown.zoo.train.trainers import trainer

FORMAT = "flown-finetune-1"
_PARTS = "loss", "val", "test"


class FinetuneConfig(Config):
    """How networks are trained further; times are in epochs, broken ones too.

    The rate rises linearly over `warmup` and then stays (`constant`), falls to zero along a cosine
    (`cosine`) or is multiplied by `gamma` at each of `milestones` (`piecewise`). `weight_decay` is
    added to the gradient. Validation images are measured after every epoch, test images at the end
    and at the epochs `test_at` (0: before training).
    """

    epochs: int = 25
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "piecewise"] = "constant"
    warmup: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    weight_decay: float = 0.0
    batch_size: int = 32
    max_train_images: Optional[int] = None
    test_at: tuple[int, ...] = ()
    seed: int = 0

    def check(self) -> None:
        """Raises FlownError for numbers that mean nothing."""
        limit = 1 if self.max_train_images is None else self.max_train_images
        if min(self.epochs, self.batch_size, limit) < 1:
            raise FlownError("finetune: epochs, batch_size and max_train_images must be 1 or more")
        if not self.learning_rate > 0 or self.weight_decay < 0 or self.warmup < 0:
            raise FlownError(
                "finetune: learning_rate must be above 0, weight_decay and warmup 0 or more"
            )
        if (self.schedule == "piecewise") != bool(self.milestones):
            raise FlownError(
                f"finetune: schedule {self.schedule} with milestones {self.milestones}: they belong "
                "to `piecewise`, which needs one"
            )
        for key, times in (("milestones", self.milestones), ("test_at", self.test_at)):
            if any(not 0 <= time <= self.epochs for time in times):
                raise FlownError(f"finetune: {key} {times}: not within epochs 0..{self.epochs}")

    def scale(self, steps: int) -> Tensor:
        """What each step multiplies the learning rate by, float64 (epochs * steps,).

        Args:
            steps: optimiser steps an epoch.
        """
        done = torch.arange(self.epochs * steps, dtype=torch.float64)
        factor = torch.ones_like(done)
        if self.schedule == "cosine":
            factor = 0.5 * (1 + (math.pi * done / len(done)).cos())
        for milestone in self.milestones:
            factor = torch.where(done >= milestone * steps, factor * self.gamma, factor)
        if self.warmup:
            factor = factor * ((done + 1) / (self.warmup * steps)).clamp(max=1)
        return factor


@dataclass(frozen=True)
class Point:
    """All networks after an epoch (0: before the first): each (n,), None where not measured.

    `loss` is the epoch's mean training loss, accuracies are percent.
    """

    epoch: int
    val: Tensor
    loss: Tensor | None = None
    test: Tensor | None = None


@dataclass(frozen=True)
class Finetuned:
    """Networks after training, and the way there."""

    networks: WeightBatch
    points: list[Point]


def finetune(
    batch: WeightBatch,
    images: ImageData,
    config: FinetuneConfig | None = None,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> Finetuned:
    """Trains all networks of a batch further on a data set's training images.

    Images are preprocessed as the networks' task says, whatever their size and colours. BatchNorm's
    statistics are estimated anew on the training images. Of a subset, the rest stays frozen. The
    result's task has the data's name and classes; classes that the networks have as well stay in
    their order.

    Args:
        out: where to write networks and curves (see above); nothing is written without it.
        resume: go on from what is there; ends with the same bits.

    Raises:
        FlownError: other classes than the networks', less than a batch of images, a setting out of
            range, `out` exists or holds something else.
        TrainingError: a network diverged (named).
    """
    config = config or FinetuneConfig()
    config.check()
    _check(batch, images)
    if batch.task is not None:
        images = in_order(images, batch.task.classes, None)
    files = None
    if out is not None:
        files = _Files(Path(out), _plan(batch, images, config), resume, overwrite)
        if files.done:
            return files.finished()
    run = _Run(batch, images, config, device)
    if files:
        files.restore(run)
    start = len(run.points)
    with bar(f"fine-tuning on {images.name}", config.epochs, max(0, start - 1)) as update:
        for epoch in range(start, config.epochs + 1):
            run.advance(epoch)
            if files:
                files.keep(run)
            update(epoch, f"validation accuracy {float(run.points[-1].val.mean()):.1f} %")
    result = Finetuned(run.networks().to("cpu"), run.points)
    if files:
        files.finish(result)
    return result


def _check(batch: WeightBatch, images: ImageData) -> None:
    if not len(batch):
        raise FlownError("finetune: no network to train")
    outputs, classes = batch.layout.architecture.outputs, len(images.classes)
    if classes != outputs:
        raise FlownError(
            f"finetune: {batch.name} tell {outputs} classes apart, "
            f"'{images.name}' has {classes}; choose data of as many classes"
        )


def _plan(batch: WeightBatch, images: ImageData, config: FinetuneConfig) -> dict[str, Any]:
    """What decides the result's bits, but for the code."""
    weights = [batch.vectors, *batch.frozen.values()]
    return {
        "config": config.model_dump(mode="json"),
        "data": images.name,
        "train": len(images.train),
        "task": batch.task and batch.task.id,
        "networks": len(batch),
        "checksum": checksum(torch.cat([x.flatten().float() for x in weights])),
    }


class _Run:
    """Networks in training, and what was measured of them so far."""

    def __init__(
        self, batch: WeightBatch, images: ImageData, config: FinetuneConfig, device: str
    ) -> None:
        self.images, self.config = images, config
        self.train = images.train[: config.max_train_images]
        self.steps = len(self.train) // config.batch_size  # an epoch
        if not self.steps:
            raise FlownError(
                f"{images.name}: {len(self.train)} training images are less than a batch of "
                f"{config.batch_size}; lower the batch size"
            )
        check_fits(len(batch), 4 * batch.layout.size, "networks in training")
        self.batch = batch.to(device).calibrated(self.train.images, batch_size=config.batch_size)
        layout, frozen = self.batch.layout, self.batch.frozen
        net = construction.fill(layout.architecture.build(), frozen)
        subset = any(name not in layout.names for name, _ in net.named_parameters())
        own = [x for x in batchnorm.layers(net) if f"{x}.running_mean" not in frozen]
        x = self.train.images if subset else layout.architecture.preprocess(self.train.images)
        rates, decays = [config.learning_rate] * len(batch), [config.weight_decay] * len(batch)
        self.engine = trainer(
            batchnorm.by_batch(net.train(not subset), own),
            layout,
            self.batch.vectors,
            x,
            config.batch_size,
            rates,
            decays,
            device,
            frozen if subset else None,
        )
        self.scale = config.scale(self.steps)
        self.points: list[Point] = []

    def advance(self, epoch: int) -> None:
        """Trains an epoch and measures it; epoch 0 is the networks as they came."""
        loss = None
        if epoch:
            first = (epoch - 1) * self.steps
            rows, scale = self._orders(epoch), self.scale[first : first + self.steps]
            losses = self.engine.run(rows, self.train.labels[rows], first, scale)
            sound = torch.isfinite(losses) & torch.isfinite(self.engine.vectors.cpu()).all(dim=1)
            if not sound.all():
                raise TrainingError(
                    f"fine-tuning on '{self.images.name}': network {int((~sound).nonzero()[0])} "
                    f"diverged in epoch {epoch}; lower the learning rate"
                )
            loss = losses / self.steps
        test = None
        if epoch in (*self.config.test_at, self.config.epochs):
            test = self._accuracy(self.images.test.images, self.images.test.labels)
        val = self._accuracy(self.images.val.images, self.images.val.labels)
        self.points.append(Point(epoch, val, loss, test))

    def _orders(self, epoch: int) -> Tensor:
        """The images in each network's order, (n, N): a zoo's orders for the same seed."""
        seeds = [self.config.seed * 1_000_003 + i for i in range(len(self.batch))]
        return torch.stack(
            [
                torch.randperm(
                    len(self.train), generator=torch.Generator().manual_seed(seed * 1_000 + epoch)
                )
                for seed in seeds
            ]
        )

    def _accuracy(self, images: Tensor, labels: Tensor) -> Tensor:
        return evaluate(self.networks(), images, labels).cpu()

    def networks(self) -> WeightBatch:
        """The networks as they are now, for the data's task."""
        layout, images = self.batch.layout, self.images
        origin = {
            **self.batch.provenance,
            "finetuned": {
                "from": self.batch.task and self.batch.task.id,
                "data": images.name,
                "config": self.config.model_dump(mode="json"),
            },
        }
        own = WeightBatch(
            layout,
            self.engine.vectors.clone(),
            origin,
            self.batch.frozen,
            task=Task.of(images),
        )
        return own.calibrated(self.train.images, batch_size=self.config.batch_size)


class _Files:
    """What a run leaves on the disk."""

    def __init__(self, out: Path, plan: dict[str, Any], resume: bool, overwrite: bool) -> None:
        if out.suffix != ".safetensors":
            raise FlownError(
                f"{out}: networks are written as .safetensors, with curves beside them"
            )
        self.out, self.plan = out, plan
        self.curves, self.progress = curves_file(out), out.with_suffix(".progress.safetensors")
        places = (out, self.curves, self.progress)
        self.files = [OutputFile(place, overwrite, resume) for place in places]
        self.resume = resume
        self.done = resume and self.curves.exists() and not self.progress.exists()

    def _check(self, plan: Any, path: Path) -> None:
        if plan != self.plan:
            raise FlownError(
                f"{path}: of other networks, data or settings; choose another --out, or --overwrite"
            )

    def finished(self) -> Finetuned:
        self._check(read_json(self.curves)["plan"], self.curves)
        return Finetuned(WeightBatch.load(self.out), read_points(self.curves))

    def keep(self, run: _Run) -> None:
        state = {"vectors": run.engine.vectors, "moments": run.engine.moments}
        for point in run.points:
            parts = {part: getattr(point, part) for part in _PARTS}
            state |= {f"{part}.{point.epoch}": x for part, x in parts.items() if x is not None}
        save_tensors(self.progress, state, {"plan": json.dumps(self.plan)})

    def restore(self, run: _Run) -> None:
        if not self.resume or not self.progress.exists():
            return
        state, about = load_tensors(self.progress)
        self._check(json.loads(about["plan"]), self.progress)
        run.engine.vectors.copy_(state["vectors"])
        run.engine.moments.copy_(state["moments"])
        while (val := state.get(f"val.{(epoch := len(run.points))}")) is not None:
            others = state.get(f"loss.{epoch}"), state.get(f"test.{epoch}")
            run.points.append(Point(epoch, val, *others))

    def finish(self, result: Finetuned) -> None:
        result.networks.save(self.out)
        points = [
            {"epoch": p.epoch} | {part: _record(getattr(p, part)) for part in _PARTS}
            for p in result.points
        ]
        write_json(
            self.curves,
            {"format": FORMAT, "flown": __version__, "plan": self.plan, "points": points},
        )
        self.progress.unlink(missing_ok=True)


def curves_file(out: Path | str) -> Path:
    """The file of losses and accuracies beside fine-tuned networks."""
    return Path(out).with_suffix(".json")


def read_points(path: Path | str) -> list[Point]:
    """The curves that `finetune` wrote.

    Raises:
        FlownError: missing or broken file, or another format.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FlownError(f"{path}: no curves of fine-tuning, expected format {FORMAT!r}")
    return [
        Point(point["epoch"], *(_values(point[part]) for part in ("val", "loss", "test")))  # type: ignore[arg-type]
        for point in content["points"]
    ]


def _record(values: Tensor | None) -> dict[str, Any] | None:
    """A figure of all networks: mean, deviation (None of a single one), and every network's."""
    if values is None:
        return None
    std = float(values.std()) if len(values) > 1 else None
    return {"mean": float(values.mean()), "std": std, "all": values.tolist()}


def _values(record: dict[str, Any] | None) -> Tensor | None:
    return None if record is None else torch.tensor(record["all"])
