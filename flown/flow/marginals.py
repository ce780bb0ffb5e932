"""A zoo's trainings as trajectories: their checkpoints, epoch by epoch, are a flow's marginals.

Network i after epochs e_1 < ... < e_K is the path's knot at t_k = k / K; the flow then generates
networks of epoch e_k at t_k. Epochs that are counted from the last may differ from task to task. The
metric path learns its correction here, before the flow does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as File
from typing import Literal

import torch
from torch import Tensor, nn

from flown import flow
from flown.base.errors import FlownError
from flown.base.seeding import seeded
from flown.flow import Path, PathSample
from flown.training import TrainConfig, train
from flown.zoo.networks import Networks
from flown.zoo.rows import Row

PathName = Literal["linear", "piecewise", "spline", "metric"]
_POINTS = 512  # networks that show the metric where the data is


def trajectories(networks: Networks, asked: Sequence[int]) -> tuple[Tensor, tuple[float, ...]]:
    """Which rows (m, K) of `networks` are m trainings' checkpoints of K epochs, and the epochs.

    Args:
        asked: the config's epochs; -1 is the last, -2 the one before it. An epoch from 0 on must have been
            kept. Where all are negative and tasks kept different epochs, they name the epochs.

    Raises:
        FlownError: an epoch was not kept, a training lacks one or has two checkpoints of it, or
            there is one epoch only.
    """
    rows = [networks.zoo.rows[place] for place in networks.places]
    names = _names(rows, asked)
    found: dict[tuple[str, int], dict[float, int]] = {}
    for place, row in enumerate(rows):
        checkpoints = found.setdefault((row.task, row.model), {})
        epoch = names[row.task, row.epoch]
        if epoch in checkpoints:
            raise FlownError(
                f"{networks.zoo.path}: network {row.model} of task '{row.task}' has two checkpoints "
                f"of epoch {row.epoch:g}; a path needs one each"
            )
        checkpoints[epoch] = place
    epochs = tuple(sorted(set(names.values())))
    if missing := [e for e in asked if e >= 0 and e not in epochs]:
        raise FlownError(
            f"{networks.zoo.path}: epoch {missing[0]} was not kept; there are "
            f"{', '.join(f'{e:g}' for e in epochs)}"
        )
    for (task, model), checkpoints in found.items():
        if lacking := [e for e in epochs if e not in checkpoints]:
            raise FlownError(
                f"{networks.zoo.path}: network {model} of task '{task}' has no checkpoint of epoch "
                f"{lacking[0]:g}, which others have; choose epochs that all have"
            )
    if len(epochs) < 2:
        raise FlownError(
            f"{networks.zoo.path}: a path through checkpoints needs several epochs, there is "
            f"{epochs[0]:g} only; name more in `epochs`, or take flow.path linear"
        )
    return torch.tensor(
        [[checkpoints[e] for e in epochs] for checkpoints in found.values()]
    ), epochs


def _names(rows: Sequence[Row], asked: Sequence[int]) -> dict[tuple[str, float], float]:
    """The name of each task's epochs: the epoch itself, or its negative count from the last."""
    kept = {
        task: sorted({row.epoch for row in rows if row.task == task})
        for task in {row.task for row in rows}
    }
    counts = sorted(set(asked), reverse=True)
    alike = len({tuple(epochs) for epochs in kept.values()}) == 1
    if alike or not counts or counts[0] >= 0:
        return {(task, epoch): epoch for task, epochs in kept.items() for epoch in epochs}
    return {
        (task, epoch): float(count)
        for task, epochs in kept.items()
        for epoch, count in zip(reversed(epochs), counts, strict=False)
    }


def time_of(epoch: float, epochs: Sequence[float]) -> float:
    """The time at which a flow through `epochs` generates networks of `epoch`.

    Raises:
        FlownError: the flow does not pass through it.
    """
    if epoch not in epochs:
        known = ", ".join(f"{e:g}" for e in epochs) or "none: its path is linear"
        raise FlownError(f"until: the flow has no epoch {epoch:g}; it passes through {known}")
    return flow.knot_times(len(epochs))[list(epochs).index(epoch)]


class _PathObjective(nn.Module):
    """The energy of the metric path between random networks' marginals."""

    def __init__(
        self,
        path: flow.MetricPath,
        source: flow.Source,
        knots: Tensor,
        layouts: Tensor,
        batch: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.path, self.source, self.knots, self.layouts = path, source, knots, layouts
        self.batch = batch
        points = knots.flatten(0, 1).flatten(1)
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
        self.metric = flow.LandMetric(points[order[:_POINTS].to(points.device)])

    def forward(self, generator: torch.Generator) -> Tensor:
        rows = torch.randint(
            len(self.knots), (self.batch,), generator=generator, device=self.layouts.device
        )
        x0 = self.source.sample(self.layouts[rows], generator)
        t = torch.rand(self.batch, generator=generator, device=x0.device)
        return flow.energy(self.path(x0, self.knots[rows], t), self.metric)


def fit_path(
    name: PathName,
    source: flow.Source,
    knots: Tensor,
    layouts: Tensor,
    config: TrainConfig,
    *,
    out: File,
    seed: int,
    resume: bool,
    device: str,
) -> Path:
    """The path of that name (any but the linear one) through latents (m, K, *L) of layouts (m,).

    The metric path is trained, and saved in `out` during training.
    """
    times = flow.knot_times(knots.shape[1])
    if name != "metric":
        return flow.Piecewise(times) if name == "piecewise" else flow.Spline(times)
    with seeded(seed):
        path = flow.MetricPath(times, knots.shape[2:])
    objective = _PathObjective(path.to(device), source, knots, layouts, config.batch_size, seed)
    train(objective, config, out=out, name="path", seed=seed, resume=resume, device=device)

    @torch.no_grad()
    def learnt(x0: Tensor, marginals: Tensor, t: Tensor) -> PathSample:
        return PathSample(*path(x0, marginals, t))

    return learnt
