"""Sampling against torchdiffeq's solver and a 1000-step DDPM."""

from __future__ import annotations

from pathlib import Path

import torch

from flown import flow
from flown import tasks as data
from flown.base.provenance import Row
from flown.bench.timing import medians, timed_rows
from flown.context.tokens import Contexts
from flown.flow.diffusion import denoise
from flown.generator.config import FlowConfig
from flown.generator.data import TrainingSet
from flown.generator.files import shipped_zoo
from flown.generator.fit import fit_flow
from flown.generator.model import Flown
from flown.measure.evaluate import evaluate as accuracy
from flown.zoo import Zoo

STEPS = (1, 2, 5, 10, 20, 50, 100)


def sample(name: str, repeats: int, scratch: Path, networks: int = 100) -> list[Row]:
    """Sampling by this library, by torchdiffeq's Euler and by a 1000-step DDPM.

    The DDPM network has the flow's architecture and is trained on the same latents and contexts
    with the same settings for as many steps. Accuracies are of `networks` networks for the model's
    first task, on its test images.
    """
    from torchdiffeq import odeint

    model, zoo = Flown.from_pretrained(name), Zoo.open(shipped_zoo(name))
    images = {task: data.load(task) for task in zoo.tasks}
    assert model.support is not None and model.head is not None
    known = list(model.tasks.values())
    contexts = Contexts(model.support, known, images, model.config.context, model.classes)
    config = model.config.model_copy(update={"flow": FlowConfig(process="diffusion")})
    learnt = TrainingSet.of(zoo, config.epochs)
    parts = fit_flow(learnt, model.space, model.source(), contexts, config, scratch, True, "cpu")
    rival, head = parts.velocity, parts.head
    assert head is not None
    task, one = known[0].id, contexts.sets([0], torch.Generator().manual_seed(0))
    context = model.head(one)
    test = images[task].test
    x0 = torch.randn(networks, *model.space.shape, generator=torch.Generator().manual_seed(0))
    many = context.expand(networks, -1)

    def euler(steps: int) -> torch.Tensor:
        return flow.integrate(model.velocity.bind(context), x0, steps=steps).x

    def ddpm() -> torch.Tensor:
        eps, generator = rival.bind(head(one)), torch.Generator().manual_seed(1)
        return denoise(eps, x0, generator=generator).x

    def torchdiffeq_euler() -> torch.Tensor:
        grid = torch.linspace(0, 1, 101)
        found: torch.Tensor = odeint(
            lambda t, x: model.velocity(x, t.expand(networks), many), x0, grid, method="euler"
        )
        return found[-1]

    with torch.no_grad():
        seconds = medians(
            {
                "flown-euler-100": lambda: euler(100),
                "torchdiffeq-euler-100": torchdiffeq_euler,
                "ddpm-1000": ddpm,
            },
            repeats,
        )
        rows = timed_rows(seconds, "flown-euler-100", networks)
        drawn = {"ddpm-1000": ddpm()} | {f"flown-euler-{s}": euler(s) for s in STEPS}
    for method, latent in drawn.items():
        values = accuracy(
            model.decode(latent, model.space.place(zoo.layout(task))),
            test.images,
            test.labels,
        )
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
