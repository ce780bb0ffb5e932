"""DDPM and DDIM on the same latent and the same network: the baselines p-diff and D2NWG.

    z_k = sqrt(a_k) x_1 + sqrt(1 - a_k) eps,   k = 0 .. 999,   eps ~ N(0, I)
    loss = E |net(z_k, t; c) - target|^2,     t = 1 - (k + 1) / 1000

The network's target takes the velocity's place; its time t runs as the flow's does, noise at 0 and
weights at 1. Without context this is p-diff, with context D2NWG. Two processes differ in the target:

    diffusion     eps                                    (Ho et al. 2006.11239), what both publish
    v-diffusion   v = sqrt(a_k) eps - sqrt(1 - a_k) x_1  (Salimans and Ho 2202.00512)

Betas are linear from 1e-4 to 0.02. The cosine schedule ends at a_999 = 2e-9, where an estimate of
x_1, (z - sqrt(1 - a) eps_hat) / sqrt(a), magnifies the network's error 20000 times; images
survive that by clipping to [-1, 1], standardised latents have no such bounds and are not clipped.
The linear schedule's a_999 = 4e-5 leaves a factor of 157, too much for a network after a short
training; x_1 = sqrt(a_k) z_k - sqrt(1 - a_k) v magnifies nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flown.base.errors import FlownError, unknown
from flown.flow import Solution, dropped
from flown.flow.velocity import BoundVelocity

TRAIN_STEPS = 1000
# Processes, by their prediction type in diffusers; samplers, by their class there.
PREDICTIONS = {"diffusion": "epsilon", "v-diffusion": "v_prediction"}
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
        process: one of `PREDICTIONS`.
    """
    k = torch.randint(TRAIN_STEPS, (len(x1),), generator=generator, device=x1.device)
    eps = torch.randn(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
    a = _alphas().to(x1)[k].view(-1, *[1] * (x1.ndim - 1))  # (B, 1, ...)
    z = a.sqrt() * x1 + (1 - a).sqrt() * eps
    target = eps if process == "diffusion" else a.sqrt() * eps - (1 - a).sqrt() * x1
    found = net(z, _time(k, x1), context, **dropped(net, context, generator))
    return (found - target).square().mean()


@torch.no_grad()
def denoise(
    net: BoundVelocity,
    x0: Tensor,
    sampler: str = "ddpm",
    steps: int = TRAIN_STEPS,
    generator: torch.Generator | None = None,
    trajectory: bool = False,
    process: str = "diffusion",
) -> Solution:
    """Follows the noise x0 back to data.

    Args:
        net: net(z (n, *L), t ()), its condition already bound.
        x0: noise N(0, I), (n, *L).
        sampler: `ddpm` draws new noise at every step (Ho et al.), `ddim` none (Song et al., eta 0).
        steps: 1 to 1000, evenly spaced noise levels.
        generator: of the steps' noise.
        trajectory: keep the states at all levels.
        process: what `net` was trained as, one of `PREDICTIONS`.

    Raises:
        FlownError: unknown sampler, `diffusers` is missing, steps out of range, or NaN or Inf in
            the result.
    """
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    if not 1 <= steps <= TRAIN_STEPS:
        raise FlownError(f"{sampler}: steps must be between 1 and {TRAIN_STEPS}, got {steps}")
    scheduler = _scheduler(sampler, PREDICTIONS[process])
    scheduler.set_timesteps(steps)
    z, path = x0, [x0]
    for k in scheduler.timesteps:
        z = scheduler.step(net(z, _time(k, z)), k, z, generator=generator).prev_sample
        if trajectory:
            path.append(z)
    if not torch.isfinite(z).all():
        raise FlownError(f"{sampler}, steps {steps}: the result holds NaN or Inf; check the loss")
    times = torch.cat([_time(scheduler.timesteps, z), torch.ones(1, device=z.device)])
    nfe = len(scheduler.timesteps) * getattr(net, "evaluations", 1)
    return Solution(z, nfe, times, torch.stack(path) if trajectory else None)


def _time(k: Tensor, like: Tensor) -> Tensor:
    """The flow's time of noise level k."""
    return (1 - (k + 1) / TRAIN_STEPS).to(like)


@lru_cache
def _alphas() -> Tensor:
    alphas: Tensor = _scheduler("ddpm").alphas_cumprod
    return alphas


def _scheduler(sampler: str, prediction: str = "epsilon") -> Any:
    try:
        import diffusers
    except ImportError:
        raise FlownError(
            "diffusion: the package 'diffusers' is missing; pip install 'flown[diffusion]'"
        ) from None
    # "trailing" starts at pure noise for any number of steps, which is where samples start.
    scheduler = getattr(diffusers, SAMPLERS[sampler])
    return scheduler(
        TRAIN_STEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type=prediction,
        timestep_spacing="trailing",
    )
