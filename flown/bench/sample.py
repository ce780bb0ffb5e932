"""Sampling against torchdiffeq's solver and a 1000-step DDPM."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from flown import data, flow
from flown.bench.timing import medians, timed_rows
from flown.diffusion import diffusion_loss, sample_ddpm
from flown.evaluate import evaluate as accuracy
from flown.fitting import Population, context_bank
from flown.model import Flown, shipped_zoo
from flown.provenance import Row
from flown.training import train
from flown.zoo import Zoo

STEPS = (1, 2, 5, 10, 20, 50, 100)


class _Loop(nn.Module):
    """Trains a network as eps_theta on a model's latents, in the flow's own training loop."""

    def __init__(self, model: Flown, network: nn.Module, latents: torch.Tensor,
                 tasks: torch.Tensor, bank: torch.Tensor) -> None:  # fmt: skip
        super().__init__()
        self.network, self.batch = network, model.config.flow_training.batch_size
        self.head = model.head
        self.latents, self.tasks, self.bank = latents, tasks, bank

    def forward(self, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(self.latents), (self.batch,), generator=generator)
        draws = torch.randint(self.bank.shape[1], (self.batch,), generator=generator)
        assert self.head is not None
        context = self.head(self.bank[self.tasks[rows], draws]).detach()
        return diffusion_loss(self.network, self.latents[rows], context, generator)


def sample(name: str, repeats: int, scratch: Path, networks: int = 100) -> list[Row]:
    """Sampling: ours against torchdiffeq's Euler and a 1000-step DDPM on the same network.

    The DDPM network has the flow's architecture and is trained on the same latents and contexts
    with the same settings for as many steps. Accuracies are of `networks` networks for the model's
    first task, on its test images.
    """
    from torchdiffeq import odeint

    model, zoo = Flown.from_pretrained(name), Zoo.open(shipped_zoo(name))
    images = {task: data.load(task) for task in zoo.tasks}
    people = Population.of(zoo, model.config.epochs)
    assert model.support is not None and model.head is not None
    bank = context_bank(model.support, images, model.tasks, model.classes, model.config)
    with torch.no_grad():
        latents = model.encoder.encode(people.train[torch.arange(len(people.train))])  # type: ignore[operator]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rival = flow.UNet(model.config.velocity, model.latent_shape, 128)
    loop = _Loop(model, rival, latents, people.train.tasks, bank)
    train(loop, model.config.flow_training, out=scratch, name="ddpm", resume=True)
    rival.requires_grad_(False)
    task = model.tasks[0]
    context = model.head(bank[:1, 0])
    test = images[task].test
    shape = (networks, *model.latent_shape)
    x0 = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    many = context.expand(networks, -1)

    def euler(steps: int) -> torch.Tensor:
        return flow.integrate(model.velocity.bind(context), x0, steps=steps).x

    def ddpm() -> torch.Tensor:
        return sample_ddpm(rival, shape, context, generator=torch.Generator().manual_seed(0)).x

    def theirs() -> torch.Tensor:
        grid = torch.linspace(0, 1, 101)
        return odeint(lambda t, x: model.velocity(x, t.expand(networks), many), x0, grid,  # type: ignore[no-any-return]
                      method="euler")[-1]  # fmt: skip

    with torch.no_grad():
        seconds = medians({"flown-euler-100": lambda: euler(100), "torchdiffeq-euler-100": theirs,
                            "ddpm-1000": ddpm}, repeats)  # fmt: skip
        rows = timed_rows(seconds, "flown-euler-100", networks)
        drawn = {"ddpm-1000": ddpm()} | {f"flown-euler-{s}": euler(s) for s in STEPS}
    for method, latent in drawn.items():
        values = accuracy(model.decode(latent, task), test.images, test.labels)
        rows.append({"dataset": task, "method": method, "metric": "accuracy",
                     "value": float(values.mean()), "std": float(values.std()), "n": networks,
                     "selection": "all", "epoch": None, "paper": None})  # fmt: skip
    return rows
