"""From a zoo to trained parts: the weight encoder, then the conditional flow on its latents.

zoo --layout, standardise--> (n, D) --encoder--> latents (n, *L)
flow: v(x_t, t; c) regresses dx_t/dt, x_1 - x_0 on the straight path, for x_1 a latent of task k and
c = head(CAML(support of task k))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from flown import encoders, flow
from flown.base.config import Config
from flown.base.errors import FlownError, unknown
from flown.context import ContextHead, SupportEncoder
from flown.encoders import EncoderConfig, VAEConfig
from flown.encoders.functional import FunctionalConfig, FunctionalError
from flown.flow import VelocityConfig
from flown.flow.diffusion import diffusion_loss
from flown.flow.marginals import PathName, fit_path, trajectories
from flown.measure.evaluate import evaluate
from flown.tasks import ImageData, draw_support
from flown.training import History, TrainConfig, train
from flown.weights.batch import WeightBatch
from flown.weights.layout import JointLayout, Standardizer
from flown.zoo import Zoo
from flown.zoo.networks import Networks

_PROBE = 24  # networks a task whose reconstruction accuracy is followed during training
_PROBE_IMAGES = 500
_PROBE_LARGE, _LARGE = 8, 100_000  # of large ones: more numbers, or a frozen rest beside them
_PROBE_BATCH = 16  # images a batch on which BatchNorm is calibrated
_SETTLED = 4096  # networks on which the latent's scale is fitted


class ContextConfig(Config):
    """How support sets condition the flow.

    `shots` images a class make a support set; `draws` of them a task are encoded before training.
    `mode` is the paper's class-ordered concatenation, or an order-free mean.
    """

    mode: Literal["ordered", "mean", "none"] = "ordered"
    shots: int = 5
    draws: int = 48


class FlowConfig(Config):
    """The flow's source p0, coupling and path; `sigma` is the path's noise.

    All but the `linear` path lead through the checkpoints of `FlownConfig.epochs`, each network's
    own, so that generation may stop at an epoch.

    `process: diffusion` trains the same network as a DDPM instead: with context it is D2NWG,
    without p-diff; `v-diffusion` differs in what the network predicts. Both start at uncoupled
    Gaussian noise.
    """

    process: Literal["flow", "diffusion", "v-diffusion"] = "flow"
    source: str = "gaussian"
    coupling: str = "independent"
    path: PathName = "linear"
    sigma: float = 0.0
    prior: str | None = None

    @model_validator(mode="after")
    def _of_flows_only(self) -> FlowConfig:
        own = (self.source, self.coupling, self.path, self.sigma)
        if self.process != "flow" and own != ("gaussian", "independent", "linear", 0.0):
            raise ValueError(
                "a diffusion has no choice of source, coupling, path and sigma; leave them out"
            )
        return self


class FlownConfig(Config):
    """Everything that `fit` needs to know but the zoo.

    `epochs`: which checkpoints, -1 the last; with none named, all. `functional` compares decoded
    networks by what they compute, beside or instead of their weights. `path_training` is for
    `flow.path: metric`.
    """

    epochs: tuple[int, ...] = (-1,)
    encoder: EncoderConfig = VAEConfig()
    encoder_training: TrainConfig = TrainConfig(steps=4000, batch_size=64)
    functional: FunctionalConfig = FunctionalConfig()
    context: ContextConfig = ContextConfig()
    velocity: VelocityConfig = VelocityConfig()
    flow: FlowConfig = FlowConfig()
    path_training: TrainConfig = TrainConfig(steps=1000, batch_size=128)
    flow_training: TrainConfig = TrainConfig(steps=4000, batch_size=128)
    seed: int = 0

    @field_validator("encoder", mode="before")
    @classmethod
    def _encoder_kind(cls, value: Any) -> Any:
        return {"kind": "vae", **value} if isinstance(value, dict) else value


@dataclass
class Population:
    """A zoo's networks in one standardised vector space, training and held-out ones apart.

    `rests`: what each task's networks share, where a subset of their tensors is generated.
    """

    joint: JointLayout
    standardizer: Standardizer
    train: Networks
    held_out: Networks
    rests: tuple[dict[str, Tensor], ...]

    @classmethod
    def of(cls, zoo: Zoo, epochs: tuple[int, ...]) -> Population:
        """Raises FlownError when a task has no training model among these checkpoints."""
        chosen = zoo.select(epochs=epochs or None)
        for task in zoo.tasks:
            if not any(row.task == task and row.split == "train" for row in chosen.rows):
                raise FlownError(
                    f"{zoo.path}: task '{task}' has no training network in epochs {epochs}; of a "
                    "lone network the last checkpoints are held out: epochs [] takes all"
                )
        places = sorted(range(len(chosen)), key=lambda i: chosen.tasks.index(chosen.rows[i].task))
        parts = [
            [i for i in places if (chosen.rows[i].split == "train") == train]
            for train in (True, False)
        ]
        train, held_out = (Networks(chosen, chosen.joint, part) for part in parts)
        train.standardizer.fit(train.blocks())
        held_out.standardizer = train.standardizer
        rests = tuple(
            WeightBatch(x, torch.empty(0, x.size), rest=zoo.rest(x.task.name)).bare().rest
            for x in chosen.layouts
        )
        return cls(chosen.joint, train.standardizer, train, held_out, rests)


class _EncoderObjective(nn.Module):
    def __init__(
        self,
        encoder: nn.Module,
        people: Population,
        config: FlownConfig,
        functions: FunctionalError | None,
        device: str,
    ) -> None:
        super().__init__()
        self.encoder, self.networks = encoder, people.train
        self.batch, self.mse = config.encoder_training.batch_size, config.functional.mse
        self.functions = functions
        self.masks = people.joint.masks.to(device)

    def forward(self, generator: torch.Generator) -> Tensor:
        device = self.masks.device
        rows = torch.randint(len(self.networks), (self.batch,), generator=generator, device=device)
        vectors = self.networks[rows.cpu()].to(device)
        tasks = self.networks.tasks[rows.cpu()].to(device)
        masks = self.masks[tasks]
        decoded, penalty = self.encoder.training_pass(vectors, masks, generator)  # type: ignore[operator]
        error = encoders.reconstruction_error(decoded, vectors, masks)
        loss: Tensor = self.mse * error + penalty
        if self.functions is not None:
            loss = loss + self.functions(decoded, vectors, tasks, generator)
        return loss


def fit_encoder(
    people: Population,
    config: FlownConfig,
    images: Mapping[str, ImageData],
    out: Path,
    resume: bool,
    device: str,
) -> tuple[nn.Module, History]:
    """Trains the weight encoder; its history holds reconstruction accuracies of both splits.

    Reconstruction accuracy is measured on validation images, never only the loss.

    Raises:
        FlownError: nothing to train for: `functional.mse` is 0 and its other factors too, or functions
            are asked of an encoder without parameters.
    """
    if not (config.functional.mse or config.functional.runs):
        raise FlownError("functional: mse, kl, ce, spread are all 0; there is nothing to train for")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # parameters are initialised by torch's own rules
        encoder = encoders.build(config.encoder, people.joint)
    encoder.to(device)
    if isinstance(encoder, encoders.Identity):
        if config.functional.runs:
            raise FlownError("functional: encoder 'identity' has nothing to train; choose another")
        return encoder, []
    functions = _functions(people, config, images, device) if config.functional.runs else None
    objective = _EncoderObjective(encoder, people, config, functions, device)

    some = people.train[_spread(len(people.train), _SETTLED)].to(device)

    def validate() -> dict[str, float]:
        encoder.settle(some)  # type: ignore[operator]
        return reconstruction_accuracy(encoder, people, images, device)

    history = train(
        objective,
        config.encoder_training,
        out=out,
        name="encoder",
        seed=config.seed,
        resume=resume,
        validate=validate,
        device=device,
    )
    encoder.settle(some)  # type: ignore[operator]
    return encoder.requires_grad_(False), history


def _functions(
    people: Population, config: FlownConfig, images: Mapping[str, ImageData], device: str
) -> FunctionalError:
    names = [layout.task.name for layout in people.joint.layouts]
    rests = [people.train.zoo.rest(name) for name in names]
    splits = [images[name].train for name in names]
    return FunctionalError(
        config.functional, people.joint, people.standardizer, splits, rests, device
    )


def _spread(n: int, most: int) -> Tensor:
    """At most `most` of n places, evenly."""
    return torch.arange(0, n, max(1, -(-n // most)))


@torch.no_grad()
def reconstruction_accuracy(
    encoder: nn.Module, people: Population, images: Mapping[str, ImageData], device: str
) -> dict[str, float]:
    """Mean validation accuracy (percent) of decode(encode(w)), and of w, over a probe of networks."""
    figures: dict[str, float] = {}
    for split, networks in {"train": people.train, "held-out": people.held_out}.items():
        before: list[float] = []
        after: list[float] = []
        for task, layout in enumerate(people.joint.layouts):
            rows = (networks.tasks == task).nonzero().flatten()
            large = people.rests[task] or layout.size > _LARGE
            rows = rows[: _PROBE_LARGE if large else _PROBE]
            if not len(rows):
                continue
            some = networks[rows].to(device)
            index = torch.full((len(some),), task, device=device)
            val, seen = images[layout.task.name].val, images[layout.task.name].train.images
            x, y = val.images[:_PROBE_IMAGES], val.labels[:_PROBE_IMAGES]
            for standard, into in ((some, before), (encoder.decode(encoder.encode(some)), after)):  # type: ignore[operator]
                raw = people.standardizer.to(device).invert(standard, index)
                bare = WeightBatch(layout, people.joint.extract(raw, task), rest=people.rests[task])
                batch = bare.calibrated(seen, batch_size=_PROBE_BATCH)
                into.append(float(evaluate(batch, x, y).mean()))
        if before:
            figures[split] = sum(before) / len(before)
            figures[f"{split} reconstructed"] = sum(after) / len(after)
    return figures


def context_bank(
    support: SupportEncoder,
    images: Mapping[str, ImageData],
    tasks: tuple[str, ...],
    classes: int,
    config: FlownConfig,
) -> Tensor:
    """CAML's class outputs of random support sets, (tasks, draws, classes, width).

    Supports come from the training split; tasks with fewer classes are zero-padded.
    """
    bank = []
    for index, task in enumerate(tasks):
        split, count = images[task].train, len(images[task].classes)
        draws = []
        for draw in range(config.context.draws):
            generator = torch.Generator().manual_seed(
                config.seed * 1_000_003 + index * 1_009 + draw
            )
            some = draw_support(split, count, config.context.shots, generator)
            outputs = support.encode(some.images, some.labels, count, generator)
            draws.append(nn.functional.pad(outputs, (0, 0, 0, classes - count)))
        bank.append(torch.stack(draws))
    return torch.stack(bank)


class FlowObjective(nn.Module):
    """Flow matching (eq. 1), or the diffusion loss, on latents under a task's random support set.

    Latents are (n, *L), or with a path its marginals (m, K, *L); tasks (n or m,).
    """

    def __init__(
        self,
        velocity: flow.UNet,
        head: nn.Module | None,
        source: flow.Source,
        config: FlownConfig,
        latents: Tensor,
        tasks: Tensor,
        bank: Tensor | None,
        path: flow.Path | None = None,
    ) -> None:
        super().__init__()
        self.velocity, self.head = velocity, head
        self.source, self.config = source, config
        self.latents, self.tasks, self.bank, self.path = latents, tasks, bank, path
        self.couple = flow.COUPLINGS[config.flow.coupling]
        # Tasks are drawn alike, however many networks each has.
        self.chances = 1.0 / torch.bincount(tasks).clamp_min(1)[tasks].double()

    def forward(self, generator: torch.Generator) -> Tensor:
        batch = self.config.flow_training.batch_size
        rows = torch.multinomial(self.chances, batch, replacement=True, generator=generator)
        x1, tasks = self.latents[rows], self.tasks[rows]
        x0 = context = None
        if self.config.flow.process == "flow":
            first = x1 if self.path is None else x1[:, 0]
            x0 = self.couple(self.source.sample(tasks, generator), first, tasks, generator)
        if self.head is not None and self.bank is not None:
            draws = torch.randint(
                self.bank.shape[1], (batch,), generator=generator, device=tasks.device
            )
            context = self.head(self.bank[tasks, draws])
        if x0 is None:
            return diffusion_loss(self.velocity, x1, context, generator, self.config.flow.process)
        return flow.flow_matching_loss(
            self.velocity,
            x0,
            x1,
            context,
            sigma=self.config.flow.sigma,
            generator=generator,
            path=self.path,
        )


def fit_flow(
    people: Population,
    encoder: nn.Module,
    source: flow.Source,
    bank: Tensor | None,
    config: FlownConfig,
    out: Path,
    resume: bool,
    device: str,
) -> tuple[flow.UNet, ContextHead | None, History, tuple[float, ...]]:
    """Trains velocity and context head on the standardised latents of the training split.

    Also returns the epochs that the flow's path leads through, none for the linear one.
    """
    if config.flow.coupling not in flow.COUPLINGS:
        raise unknown("coupling", config.flow.coupling, flow.COUPLINGS)
    with torch.no_grad():
        rows = torch.arange(len(people.train)).split(256)
        latents = torch.cat([encoder.encode(people.train[some].to(device)) for some in rows])  # type: ignore[operator]
    if not torch.isfinite(latents).all():
        raise FlownError("the encoder's latents hold NaN or Inf; its training diverged")
    tasks, path = people.train.tasks.to(device), None
    epochs: tuple[float, ...] = ()
    if config.flow.path != "linear":
        places, epochs = trajectories(people.train, config.epochs)
        latents, tasks = latents[places.to(device)], tasks[places[:, 0].to(device)]
        path = fit_path(
            config.flow.path,
            source,
            latents,
            tasks,
            config.path_training,
            out=out,
            seed=config.seed,
            resume=resume,
            device=device,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        velocity = flow.UNet(config.velocity, tuple(latents.shape[-3:]), 128)
        head = None
        if bank is not None and config.context.mode != "none":
            head = ContextHead(bank.shape[2], bank.shape[3], mode=config.context.mode)
    objective = FlowObjective(
        velocity,
        head,
        source,
        config,
        latents,
        tasks,
        None if bank is None else bank.to(device),
        path,
    )
    objective.to(device)
    history = train(
        objective,
        config.flow_training,
        out=out,
        name="flow",
        seed=config.seed + 1,
        resume=resume,
        device=device,
    )
    velocity.requires_grad_(False)
    if head is not None:
        head.requires_grad_(False)
    return velocity, head, history, epochs


def load_prior(config: FlownConfig) -> dict[str, Tensor]:
    """The trained network that the `checkpoint` source starts from, read from `flow.prior`."""
    if config.flow.source != "checkpoint":
        return {}
    if config.flow.prior is None:
        raise FlownError(
            "flow.source checkpoint needs flow.prior: a file of generated or saved weights"
        )
    return WeightBatch.load(config.flow.prior).state_dict(0)
