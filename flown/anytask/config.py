"""Everything that the any-task generator's training needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Optional

import torch
from pydantic import Field

from flown.base.config import Config
from flown.tasks.stream import StreamConfig
from flown.training import LoopConfig


class BaseConfig(Config):
    """How the base networks are trained, on draws of at most `images` images.

    The kind of network with the largest share sees every draw, the others as many as theirs allows,
    and the image encoder the part `encoder` of all. Tasks have up to `ways` classes, more than any
    that is generated for, since what separates many classes separates few.
    """

    ways: int = Field(default=60, ge=2, le=65536)
    shots: int = Field(default=10, ge=1, le=65536)
    images: int = Field(default=480, ge=8, le=65536)
    encoder: float = Field(default=0.3, gt=0, le=1)
    training: LoopConfig = LoopConfig(
        steps=9000,
        learning_rate=1e-2,
        weight_decay=1e-4,
        checkpoint_every=250,
        validate_every=1000,
    )


Way = Literal["end-point", "solver", "matching", "matching-function", "point"]


class BankConfig(Config):
    """The latents that the flow is matched with: `draws` draws of tasks, `steps` of Adam for each.

    They begin at `start` times noise.
    """

    draws: int = Field(default=100, ge=1, le=65536)
    steps: int = Field(default=15, ge=1, le=65536)
    learning_rate: float = Field(default=0.1, gt=0)
    start: float = Field(default=0.1, ge=0)


class AnyTaskConfig(Config):
    """`nets` are what is written, each with its share of the steps; the first is the default.

    In training a network is up to `steps` Euler steps away from noise; `evaluations` are what it takes
    by default, since more made none better. In training `samples` networks are written for
    each task; `together` weighs the loss of their mean prediction against the mean of their losses,
    `spread` rewards predictions that differ. `way` is how the flow is trained (`flown.anytask.ways`),
    `bank` what it is matched with in those ways that match. For its last layer each network sees
    every support image once more, slightly warped, and a class `views` times at least; 1 is without.
    Images have `features` of the width of tokens, where nothing else is said. Each kind has `experts`
    base networks, two for strokes and for pictures, mixed by what a support set seems to be; or one.
    """

    nets: dict[str, float] = Field(
        default={
            "conv4-32": 0.34,
            "conv4-16": 0.11,
            "conv4-8": 0.11,
            "cnn-medium": 0.13,
            "cnn-small": 0.31,
        }
    )
    numbers: int = Field(default=32, ge=1, le=65536)
    width: int = Field(default=128, ge=8, le=65536)
    depth: int = Field(default=4, ge=1, le=65536)
    heads: int = Field(default=4, ge=1, le=65536)
    features: Optional[int] = Field(default=None, ge=1)
    experts: int = Field(default=2, ge=1, le=2)
    steps: int = Field(default=4, ge=1, le=65536)
    evaluations: int = Field(default=1, ge=1, le=65536)
    samples: int = Field(default=2, ge=1, le=65536)
    together: float = Field(default=0.5, ge=0, le=1)
    spread: float = Field(default=0.1, ge=0)
    views: int = Field(default=5, ge=1, le=65536)
    way: Way = "end-point"
    bank: BankConfig = BankConfig()
    tasks: StreamConfig = StreamConfig()
    base: BaseConfig = BaseConfig()
    training: LoopConfig = LoopConfig(
        steps=2500,
        learning_rate=1.5e-3,
        weight_decay=1e-4,
        clip=0.5,
        checkpoint_every=250,
        validate_every=1000,
    )
    seed: int = 0

    def draw_net(self, generator: torch.Generator) -> str:
        """A random kind of network, by its share of the steps."""
        shares = torch.tensor(list(self.nets.values()))
        return list(self.nets)[int(torch.multinomial(shares, 1, generator=generator))]

    def of(self, pools: Sequence[str]) -> AnyTaskConfig:
        """The same, of tasks from these pools: shares as they are, equal ones of others."""
        shares = {name: self.tasks.pools.get(name, 1 / len(pools)) for name in pools}
        tasks = self.tasks.model_copy(update={"pools": shares})
        return self.model_copy(update={"tasks": tasks})
