"""Ways to train the flow: by what written networks compute, or by latents that are known.

    loss = (1 - a) mean_s ce(p_s, y) + a ce(mean_s p_s, y) - b min(|p_s - p_s'|_tv, 1 - p_y)

p_s = softmax f(query; w_s); the last term wants networks that differ, up to where they are wrong.
Where the network w_s is written from is what tells three ways apart:

    end-point           x_1^(x_t, t), x_t some Euler steps from noise, without gradient
    solver              all Euler steps from noise, with gradient
    point               x_1^(0, 0): no noise, one network a task

The first is the fine-tuning of the meta-model (FLoWN, section 4.4) over a stream of tasks, with its
gradient stopped at t; the second the same with t = 0. Two ways match the flow with a bank:

    matching            |x_1^(x_t, t) - x_1|^2,  x_t = (1 - t) x_0 + t x_1
    matching-function   the same + ce(network of x_1^(x_t, t))

Matching alone leaves base networks and decoders as the bank found them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.anytask.bank import Bank, open_heads
from flown.anytask.model import AnyTask
from flown.anytask.writer import Writer
from flown.anytask.written import of_queries, seen
from flown.tasks.draw import cpu_generator
from flown.tasks.stream import Draws, TaskStream

# Latents to write from: of a model, a writer and class tokens (n, C, width), (n, N + C, m).
Ends = Callable[[AnyTask, Writer, Tensor, torch.Generator], Tensor]


def objective(model: AnyTask, stream: TaskStream, out: Path) -> nn.Module:
    """The loss of the model's way, once its base networks are trained.

    Args:
        out: where a way that matches keeps its bank.
    """
    draws, way = stream.draws(), model.config.way
    if way in ENDS:
        return Judged(model, draws, ENDS[way])
    open_heads(model)
    bank = Bank.at(out / "bank.safetensors", model, draws)
    return Matched(model, bank, judged=way == "matching-function")


def stopped(model: AnyTask, writer: Writer, classes: Tensor, generator: torch.Generator) -> Tensor:
    """The end point seen from a random time, at which the gradient stops."""
    steps = model.config.steps
    until = int(torch.randint(steps, (), generator=generator, device=generator.device))
    x = model.start(writer, classes, generator)
    with torch.no_grad():
        x = model.solve(x, writer.neurons, classes, steps, until)
    return model.end(x, until / steps, writer.neurons, classes)


def through(model: AnyTask, writer: Writer, classes: Tensor, generator: torch.Generator) -> Tensor:
    """The last of all Euler steps; of a model without noise there is one."""
    steps = 1 if model.config.way == "point" else model.config.steps
    x = model.start(writer, classes, generator)
    return model.solve(x, writer.neurons, classes, steps, steps)


ENDS: dict[str, Ends] = {"end-point": stopped, "solver": through, "point": through}


class Judged(nn.Module):
    """The loss of one draw of tasks for one kind of network, judged on queries."""

    def __init__(self, model: AnyTask, draws: Draws, ends: Ends) -> None:
        super().__init__()
        self.model, self.draws, self.ends = model, draws, ends
        model.trunk.gate.requires_grad_(False)  # the base networks' training has fitted it
        # Without noise, networks of a task are all the same.
        self.samples = 1 if model.config.way == "point" else model.config.samples

    def forward(self, generator: torch.Generator) -> Tensor:
        config, cpu = self.model.config, cpu_generator(generator)
        net = config.draw_net(cpu)
        tasks, writer = self.draws.next(cpu).to(self.model.device), self.model.writer(net)
        classes, shares = seen(self.model, tasks, self.samples)
        found = of_queries(writer, tasks, self.ends(self.model, writer, classes, generator), shares)
        log_p = found.log_softmax(dim=-1)  # (T, s, Q, C)
        apart = -log_p.gather(-1, _places(log_p, tasks.targets)).mean()
        mean = log_p.logsumexp(dim=1) - math.log(self.samples)
        together = -mean.gather(-1, tasks.targets[..., None]).mean()
        loss: Tensor = (1 - config.together) * apart + config.together * together
        return loss - config.spread * _spread(log_p.exp(), tasks.targets)


class Matched(nn.Module):
    """The loss of the tasks of one entry of a bank.

    Args:
        judged: by what is written from the predicted end points, too.
    """

    def __init__(self, model: AnyTask, bank: Bank, judged: bool) -> None:
        super().__init__()
        self.model, self.bank, self.judged = model, bank, judged
        model.trunk.gate.requires_grad_(False)  # as above
        if not judged:  # what gets no gradient is not trained
            for net in model.config.nets:
                writer = model.writer(net)
                writer.requires_grad_(False)
                writer.neurons.requires_grad_(True)

    def forward(self, generator: torch.Generator) -> Tensor:
        device, samples = self.model.device, self.model.config.samples
        net, tasks, x_1 = self.bank.next(cpu_generator(generator))
        tasks, writer = tasks.to(device), self.model.writer(net)
        classes, shares = seen(self.model, tasks, samples)
        x_1 = x_1.to(device).repeat_interleave(samples, dim=0)
        x_0 = self.model.start(writer, classes, generator)
        t = torch.rand(len(x_0), generator=generator, device=device)
        x_t = x_0 + t[:, None, None] * (x_1 - x_0)
        end = self.model.trunk(x_t, t, writer.neurons, classes)
        loss: Tensor = (end - x_1).square().mean()
        if self.judged:
            found = of_queries(writer, tasks, end, shares).movedim(-1, 1)  # (T, C, s, Q)
            loss = loss + F.cross_entropy(found, tasks.targets[:, None].expand(-1, samples, -1))
        return loss


def _spread(p: Tensor, targets: Tensor) -> Tensor:
    """How far two networks of a task are apart, at most as far as they are from the truth."""
    away = (p - p.roll(1, dims=1)).abs().sum(dim=-1).mean(dim=(1, 2)) / 2  # (T,)
    wrong = 1 - p.detach().gather(-1, _places(p, targets)).mean(dim=(1, 2, 3))
    return torch.minimum(away, wrong).mean()


def _places(p: Tensor, targets: Tensor) -> Tensor:
    """Where the targets (T, Q) stand in (T, s, Q, C), as (T, s, Q, 1)."""
    return targets[:, None, :, None].expand(-1, p.shape[1], -1, -1)
