"""Training the generator on new data, through the solver (FLoWN 3.1, A.4.4) or by adjoint matching.

    x_0 --t: 0 -> t', no graph--> x_t' --t: t' -> 1, graph--> x_1 --decode--> w
    loss = -E r(w),   r(w) = -cross-entropy of f(.; w) on a batch of the new task's training images

Gradients are exact for the discretised solver. The stop-gradient time t' (`detach`, 0.4 in Table 9)
trades accuracy for time and memory: the flow before t' gets no gradient. Adjoint matching
(`flow.adjoint`) is the other method: it stays close to the former generator.
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
from flown.base.config import Config
from flown.base.errors import FlownError, unknown
from flown.base.files import read_json, write_json
from flown.base.run import Run
from flown.context.tokens import Contexts
from flown.flow.adjoint import adjoint_matching_loss
from flown.generator.model import Flown
from flown.measure.evaluate import evaluate
from flown.nets.batched import batchnorm, stacked
from flown.tasks import ImageData, Task, draw_support, in_order
from flown.tasks.classes import places
from flown.training import History, TrainConfig, step_generator, train
from flown.version import __version__
from flown.weights.batch import WeightBatch
from flown.zoo.rows import checksum

Reward: TypeAlias = Callable[[WeightBatch], Tensor]
Part = Literal["flow", "decoder", "head"]


class AdaptConfig(Config):
    """How a model is adapted.

    `parts` are trained, other parts are frozen. Each step generates `networks` networks, which see
    one batch of `training.batch_size` images: a step is `networks` gradient evaluations. `detach`
    is t', moved to the nearest of `steps` grid points; `recompute` keeps no activations of a
    solver's step, `amp` runs in bfloat16 on a GPU. `scale` multiplies the reward of adjoint
    matching: the larger it is, the further the model may move. `validated` networks are measured on
    validation images, and the best model is kept; with a user's reward the last one is.
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
        """Raises FlownError for settings that cannot run."""
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
    """x_1 (n, *L) on a fixed grid of `steps`, with a graph of the steps after t' alone.

    The numbers equal those of `flow.integrate` from 0 to 1 for every t'.
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
        model: training changes it.
        images: the new task's; labels are outputs of the networks of the model's layout `layout`.
        reward: replaces the cross-entropy; weights alone decide it.

    Raises:
        FlownError: another number of classes, or a flow that adjoint matching does not cover.
    """

    def __init__(
        self,
        model: Flown,
        images: ImageData,
        layout: int,
        config: AdaptConfig,
        reward: Reward | None = None,
    ) -> None:
        super().__init__()
        self.model, self.images, self.place, self.config = model, images, layout, config
        self.reward, self.source = reward, model.source()
        self.layout = model.space.joint.layouts[layout]
        outputs = self.layout.architecture.outputs
        if outputs != len(images.classes):
            raise FlownError(
                f"{images.name}: has {len(images.classes)} classes, networks of layout {layout} name "
                f"{outputs}; adapt to data of as many classes"
            )
        self.net = self.layout.architecture.build().to(model.device).eval()
        # New images have other statistics: the batch's, as in `WeightBatch.calibrated`.
        batchnorm.by_batch(self.net, batchnorm.layers(self.net))
        self.net.requires_grad_(False)
        self.contexts: Contexts | None = None
        if model.support is not None:
            task = Task.of(images)
            self.contexts = Contexts(
                model.support, [task], {task.dataset: images}, model.config.context, model.classes
            )
        self.base = self.base_head = None
        if config.method == "adjoint":
            how = model.config.flow
            parts = (how.source, how.coupling, how.path, how.loss, how.sigma)
            if parts != ("gaussian", "independent", "linear", "squared", 0.0):
                raise FlownError(
                    "adjoint matching needs a flow from a Gaussian source with independent pairs on the "
                    "linear path, of squared loss and without noise; this one has "
                    f"{', '.join(map(str, parts))}"
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
        x0 = self.source.sample(torch.full((n,), self.place, device=device), generator)
        outputs = None
        if self.contexts is not None:
            outputs = self.contexts.draw(torch.zeros(n, dtype=torch.int64), generator)
        rows = torch.randint(
            len(self.images.train), (c.training.batch_size,), generator=generator, device=device
        ).cpu()
        velocity = _bound(self.model.velocity, self.model.head, outputs)

        def rewards(latents: Tensor) -> Tensor:
            return self.rewards(self.model.decode(latents, self.place), rows)

        if self.base is None:
            return -rewards(endpoint(velocity, x0, c.solver, c.steps, c.detach, c.recompute)).mean()
        base = _bound(self.base, self.base_head, outputs)
        return adjoint_matching_loss(
            velocity, base, x0, lambda x: c.scale * rewards(x), c.steps, generator
        )

    def rewards(self, batch: WeightBatch, rows: Tensor) -> Tensor:
        """Rewards (n,) of networks: minus their cross-entropy on training images `rows` (B,).

        Raises:
            FlownError: a user's reward returned anything but n numbers.
        """
        if self.reward is not None:
            found = self.reward(batch)
            if not isinstance(found, Tensor) or found.shape != (len(batch),):
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise FlownError(f"reward: expected a tensor ({len(batch)},), got {got}")
            return found
        drawn = self.images.train[rows]
        x, y = (t.to(self.model.device) for t in (drawn.images, drawn.labels))
        weights, inputs = self.layout.unpack(batch.vectors), self.layout.architecture.preprocess(x)
        logits = stacked.forward(
            self.net, weights, inputs.to(batch.vectors), batch.frozen
        )  # (n, B, C)
        losses = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(batch)), reduction="none")
        means: Tensor = losses.unflatten(0, (len(batch), -1)).mean(dim=1)
        return -means

    def choose(self) -> None:
        """Frees the parameters of `config.parts` that gradients reach, and freezes all others.

        Raises:
            FlownError: gradients reach no parameter of a part.
        """
        modules = {
            "flow": self.model.velocity,
            "head": self.model.head,
            "decoder": self.model.space.encoder,
        }
        chosen = {
            part: list(module.parameters()) if (module := modules[part]) is not None else []
            for part in self.config.parts
        }
        self.requires_grad_(False)
        candidates = [p for parameters in chosen.values() for p in parameters]
        for parameter in candidates:
            parameter.requires_grad_(True)
        loss = self(step_generator(self.config.seed, 0, self.model.device))
        found = (
            torch.autograd.grad(loss, candidates, allow_unused=True) if loss.requires_grad else ()
        )
        reached = {id(p) for p, g in zip(candidates, found, strict=False) if g is not None}
        for part, parameters in chosen.items():
            if not any(id(p) in reached for p in parameters):
                raise FlownError(
                    f"parts: nothing of '{part}' can be trained on this model with method "
                    f"{self.config.method} and detach {self.config.detach:g}"
                )
        for parameter in candidates:
            parameter.requires_grad_(id(parameter) in reached)

    def validate(self) -> dict[str, float]:
        """Mean accuracy of generated networks on the new task's validation images, percent."""
        batch = sample(
            self.model,
            self.images,
            self.place,
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
    layout: int | None,
    n: int,
    seed: int,
    solver: str = "euler",
    steps: int | None = None,
) -> WeightBatch:
    """n networks for new images, with BatchNorm statistics of these; a model with context gets a
    support set from their training part."""
    support = _support(model, images, seed)
    batch = model.generate(*support, n, seed, solver, steps, layout=layout, classes=images.classes)
    return batch.calibrated(images.train.images, seed=seed)


def _support(model: Flown, images: ImageData, seed: int) -> tuple[Tensor | None, Tensor | None]:
    """A support set of the training part, for a model with context."""
    if model.support is None:
        return None, None
    generator = torch.Generator().manual_seed(seed)
    shots = model.config.context.shots
    return draw_support(images.train, len(images.classes), shots, generator)


def adapt(
    model: Flown,
    images: ImageData,
    config: AdaptConfig | None = None,
    *,
    out: Path | str,
    layout: int | None = None,
    reward: Reward | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> Flown:
    """A copy of a model, trained on new data, saved under `out/model`.

    Args:
        images: the new task. The model learns from its training part; its validation part is
            measured in the history. Labels are outputs of the networks: in the order of a task
            of training with the same class names, otherwise in the data's own order.
        layout: the place of one of the model's layouts (architecture and preprocessing); by default
            the one that suits the new images, or the first of a model without context.
        reward: maximised in place of minus the cross-entropy: a differentiable function of
            a batch of n networks that returns (n,), as

                lambda batch: -batch.vectors.abs().mean(dim=1)                     # sparse
                lambda batch: -(confidence(batch.logits(x)) - right).square()      # calibrated
                lambda batch: (batch.logits(x + noise).log_softmax(-1)             # robust
                               .gather(2, y.expand(len(batch), -1)[..., None]).mean((1, 2)))

        resume: go on from the checkpoint in `out`; ends with the same weights.

    Raises:
        FlownError: no such layout, an unknown solver, another number of classes, a part that cannot be
            trained, `out` exists or belongs to another run.
        TrainingError: the loss became NaN.
    """
    config = config or AdaptConfig()
    config.check(device)
    new = copy.deepcopy(model).to(device)
    if layout is None:
        layout = new.asked_layout(*_support(new, images, 0))
    elif not 0 <= layout < len(model.space.joint.layouts):
        raise FlownError(f"layout {layout} is out of range 0..{len(model.space.joint.layouts) - 1}")
    for task in new.tasks.values():
        if places(images.classes, task.classes) is not None:
            images = in_order(images, task.classes, None)
            break
    objective = Objective(new, images, layout, config, reward)
    plan = {
        "config": config.model_dump(mode="json"),
        "data": images.name,
        "images": images.identity,
        "layout": layout,
        "model": [_fingerprint(part) for part in (model.space.encoder, model.velocity)],
        "reward": None if reward is None else getattr(reward, "__name__", type(reward).__name__),
    }
    run = Run(
        out,
        plan,
        resume=resume,
        overwrite=overwrite,
        configs={"config": AdaptConfig},
        newer=["images"],
    )
    out = run.path
    if resume and (out / "model" / "config.json").exists():
        done: Flown = Flown.from_pretrained(out / "model")
        done.history = read_json(out / "history.json")
        return done.to(device)
    training = (
        config.training if reward is None else config.training.model_copy(update={"choose": None})
    )
    static = [] if training.choose else [{"step": 0.0, **objective.validate()}]
    objective.choose()
    run.begin()
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
    if config.method == "solver" and new.config.flow.steps < config.steps:
        # What was trained through so many steps is generated with them.
        changed = new.config.flow.model_copy(update={"steps": config.steps})
        new.config = new.config.model_copy(update={"flow": changed})
    new.history = {"adapt": history}
    new.card = {
        "adapted": plan
        | {"flown": __version__}
        | {"static": history[0]["val"], "val": _kept(history, training)}
    }
    write_json(out / "history.json", new.history)
    new.save_pretrained(str(out / "model"))
    return new


def _kept(history: History, config: TrainConfig) -> float:
    """Validation accuracy of the kept model: the best, or the last."""
    key = config.choose
    return (max(history, key=lambda record: record[key]) if key else history[-1])["val"]


def _fingerprint(part: nn.Module) -> int:
    return checksum(torch.cat([p.flatten() for p in part.parameters()] or [torch.empty(0)]))
