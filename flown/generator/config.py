"""The settings of `Flown.fit`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from flown.base.config import Config, Size
from flown.context.tokens import ContextConfig
from flown.encoders import EncoderConfig, VAEConfig
from flown.encoders.functional import FunctionalConfig
from flown.flow import VelocityConfig
from flown.flow.marginals import PathName
from flown.flow.path import LossName
from flown.training import TrainConfig

_FREE = {"process", "prior", "steps"}  # what a diffusion may have like a flow


class FlowConfig(Config):
    """The flow's source p0, coupling, path and loss; `sigma` is the path's noise.

    Generation takes `steps`. Coupling `semi-discrete` with loss `pseudo-huber` and `early` times
    (t = u^2 for uniform u) makes a flow that few of them follow (`flown.flow.semidiscrete`).

    Every path but `linear` leads through each network's checkpoints of `FlownConfig.epochs`, so
    that generation may stop at an epoch.

    Other processes than `flow` train the same network as a DDPM: without context `diffusion` is
    p-diff, with context `latent-diffusion` is D2NWG; `v-diffusion` differs in what the network
    predicts (`flown.flow.diffusion`). All start at uncoupled Gaussian noise.
    """

    process: Literal["flow", "diffusion", "v-diffusion", "latent-diffusion"] = "flow"
    source: str = "gaussian"
    coupling: str = "independent"
    path: PathName = "linear"
    loss: LossName = "squared"
    times: Literal["uniform", "early"] = "uniform"
    sigma: float = 0.0
    steps: Size = 100
    prior: str | None = None

    @model_validator(mode="after")
    def _of_flows_only(self) -> FlowConfig:
        chosen = self.model_dump(exclude=_FREE)
        if self.process != "flow" and chosen != FlowConfig().model_dump(exclude=_FREE):
            raise ValueError(
                "a diffusion has no choice of source, coupling, path, loss, times and sigma; leave "
                "them out"
            )
        return self


class FlownConfig(Config):
    """The settings of `fit`.

    `epochs` selects checkpoints, -1 the last; empty means all. `functional` compares the outputs of
    decoded networks, beside or instead of their weights. `path_training` is for `flow.path:
    metric`.
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
