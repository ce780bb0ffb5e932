"""From x_0 to generated networks, by integrating a flow or denoising a diffusion."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flown.base.errors import FlownError
from flown.flow import SOLVERS, Solution, integrate
from flown.flow.diffusion import SAMPLERS, denoise
from flown.flow.velocity import BoundVelocity
from flown.weights.batch import WeightBatch


class Samples(NamedTuple):
    """Generated networks; their latents and source samples (n, *L) and path (T+1, n, *L)."""

    batch: WeightBatch
    latents: Tensor
    source: Tensor
    path: Tensor | None
    times: Tensor
    nfe: int
    seconds: float


def solve(
    process: str,
    network: BoundVelocity,
    x0: Tensor,
    solver: str,
    steps: int,
    generator: torch.Generator,
    trajectory: bool,
    end: float = 1.0,
) -> Solution:
    """Follows x0 (n, *L) to latents.

    Args:
        process: `flow`, or one of `diffusion.PROCESSES`: what `network` was trained as.
        steps: on [0, 1]; a flow takes those before `end`, a diffusion runs to 1.

    Raises:
        FlownError: the solver is unknown or of the other process, or as `integrate`, `denoise`.
    """
    allowed, other = (SOLVERS, SAMPLERS) if process == "flow" else (SAMPLERS, SOLVERS)
    if solver in other:
        raise FlownError(
            f"solver '{solver}': this model was trained as a {process}; choose {', '.join(allowed)}"
        )
    if process == "flow":
        before_end = max(1, round(steps * end)) if steps > 0 else steps  # `integrate` refuses 0
        return integrate(network, x0, solver, before_end, 0.0, end, trajectory)
    return denoise(network, x0, solver, steps, generator, trajectory, process)
