"""DDPM and DDIM on the same latent and the same network: the baselines p-diff and D2NWG.

    z_k = sqrt(a_k) x_1 + sqrt(1 - a_k) eps,   k = 0 .. K - 1,   eps ~ N(0, I)
    loss = E |net(z_k, t; c) - target|^2,     t = 1 - (k + 1) / K

The network's target takes the velocity's place; its time t runs as the flow's does, noise at 0 and
weights at 1. Without context this is p-diff, with context D2NWG. Processes differ in target and betas:

    diffusion          eps                    betas linear from 1e-4 to 0.02, K = 1000
                                              (Ho et al. 2006.11239), what p-diff publishes
    latent-diffusion   eps                    their roots linear, from 0.0015 to 0.0155, K = 1024
                                              (Rombach et al. 2112.10752), what D2NWG publishes
    v-diffusion        sqrt(a_k) eps - sqrt(1 - a_k) x_1, betas as the first
                                              (Salimans and Ho 2202.00512)

An estimate of x_1 by noise, (z - sqrt(1 - a) eps_hat) / sqrt(a), magnifies the network's error: by the
cosine schedule up to 20000 times, which images survive by clipping to [-1, 1]; standardised latents have
no such bounds and are not clipped. Betas of the first kind leave a factor of 157, of the second 42, much
for a network after a short training; x_1 = sqrt(a_k) z_k - sqrt(1 - a_k) v magnifies nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flown.base.errors import FlownError, unknown
from flown.flow import Solution, dropped
from flown.flow.velocity import BoundVelocity


class Process(NamedTuple):
    """How a network is trained, in the words of diffusers."""

    prediction_type: str = "epsilon"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    num_train_timesteps: int = 1000


PROCESSES = {
    "diffusion": Process(),
    "v-diffusion": Process("v_prediction"),
    "latent-diffusion": Process("epsilon", 0.0015, 0.0155, "scaled_linear", 1024),
}
# Samplers, by their class in diffusers.
SAMPLERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler"}


def diffusion_loss(
    net: Callable[..., Tensor],
    x1: Tensor,
    context: Tensor | None,
    generator: torch.Generator | None = None,
    process: str = "diffusion",
) -> Tensor:
    """Mean squared error of what the network predicts, a scalar.

    Args:
        net: called as net(z (B, *L), t (B,), context).
        x1: data (B, *L) of unit scale.
        context: (B, C) or None.
        generator: of the noise levels, the noise and the dropped contexts.
        process: one of `PROCESSES`.
    """
    levels = PROCESSES[process].num_train_timesteps
    k = torch.randint(levels, (len(x1),), generator=generator, device=x1.device)
    eps = torch.randn(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
    a = _alphas(process).to(x1)[k].view(-1, *[1] * (x1.ndim - 1))  # (B, 1, ...)
    z = a.sqrt() * x1 + (1 - a).sqrt() * eps
    by_noise = PROCESSES[process].prediction_type == "epsilon"
    target = eps if by_noise else a.sqrt() * eps - (1 - a).sqrt() * x1
    found = net(z, _time(k, levels, x1), context, **dropped(net, context, generator))
    return (found - target).square().mean()


@torch.no_grad()
def denoise(
    net: BoundVelocity,
    x0: Tensor,
    sampler: str = "ddpm",
    steps: int | None = None,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
    process: str = "diffusion",
) -> Solution:
    """Follows the noise x0 back to data.

    Args:
        net: net(z (n, *L), t ()), its condition already bound.
        x0: noise N(0, I), (n, *L).
        sampler: `ddpm` draws new noise at every step (Ho et al.), `ddim` none (Song et al., eta 0).
        steps: noise levels, 1 to all of the process, by default all; evenly spaced if `even_steps`.
        generator: of the steps' noise.
        trajectory: keep the states at all levels.
        process: what `net` was trained as, one of `PROCESSES`.

    Raises:
        FlownError: unknown sampler, `diffusers` is missing, steps out of range, or NaN or Inf in
            the result.
    """
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    levels = PROCESSES[process].num_train_timesteps
    steps = levels if steps is None else steps
    if not 1 <= steps <= levels:
        raise FlownError(f"{sampler}: steps must be between 1 and {levels}, got {steps}")
    scheduler = _scheduler(sampler, process)
    scheduler.set_timesteps(steps)
    z, path = x0, [x0]
    for k in scheduler.timesteps:
        z = scheduler.step(net(z, _time(k, levels, z)), k, z, generator=generator).prev_sample
        if trajectory:
            path.append(z)
    if not torch.isfinite(z).all():
        raise FlownError(f"{sampler}, steps {steps}: the result holds NaN or Inf; check the loss")
    times = torch.cat([_time(scheduler.timesteps, levels, z), torch.ones(1, device=z.device)])
    nfe = len(scheduler.timesteps) * getattr(net, "evaluations", 1)
    return Solution(z, nfe, times, torch.stack(path) if trajectory else None)


def even_steps(process: str, least: int) -> int:
    """So many steps or a few more that divide a process's levels: diffusers skips some otherwise."""
    levels = PROCESSES[process].num_train_timesteps
    return next(steps for steps in range(min(least, levels), levels + 1) if levels % steps == 0)


def _time(k: Tensor, levels: int, like: Tensor) -> Tensor:
    """The flow's time of noise level k."""
    return (1 - (k + 1) / levels).to(like)


@lru_cache
def _alphas(process: str) -> Tensor:
    alphas: Tensor = _scheduler("ddpm", process).alphas_cumprod
    return alphas


def _scheduler(sampler: str, process: str) -> Any:
    try:
        import diffusers
    except ImportError:
        raise FlownError(
            "diffusion: the package 'diffusers' is missing; pip install 'flown[diffusion]'"
        ) from None
    # "trailing" starts at pure noise for any number of steps, which is where samples start.
    scheduler = getattr(diffusers, SAMPLERS[sampler])
    return scheduler(**PROCESSES[process]._asdict(), clip_sample=False, timestep_spacing="trailing")
