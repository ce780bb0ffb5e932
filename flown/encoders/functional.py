"""Do decoded networks compute what the networks they came from compute? An error of functions.

    p_i(x) = softmax(f(x; w_i) / T),  q_i(x) = softmax(f(x; w^_i) / T)     x: training images

    kl     = T^2 mean_{i, x} KL(p_i(x) || q_i(x))                          (Hinton et al. 1503.02531)
    ce     = mean_{i, x} -log q_i(x)_y                                     (T = 1), y the label of x
    spread = sum_{x, c} (s_q - s_p)^2 / sum_{x, c} s_p^2                   (T = 1)

with s_p(x, c) the deviation of class c's probability on image x over a batch's networks. Very
different weights compute the same function, and an encoder reconstructs the function of an unseen
network sooner than its weights. `ce` asks less: that decoded networks be accurate, whatever function
they compute. But one accurate function satisfies it for all networks, and the population's mean is the
best guess of a function that is known in part: under either term alone all decoded networks become
alike. `spread` asks that they differ from each other where the originals do, and by as much.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from flown.base.config import Config
from flown.tasks import Split
from flown.weights.batch import WeightBatch
from flown.weights.layout import JointLayout
from flown.weights.scale import NetworkScale

_TINY = 1e-6  # a variance whose root still has a gradient


class FunctionalConfig(Config):
    """Factors of the encoder's errors: `mse` of the weights', `kl`, `ce` and `spread` of the functions'.

    `images` are drawn anew at every step, the same ones for all networks of a task. Only `ce` looks
    at their labels.
    """

    mse: float = Field(default=1.0, ge=0)
    kl: float = Field(default=0.0, ge=0)
    ce: float = Field(default=0.0, ge=0)
    spread: float = Field(default=0.0, ge=0)
    images: int = Field(default=32, ge=1)
    temperature: float = Field(default=2.0, gt=0)

    @property
    def runs(self) -> bool:
        """Whether networks have to be run at all."""
        return self.kl > 0 or self.ce > 0 or self.spread > 0


class FunctionalError:
    """The functional part of the loss for networks of several tasks.

    Args:
        layouts: index of the networks' layout in `joint`, task by task.
        splits: training images, task by task.
        frozen: the tensors that networks of a subset share, task by task; empty for whole networks.
    """

    def __init__(
        self,
        config: FunctionalConfig,
        joint: JointLayout,
        scale: NetworkScale,
        layouts: Sequence[int],
        splits: Sequence[Split],
        frozen: Sequence[Mapping[str, Tensor]],
        device: str,
    ) -> None:
        self.config, self.joint, self.device = config, joint, device
        self.scale, self.layouts = copy.deepcopy(scale).to(device), layouts
        self.splits, self.frozen = splits, frozen

    def __call__(
        self, decoded: Tensor, vectors: Tensor, tasks: Tensor, generator: torch.Generator
    ) -> Tensor:
        """kl, ce and spread, weighted, of scaled vectors (n, D + 2 T) of tasks (n,), a scalar.

        Raises:
            FlownError: networks cannot be run: BatchNorm statistics are not known.
        """
        total = decoded.new_zeros(())
        layouts = torch.tensor(self.layouts, device=tasks.device)[tasks]
        found, wanted = (self.scale.invert(v, layouts) for v in (decoded, vectors))
        for task in tasks.unique().tolist():
            split, members = self.splits[task], tasks == task
            rows = torch.randint(
                len(split), (self.config.images,), generator=generator, device=self.device
            )
            drawn = split[rows.cpu()]
            images, labels = drawn.images.to(self.device), drawn.labels.to(self.device)
            with torch.no_grad():
                target = self._logits(wanted[members], task, images)
            logits = self._logits(found[members], task, images)
            total = total + members.sum() * self._error(logits, target, labels)
        return total / len(tasks)

    def _logits(self, raw: Tensor, task: int, images: Tensor) -> Tensor:
        index = self.layouts[task]
        layout = self.joint.layouts[index]
        batch = WeightBatch(layout, self.joint.extract(raw, index), frozen=self.frozen[task])
        return batch.logits(layout.architecture.preprocess(images))

    def _error(self, logits: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        c = self.config
        error = logits.new_zeros(())
        if c.kl:
            error = error + c.kl * divergence(logits, target, c.temperature)
        if c.ce:
            repeated = labels.expand(len(logits), -1).flatten()
            error = error + c.ce * F.cross_entropy(logits.flatten(0, 1), repeated)
        if c.spread and len(logits) > 1:
            error = error + c.spread * spread_error(logits, target)
        return error


def divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 KL(target || found) of logits (n, B, C), the mean over networks and images."""
    found, wanted = (F.log_softmax(x / temperature, dim=-1) for x in (logits, target))
    kl = (wanted.exp() * (wanted - found)).sum(dim=-1)
    return temperature**2 * kl.mean()


def spread_error(logits: Tensor, target: Tensor) -> Tensor:
    """How far networks' deviations from each other are from the target's, 1 where there are none.

    Args:
        logits, target: (n, B, C) of n > 1 networks.
    """
    found, wanted = (x.softmax(dim=-1).var(dim=0).add(_TINY).sqrt() for x in (logits, target))
    return (found - wanted).square().sum() / wanted.square().sum()
