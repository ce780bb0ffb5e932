"""Training the generator on new data, through the solver (FLoWN 3.1, A.4.4) or by adjoint matching.

    x_0 --t: 0 -> t', no graph--> x_t' --t: t' -> 1, graph--> x_1 --decode--> w
    loss = -E r(w),   r(w) = -cross-entropy of f(.; w) on a batch of the new task's training images

Gradients are those of the discretised solver. The stop-gradient time t' (`detach`, 0.4 in Table 9)
trades accuracy for time and memory: what the flow does before t' is not asked to change.
`flown.adjoint` is the other method: it keeps close to what the model generated before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown import flow
from flown.base.config import Config, describes
from flown.base.errors import FlownError, unknown
from flown.base.files import RUN, prepare_output, read_json, write_json
from flown.flow.adjoint import adjoint_matching_loss
from flown.generator.fit import context_bank
from flown.generator.model import Flown
from flown.measure.evaluate import evaluate
from flown.nets.batched import batchnorm, stacked
from flown.tasks import ImageData, draw_support, in_order
from flown.training import History, TrainConfig, step_generator, train
from flown.version import __version__
from flown.weights.batch import WeightBatch
from flown.zoo.rows import checksum

Reward: TypeAlias = Callable[[WeightBatch], Tensor]
Part = Literal["flow", "decoder", "head"]


class AdaptConfig(Config):
    """How a model is adapted.

    `parts` are trained, the rest is frozen; `networks` are generated in every step and see one batch
    of `training.batch_size` images, so that a step is `networks` gradient evaluations. `detach` is t',
    moved to the nearest of `steps` grid points; `recompute` keeps no activations of a solver's step,
    `amp` runs in bfloat16 on a GPU. `scale` multiplies the reward of adjoint matching: the larger, the
    further it may go from the model that was. `validated` networks are measured on validation images,
    and what did best on them is kept; a reward of one's own is followed to the end.
    """

    method: Literal["solver", "adjoint"] = "solver"
    parts: tuple[Part, ...] = ("flow",)
    networks: int = 8
    solver: str = "euler"
    steps: int = 20
    detach: float = 0.4
    recompute: bool = False
    amp: bool = False
    scale: float = 100.0
    validated: int = 32
    training: TrainConfig = TrainConfig(
        steps=300,
        batch_size=128,
        learning_rate=3e-3,
        weight_decay=0.0,
        warmup=10,
        ema=0.98,
        checkpoint_every=50,
        validate_every=50,
        choose="val",
    )
    seed: int = 0

    def check(self, device: str) -> None:
        """Raises FlownError for what cannot be run."""
        if self.solver not in flow.SOLVERS:
            raise unknown("solver", self.solver, flow.SOLVERS)
        if flow.SOLVERS[self.solver] is None:
            raise FlownError(
                f"solver {self.solver}: its steps depend on what it meets, and their choice has no "
                "gradient; adapt with a fixed grid: euler, midpoint, heun, rk4"
            )
        if not 0 <= self.detach <= 1:
            raise FlownError(f"detach: a time from 0 to 1, got {self.detach:g}")
        if min(self.networks, self.steps, self.validated) < 1 or not self.parts:
            raise FlownError("networks, steps, validated and parts: at least one each")
        if self.amp and not device.startswith("cuda"):
            raise FlownError("amp: mixed precision is for GPUs; leave it out on a CPU")


def endpoint(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    solver: str,
    steps: int,
    detach: float,
    recompute: bool = False,
) -> Tensor:
    """x_1 (n, *L) of a fixed grid of `steps`, with the graph of the steps after t' alone.

    The numbers are those of `flow.integrate` from 0 to 1, whatever t' is.
    """
    before = round(detach * steps)
    x, middle = x0, before / steps
    if before:
        with torch.no_grad():
            x = flow.integrate(velocity, x, solver, before, 0.0, middle).x
    if before < steps:
        after = steps - before
        x = flow.integrate(velocity, x, solver, after, middle, 1.0, recompute=recompute).x
    return x


class Objective(nn.Module):
    """The loss of one step for a model whose trained parameters require gradients.

    Args:
        model: is changed by training.
        images: the new task's; labels are outputs of the networks of `task`.
        reward: replaces the cross-entropy; weights alone decide it.

    Raises:
        FlownError: other numbers of classes; adjoint matching for another flow than it is made for.
    """

    def __init__(
        self,
        model: Flown,
        images: ImageData,
        task: str,
        config: AdaptConfig,
        reward: Reward | None = None,
    ) -> None:
        super().__init__()
        self.model, self.images, self.task, self.config = model, images, task, config
        self.reward, self.source = reward, model.source()
        layout = model.joint.layouts[model.tasks.index(task)]
        if len(layout.task.classes) != len(images.classes):
            raise FlownError(
                f"{images.name}: has {len(images.classes)} classes, networks for task '{task}' name "
                f"{len(layout.task.classes)}; adapt to data of as many classes"
            )
        self.layout, self.net = layout, layout.build().to(model.device).eval()
        # Statistics of images unlike the old ones: the batch's, as `WeightBatch.calibrated` has it.
        batchnorm.by_batch(self.net, batchnorm.layers(self.net))
        self.net.requires_grad_(False)
        self.bank: Tensor | None = None  # (draws, classes, width)
        if model.support is not None:
            self.bank = context_bank(
                model.support, {task: images}, (task,), model.classes, model.config
            )[0]
        self.base = self.base_head = None
        if config.method == "adjoint":
            how = model.config.flow
            parts = (how.source, how.coupling, how.path, how.sigma)
            if parts != ("gaussian", "independent", "linear", 0.0):
                raise FlownError(
                    "adjoint matching needs a flow from a Gaussian source with independent pairs on "
                    f"the linear path, without noise; this one has {', '.join(map(str, parts))}"
                )
            self.base, self.base_head = copy.deepcopy(model.velocity), copy.deepcopy(model.head)

    def train(self, mode: bool = True) -> Objective:
        """Stays in eval mode: networks are generated as `Flown.generate` generates them."""
        super().train(False)
        return self

    def forward(self, generator: torch.Generator) -> Tensor:
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.amp):
            return self._loss(generator)

    def _loss(self, generator: torch.Generator) -> Tensor:
        c, n, device = self.config, self.config.networks, self.model.device
        index = self.model.tasks.index(self.task)
        x0 = self.source.sample(torch.full((n,), index, device=device), generator)
        outputs = None
        if self.bank is not None:
            draws = torch.randint(len(self.bank), (n,), generator=generator, device=device)
            outputs = self.bank[draws]
        rows = torch.randint(
            len(self.images.train), (c.training.batch_size,), generator=generator, device=device
        ).cpu()
        velocity = _bound(self.model.velocity, self.model.head, outputs)

        def rewards(latents: Tensor) -> Tensor:
            return self.rewards(self.model.decode(latents, self.task), rows)

        if self.base is None:
            return -rewards(endpoint(velocity, x0, c.solver, c.steps, c.detach, c.recompute)).mean()
        base = _bound(self.base, self.base_head, outputs)
        return adjoint_matching_loss(
            velocity, base, x0, lambda x: c.scale * rewards(x), c.steps, generator
        )

    def rewards(self, batch: WeightBatch, rows: Tensor) -> Tensor:
        """Rewards (n,) of networks: minus their cross-entropy on training images `rows` (B,).

        Raises:
            FlownError: a reward of one's own returned anything but n numbers.
        """
        if self.reward is not None:
            found = self.reward(batch)
            if not isinstance(found, Tensor) or found.shape != (len(batch),):
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise FlownError(f"reward: expected a tensor ({len(batch)},), got {got}")
            return found
        some = self.images.train[rows]
        x, y = (t.to(self.model.device) for t in (some.images, some.labels))
        own, seen = self.layout.unpack(batch.vectors), self.layout.task.preprocess(x)
        logits = stacked.forward(self.net, own, seen.to(batch.vectors), batch.rest)  # (n, B, C)
        each = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(batch)), reduction="none")
        losses: Tensor = each.unflatten(0, (len(batch), -1)).mean(dim=1)
        return -losses

    def choose(self) -> None:
        """Frees the parameters of `config.parts` that gradients reach, and freezes all others.

        Raises:
            FlownError: a part of which no parameter is reached.
        """
        modules = {
            "flow": self.model.velocity,
            "head": self.model.head,
            "decoder": self.model.encoder,
        }
        chosen = {
            part: list(module.parameters()) if (module := modules[part]) is not None else []
            for part in self.config.parts
        }
        self.requires_grad_(False)
        every = [p for parameters in chosen.values() for p in parameters]
        for parameter in every:
            parameter.requires_grad_(True)
        loss = self(step_generator(self.config.seed, 0, self.model.device))
        found = torch.autograd.grad(loss, every, allow_unused=True) if loss.requires_grad else ()
        reached = {id(p) for p, g in zip(every, found, strict=False) if g is not None}
        for part, parameters in chosen.items():
            if not any(id(p) in reached for p in parameters):
                raise FlownError(
                    f"parts: nothing of '{part}' can be trained on this model with method "
                    f"{self.config.method} and detach {self.config.detach:g}"
                )
        for parameter in every:
            parameter.requires_grad_(id(parameter) in reached)

    def validate(self) -> dict[str, float]:
        """Mean accuracy of generated networks on the new task's validation images, percent."""
        batch = sample(
            self.model,
            self.images,
            self.task,
            self.config.validated,
            self.config.seed,
            self.config.solver,
            self.config.steps,
        )
        val = self.images.val
        return {"val": float(evaluate(batch, val.images, val.labels).mean())}


def _bound(
    velocity: flow.UNet, head: nn.Module | None, outputs: Tensor | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """v(x, t) with row i's condition the context outputs[i], (n, classes, width)."""
    return velocity.bind(None if head is None else head(outputs))


def sample(
    model: Flown,
    images: ImageData,
    task: str,
    n: int,
    seed: int,
    solver: str = "euler",
    steps: int = 100,
) -> WeightBatch:
    """n networks for new images, BatchNorm statistics theirs; a model with context gets a support
    set of their training part."""
    some, labels = None, None
    if model.support is not None:
        generator = torch.Generator().manual_seed(seed)
        shots = model.config.context.shots
        some, labels = draw_support(images.train, len(images.classes), shots, generator)
    batch = model.generate(some, labels, n, seed, solver, steps, task=task)
    return batch.calibrated(images.train.images, seed=seed)


def adapt(
    model: Flown,
    images: ImageData,
    config: AdaptConfig | None = None,
    *,
    out: Path | str,
    task: str | None = None,
    reward: Reward | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> Flown:
    """A copy of a model, trained on new data, saved under `out/model`.

    Args:
        images: the new task. Its training part is learnt from, its validation part measured in the
            history; labels are the networks' outputs, in the data's own order of classes, or in the
            task's, where it has the same ones.
        task: whose networks (architecture, activation, preprocessing) are generated; by default the
            one that the new images resemble most, or a model without context's first.
        reward: what to make large instead of minus the cross-entropy: a differentiable function of
            a batch of n networks that returns (n,), as

                lambda batch: -batch.vectors.abs().mean(dim=1)                     # sparse
                lambda batch: -(confidence(batch.logits(x)) - right).square()      # calibrated
                lambda batch: (batch.logits(x + noise).log_softmax(-1)             # robust
                               .gather(2, y.expand(len(batch), -1)[..., None]).mean((1, 2)))

        resume: go on from the checkpoint in `out`; ends with the same weights.

    Raises:
        FlownError: unknown task or solver, another number of classes, a part that cannot be
            trained, `out` exists or belongs to another run.
        TrainingError: the loss became NaN.
    """
    config = config or AdaptConfig()
    config.check(device)
    out = prepare_output(out, overwrite, resume)
    if task is not None and task not in model.tasks:
        raise unknown("task", task, model.tasks)
    new = copy.deepcopy(model).to(device)
    task = task or _nearest(new, images)
    images = in_order(images, new.joint.layouts[new.tasks.index(task)].task.classes, None)
    objective = Objective(new, images, task, config, reward)
    run = {
        "config": config.model_dump(mode="json"),
        "data": images.name,
        "task": task,
        "model": [_fingerprint(part) for part in (model.encoder, model.velocity)],
        "reward": None if reward is None else getattr(reward, "__name__", type(reward).__name__),
        "flown": __version__,
    }
    made = out / "run.json"
    if made.exists() and not describes(made, run, AdaptConfig):
        raise FlownError(
            f"{out}: holds a run of another model, data or config; choose another --out"
        )
    if resume and (out / "model" / "config.json").exists():
        done = Flown.from_pretrained(out / "model")
        done.history = read_json(out / "history.json")
        return done.to(device)
    training = (
        config.training if reward is None else config.training.model_copy(update={"choose": None})
    )
    static = [] if training.choose else [{"step": 0.0, **objective.validate()}]
    objective.choose()
    write_json(made, {"format": RUN, **run})
    history = static + train(
        objective,
        training,
        out=out,
        name="adapt",
        seed=config.seed,
        resume=resume,
        validate=objective.validate,
        device=device,
    )
    new.eval().requires_grad_(False)
    if new.known is not None and objective.bank is not None:  # the new images are now `task`'s
        new.known.replace(new.tasks.index(task), objective.bank)
    new.history = {"adapt": history}
    new.card = {"adapted": run | {"static": history[0]["val"], "val": _kept(history, training)}}
    write_json(out / "history.json", new.history)
    new.save_pretrained(str(out / "model"))
    return new


def _kept(history: History, config: TrainConfig) -> float:
    """Validation accuracy of what was kept: the best, or the last."""
    key = config.choose
    return (max(history, key=lambda record: record[key]) if key else history[-1])["val"]


def _fingerprint(part: nn.Module) -> int:
    return checksum(torch.cat([p.flatten() for p in part.parameters()] or [torch.empty(0)]))


def _nearest(model: Flown, images: ImageData) -> str:
    """The task that a support set of the new images is recognised as."""
    if model.support is None:
        return model.tasks[0]
    generator = torch.Generator().manual_seed(0)
    shots, classes = model.config.context.shots, len(images.classes)
    return model.recognise(*draw_support(images.train, classes, shots, generator))
