"""From a zoo to trained parts: the weight encoder, then the conditional flow on its latents.

zoo --layout, scale--> (n, D + 2 T) --encoder--> latents (n, *L)
flow: v(x_t, t; c) regresses dx_t/dt, x_1 - x_0 on the straight path, for x_1 a latent of a network
and c = head(class tokens of a support set of the network's task)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from flown import encoders, flow
from flown.base.errors import FlownError, unknown
from flown.base.seeding import seeded
from flown.context import ContextHead
from flown.context.head import CONTEXT_DIM
from flown.context.support import token_width
from flown.context.tokens import Contexts, Images
from flown.encoders import Encoder
from flown.encoders.functional import FunctionalError
from flown.flow.marginals import fit_path, trajectories
from flown.flow.semidiscrete import SEMI_DISCRETE, SemiDiscrete
from flown.generator.config import FlownConfig
from flown.generator.data import TrainingSet, task_images
from flown.generator.objectives import EncoderObjective, FlowObjective, Sampler
from flown.generator.space import LatentSpace
from flown.measure.evaluate import evaluate
from flown.training import History, train
from flown.weights.batch import WeightBatch

_TASKS = 8  # tasks whose reconstruction accuracy is measured during training
_PROBE = 24  # networks a task
_PROBE_IMAGES = 500
_PROBE_LARGE, _LARGE = 8, 100_000  # networks a task if they are large or have frozen tensors
_PROBE_BATCH = 16  # images a batch on which BatchNorm is calibrated
_SETTLED = 4096  # networks on which the latent's scale is fitted


def fit_encoder(
    networks: TrainingSet,
    config: FlownConfig,
    images: Images,
    out: Path,
    resume: bool,
    device: str,
) -> tuple[Encoder, History]:
    """Trains the weight encoder; its history has reconstruction accuracies of both splits.

    Reconstruction accuracy is measured on validation images, beside the loss.

    Raises:
        FlownError: every factor of `functional` is 0, a functional loss is set for an encoder
            without parameters, or it needs labels while classes are permuted.
    """
    if not (config.functional.mse or config.functional.runs):
        raise FlownError("functional: mse, kl, ce, spread are all 0; there is nothing to train for")
    if config.functional.ce and config.context.permute:
        raise FlownError("functional.ce: labels do not change places; leave out context.permute")
    with seeded(config.seed):  # parameters are initialised by torch's own rules
        encoder = encoders.build(config.encoder, networks.joint, networks.scale.size)
    encoder.to(device)
    if isinstance(encoder, encoders.Identity):
        if config.functional.runs:
            raise FlownError("functional: encoder 'identity' has nothing to train; choose another")
        return encoder, []
    functions = _functions(networks, config, images, device) if config.functional.runs else None
    sampler = Sampler(networks, device)
    objective = EncoderObjective(encoder, sampler, config, functions)
    fitted = networks.train[_spread(len(networks.train), _SETTLED)].to(device)

    def validate() -> dict[str, float]:
        encoder.fit_scale(fitted)
        return reconstruction_accuracy(encoder, networks, images, device)

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
    encoder.fit_scale(fitted)
    return encoder.requires_grad_(False), history


def _functions(
    networks: TrainingSet, config: FlownConfig, images: Images, device: str
) -> FunctionalError:
    zoo = networks.train.zoo
    return FunctionalError(
        config.functional,
        networks.joint,
        networks.scale,
        [zoo.place(task) for task in zoo.tasks],
        [task_images(task, images).train for task in zoo.tasks.values()],
        [zoo.frozen(task) for task in zoo.tasks],
        device,
    )


def _spread(n: int, most: int) -> Tensor:
    """At most `most` of n places, evenly spread."""
    return torch.arange(0, n, max(1, -(-n // most)))


@torch.no_grad()
def reconstruction_accuracy(
    encoder: Encoder, networks: TrainingSet, images: Images, device: str
) -> dict[str, float]:
    """Mean validation accuracy (percent) of decode(encode(w)) and of w, over a few networks."""
    figures: dict[str, float] = {}
    sampler = Sampler(networks, device)
    for split, part in {"train": networks.train, "held-out": networks.held_out}.items():
        before: list[float] = []
        after: list[float] = []
        kinds = part.tasks.unique()
        for kind in kinds[_spread(len(kinds), _TASKS)].tolist():
            rows = (part.tasks == kind).nonzero().flatten()
            layout = int(part.layouts[rows[0]])
            large = networks.frozen[layout] or networks.joint.layouts[layout].size > _LARGE
            rows = rows[: _PROBE_LARGE if large else _PROBE]
            scaled = part[rows].to(device)
            data = task_images(list(networks.tasks.values())[kind], images)
            x, y = data.val.images[:_PROBE_IMAGES], data.val.labels[:_PROBE_IMAGES]
            index = torch.full((len(rows),), layout, device=device)
            decoded = encoder.decode(encoder.encode(scaled))
            for vectors, found in ((scaled, before), (decoded, after)):
                raw = networks.joint.extract(sampler.scale.invert(vectors, index), layout)
                bare = WeightBatch(
                    networks.joint.layouts[layout], raw, frozen=networks.frozen[layout]
                )
                batch = bare.calibrated(data.train.images, batch_size=_PROBE_BATCH)
                found.append(float(evaluate(batch, x, y).mean()))
        if before:
            figures[split] = sum(before) / len(before)
            figures[f"{split} reconstructed"] = sum(after) / len(after)
    return figures


@dataclass
class FlowParts:
    """The trained flow: the velocity network, and the head that makes its condition.

    `epochs` are those that the path leads through; the linear path has none.
    """

    velocity: flow.UNet
    head: ContextHead | None
    form: nn.Linear | None
    epochs: tuple[float, ...] = ()
    history: History = field(default_factory=list)


def flow_parts(
    config: FlownConfig, latent_shape: Sequence[int], layouts: int, classes: int, width: int | None
) -> FlowParts:
    """The flow's untrained modules; `width` is that of a class token, None without context."""
    velocity = flow.UNet(config.velocity, tuple(latent_shape), CONTEXT_DIM)
    if width is None:
        return FlowParts(velocity, None, None)
    mode = config.context.mode
    assert mode != "none"
    form = nn.Linear(CONTEXT_DIM, layouts) if layouts > 1 else None
    return FlowParts(velocity, ContextHead(classes, width, mode=mode), form)


def check_flow(config: FlownConfig) -> None:
    """Raises FlownError for settings that no flow can be trained with, before anything is trained."""
    couplings = (*flow.COUPLINGS, SEMI_DISCRETE)
    if config.flow.coupling not in couplings:
        raise unknown("coupling", config.flow.coupling, couplings)
    if config.flow.coupling == SEMI_DISCRETE and config.context.permute:
        raise FlownError(
            "context.permute: classes that change places make new networks at every step, coupling "
            "semi-discrete needs them all beforehand; choose one of both"
        )
    if config.flow.path != "linear" and config.context.permute:
        raise FlownError("context.permute: classes change places on the linear path only")


def fit_flow(
    networks: TrainingSet,
    space: LatentSpace,
    source: flow.Source,
    contexts: Contexts | None,
    config: FlownConfig,
    out: Path,
    resume: bool,
    device: str,
) -> FlowParts:
    """Trains velocity and context head on the standardised latents of the training split.

    Raises:
        FlownError: settings that no flow can be trained with.
    """
    check_flow(config)
    sampler, encoder = Sampler(networks, device), space.encoder
    with torch.no_grad():
        rows = torch.arange(len(networks.train)).split(256)
        latents = torch.cat([encoder.encode(sampler.vectors(part)) for part in rows])
    if not torch.isfinite(latents).all():
        raise FlownError("the encoder's latents hold NaN or Inf; its training diverged")
    layouts, tasks, path = sampler.layouts, sampler.tasks, None
    epochs: tuple[float, ...] = ()
    if config.flow.path != "linear":
        places, epochs = trajectories(networks.train, config.epochs)
        firsts = places[:, 0].to(device)
        latents, layouts, tasks = latents[places.to(device)], layouts[firsts], tasks[firsts]
        path = fit_path(
            config.flow.path,
            source,
            latents,
            layouts,
            config.path_training,
            out=out,
            seed=config.seed,
            resume=resume,
            device=device,
        )
    width = None if contexts is None else token_width(contexts.support, config.context.tokens)
    with seeded(config.seed + 1):
        parts = flow_parts(
            config, latents.shape[-3:], len(networks.joint.layouts), networks.joint.outputs, width
        )

    @torch.no_grad()
    def encode(rows: Tensor, orders: Tensor) -> Tensor:
        return encoder.encode(sampler.vectors(rows, orders))

    transport = None
    if config.flow.coupling == SEMI_DISCRETE:
        firsts = latents if path is None else latents[:, 0]
        transport = SemiDiscrete(firsts, tasks, layouts, source, config.seed)
    permute = contexts is not None and config.context.permute
    objective = FlowObjective(
        parts.velocity,
        parts.head,
        parts.form,
        source,
        config,
        latents,
        layouts,
        tasks,
        contexts,
        path,
        encode if permute else None,
        networks.orders if permute else None,
        transport,
    )
    objective.to(device)
    parts.history = train(
        objective,
        config.flow_training,
        out=out,
        name="flow",
        seed=config.seed + 1,
        resume=resume,
        device=device,
    )
    parts.epochs = epochs
    for module in (parts.velocity, parts.head, parts.form):
        if module is not None:
            module.requires_grad_(False)
    return parts


def load_prior(config: FlownConfig) -> dict[str, Tensor]:
    """The trained network that the `checkpoint` source starts from, read from `flow.prior`."""
    if config.flow.source != "checkpoint":
        return {}
    if config.flow.prior is None:
        raise FlownError(
            "flow.source checkpoint needs flow.prior: a file of generated or saved weights"
        )
    return WeightBatch.load(config.flow.prior).state_dict(0)
