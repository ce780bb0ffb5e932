"""Diffusion baselines on the same latent and network: DDPM and DDIM (p-diff, D2NWG).

    x_t = sqrt(a_t) x_1 + sqrt(1 - a_t) eps,   L = E |eps_theta(x_t, t; c) - eps|^2

(Ho et al. 2006.11239; Song et al. 2010.02502.) Here x_1 is the clean latent, as in the flow, and
diffusion time runs over 1000 steps. Schedulers are those of `diffusers` (extra `diffusion`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flown.errors import FlownError
from flown.flow.solve import Solution

TRAIN_STEPS = 1000


def _scheduler(kind: Literal["ddpm", "ddim"]) -> Any:
    try:
        from diffusers import DDIMScheduler, DDPMScheduler
    except ImportError:
        raise FlownError("diffusion baselines need diffusers: pip install 'flown[diffusion]'") from None
    cls = DDPMScheduler if kind == "ddpm" else DDIMScheduler
    return cls(num_train_timesteps=TRAIN_STEPS, beta_schedule="squaredcos_cap_v2", clip_sample=False)


class DiffusionLoss(nn.Module):
    """The simple loss of noise prediction, for a velocity network used as eps_theta."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.alphas: Tensor = _scheduler("ddpm").alphas_cumprod

    def forward(self, x1: Tensor, context: Tensor | None, generator: torch.Generator) -> Tensor:
        """The loss for latents (B, *L) and contexts (B, C)."""
        device = x1.device
        t = torch.randint(TRAIN_STEPS, (len(x1),), generator=generator, device=device)
        eps = torch.randn(x1.shape, generator=generator, device=device)
        a = self.alphas.to(device)[t].view(-1, *[1] * (x1.ndim - 1))
        predicted = self.network(a.sqrt() * x1 + (1 - a).sqrt() * eps, t / TRAIN_STEPS, context)
        return (predicted - eps).square().mean()


@torch.no_grad()
def sample(network: Any, shape: Sequence[int], context: Tensor | None, *,
           kind: Literal["ddpm", "ddim"] = "ddpm", steps: int = TRAIN_STEPS,
           generator: torch.Generator) -> Solution:  # fmt: skip
    """Latents (n, *L) by ancestral sampling (ddpm) or deterministically (ddim).

    Raises:
        FlownError: `diffusers` is not installed, or more steps than were trained for.
    """
    if not 1 <= steps <= TRAIN_STEPS:
        raise FlownError(f"diffusion: steps must lie in 1..{TRAIN_STEPS}, got {steps}")
    scheduler = _scheduler(kind)
    scheduler.set_timesteps(steps)
    predict = network.bind(context)
    x = torch.randn(*shape, generator=generator, device=generator.device)
    for t in scheduler.timesteps:
        eps = predict(x, t.float() / TRAIN_STEPS)
        x = scheduler.step(eps, t, x, generator=generator).prev_sample
    return Solution(x, len(scheduler.timesteps), scheduler.timesteps, None)
