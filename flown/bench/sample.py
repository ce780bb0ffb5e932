"""Sampling: the model's own steps, a hundred of Euler, torchdiffeq's solver, a 1000-step DDPM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flown import flow
from flown import tasks as data
from flown.base.provenance import Row
from flown.bench.timing import medians, timed_rows
from flown.flow.diffusion import denoise
from flown.generator.files import shipped_zoo
from flown.generator.model import Flown
from flown.measure.evaluate import evaluate as accuracy
from flown.tasks import draw_support
from flown.zoo import Zoo

STEPS = (1, 2, 4, 10, 100)
_BASE = "flown-euler-100"


def sample(name: str, repeats: int, device: str = "cpu", networks: int = 100) -> list[Row]:
    """Seconds for latents of `networks` networks, and their accuracy by number of steps.

    The DDPM has the flow's network: it costs as much a step, whatever it has learnt. Accuracies are
    for the model's first task, from a support set of validation images, on test images.
    """
    from torchdiffeq import odeint

    model: Flown = Flown.from_pretrained(name).to(device)
    zoo = Zoo.open(shipped_zoo(name))
    task, own = next(iter(model.tasks)), model.config.flow.steps
    images = data.load(model.tasks[task].dataset)
    generator = torch.Generator().manual_seed(0)
    shots = model.config.context.shots
    support = draw_support(images.val, len(images.classes), shots, generator)
    assert model.head is not None
    x0 = torch.randn(networks, *model.space.shape, generator=generator).to(device)
    with torch.no_grad():
        context = model.head(model.context(*support)[None])
        velocity = model.velocity.bind(context)

        def euler(steps: int) -> Tensor:
            return flow.integrate(velocity, x0, steps=steps).x

        def ddpm() -> Tensor:
            noise = torch.Generator(device).manual_seed(1)
            return denoise(velocity, x0, generator=noise).x

        def torchdiffeq_euler() -> Tensor:
            grid = torch.linspace(0, 1, 101, device=device)
            found: Tensor = odeint(lambda t, x: velocity(x, t), x0, grid, method="euler")
            return found[-1]

        candidates: dict[str, Callable[[], object]] = {
            _BASE: partial(euler, 100),
            f"flown-euler-{own}": partial(euler, own),
            "flown-euler-1": partial(euler, 1),
            "torchdiffeq-euler-100": torchdiffeq_euler,
            "ddpm-1000": ddpm,
        }
        seconds = medians(candidates, repeats)
        drawn = {f"flown-euler-{s}": euler(s) for s in sorted({*STEPS, own})}
    rows = timed_rows(seconds, _BASE, networks)
    layout = model.space.place(zoo.layout(task))
    for method, latents in drawn.items():
        values = accuracy(model.decode(latents, layout), images.test.images, images.test.labels)
        rows.append(
            {
                "dataset": task,
                "method": method,
                "metric": "accuracy",
                "value": float(values.mean()),
                "std": float(values.std()),
                "n": networks,
                "selection": "all",
                "epoch": None,
                "paper": None,
            }
        )
    return rows
