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
from flown.measure.reference import at_most
from flown.tasks import draw_support
from flown.zoo import Zoo

STEPS = (1, 2, 4, 10, 100)
_IMAGES = 2000  # test images, at most


def sample(name: str, repeats: int, device: str = "cpu", networks: int = 100) -> list[Row]:
    """Seconds for latents of `networks` networks, and their accuracy by number of steps.

    The DDPM has the flow's network: it costs as much a step, whatever it has learnt. Accuracies are
    for each of the model's tasks, from a support set of validation images, on test images.
    """
    from torchdiffeq import odeint

    model: Flown = Flown.from_pretrained(name).to(device)
    own = model.config.flow.steps
    x0 = torch.randn(networks, *model.space.shape, generator=torch.Generator().manual_seed(0))
    x0 = x0.to(device)
    with torch.no_grad():
        contexts = {task: _context(model, task) for task in model.tasks}
        velocity = model.velocity.bind(next(iter(contexts.values())))

        def ddpm() -> Tensor:
            return denoise(velocity, x0, generator=torch.Generator(device).manual_seed(1)).x

        def torchdiffeq_euler() -> Tensor:
            grid = torch.linspace(0, 1, 101, device=device)
            found: Tensor = odeint(lambda t, x: velocity(x, t), x0, grid, method="euler")
            return found[-1]

        candidates: dict[str, Callable[[], object]] = {
            f"flown-euler-{steps}": partial(flow.integrate, velocity, x0, steps=steps)
            for steps in (100, own, 1)
        }
        candidates |= {"torchdiffeq-euler-100": torchdiffeq_euler, "ddpm-1000": ddpm}
        rows = timed_rows(medians(candidates, repeats), "flown-euler-100", networks)
        for task, context in contexts.items():
            for steps in sorted({*STEPS, own}):
                latents = flow.integrate(model.velocity.bind(context), x0, steps=steps).x
                rows.append(_row(model, name, task, steps, latents))
    return rows


def _context(model: Flown, task: str) -> Tensor:
    """The context (1, 128) of a support set of a task's validation images."""
    images = data.load(model.tasks[task].dataset)
    draw = torch.Generator().manual_seed(0)
    support = draw_support(images.val, len(images.classes), model.config.context.shots, draw)
    assert model.head is not None
    context: Tensor = model.head(model.context(*support)[None])
    return context


def _row(model: Flown, name: str, task: str, steps: int, latents: Tensor) -> Row:
    layout = model.space.place(Zoo.open(shipped_zoo(name)).layout(task))
    test = at_most(data.load(model.tasks[task].dataset).test, _IMAGES)
    values = accuracy(model.decode(latents, layout), test.images, test.labels)
    return {
        "dataset": task,
        "method": f"flown-euler-{steps}",
        "metric": "accuracy",
        "value": float(values.mean()),
        "std": float(values.std()),
        "n": len(values),
        "selection": "all",
        "epoch": None,
        "paper": None,
    }
