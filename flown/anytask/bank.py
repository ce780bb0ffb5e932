"""A bank of tasks and of the latents of networks for them: what the flow is matched with.

    x_1 = some steps of Adam on ce(network of x; support and queries), from a little noise

Base networks and decoders stay as they are. Only latents are kept: a draw's images follow from its
seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flown.anytask.config import BankConfig
from flown.anytask.model import AnyTask
from flown.anytask.writer import Writer
from flown.anytask.written import logits, seen
from flown.base.files import load_tensors, save_tensors
from flown.base.progress import bar
from flown.base.seeding import seeded
from flown.tasks import Episodes
from flown.tasks.draw import cpu_generator
from flown.tasks.stream import Draws
from flown.training import step_generator


class Entry(NamedTuple):
    """Latents (T, N + C, m) of networks of one kind for the tasks of one draw."""

    net: str
    seed: int
    x: Tensor


class Bank:
    """Entries, and the draws that their seeds are of."""

    def __init__(self, draws: Draws, entries: Sequence[Entry]) -> None:
        self.draws, self.entries = draws, list(entries)

    @classmethod
    def at(cls, path: Path, model: AnyTask, draws: Draws) -> Bank:
        """The bank of a file, found and written first if it is not there."""
        if not path.exists():
            _save(path, _find(model, draws))
        return cls(draws, _load(path))

    def next(self, generator: torch.Generator) -> tuple[str, Episodes, Tensor]:
        """A random entry, the classes of each task in a random order: network, tasks, latents."""
        net, seed, x = self.entries[int(torch.randint(len(self.entries), (), generator=generator))]
        tasks = self.draws.at(seed)
        order = torch.rand(tasks.classes.shape, generator=generator).argsort(dim=1)
        return net, *permuted(tasks, x, order)


def open_heads(model: AnyTask) -> None:
    """Gives class tokens a say in the rows of last layers, where decoders of zeros give them none.

    Latents have no gradient behind a decoder of zeros.
    """
    with seeded(model.config.seed), torch.no_grad():
        for net in model.config.nets:
            decoder = model.writer(net).head_decoder
            decoder.copy_(torch.randn(decoder.shape))


def error(writer: Writer, tasks: Episodes, x: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of the networks of x (T, N + C, m) on each task's own images, added up."""
    answers = torch.cat([tasks.labels, tasks.targets], dim=1)
    found = logits(writer, tasks, x, shares)[:, 0]
    summed: Tensor = F.cross_entropy(found.mT, answers, reduction="none").mean(dim=1).sum()
    return summed


def solve(
    writer: Writer,
    tasks: Episodes,
    shares: Tensor,
    config: BankConfig,
    numbers: int,
    generator: torch.Generator,
) -> Tensor:
    """Latents (T, N + C, m) of networks that get the tasks' images right."""
    shape = (len(tasks.labels), len(writer.neurons) + tasks.ways, numbers)
    x = config.start * torch.randn(shape, generator=generator, device=generator.device)
    x.requires_grad_()
    optimizer = torch.optim.Adam([x], config.learning_rate)
    for _ in range(config.steps):
        (x.grad,) = torch.autograd.grad(error(writer, tasks, x, shares), x)
        optimizer.step()
    return x.detach()


def permuted(tasks: Episodes, x: Tensor, order: Tensor) -> tuple[Episodes, Tensor]:
    """Tasks and latents whose class k is class `order[k]` (T, C) of what they were."""
    rows = torch.arange(len(order))[:, None]

    def moved(images: Tensor) -> Tensor:
        found: Tensor = images.unflatten(1, (tasks.ways, -1))[rows, order].flatten(1, 2)
        return found

    turned = Episodes.of(moved(tasks.support), moved(tasks.query), tasks.classes[rows, order])
    hidden, classes = x.split([x.shape[1] - tasks.ways, tasks.ways], dim=1)
    return turned, torch.cat([hidden, classes[rows, order]], dim=1)


def _find(model: AnyTask, draws: Draws) -> list[Entry]:
    config = model.config
    entries = []
    with bar("bank", config.bank.draws) as update:
        for i in range(config.bank.draws):
            generator = step_generator(config.seed, i, model.device)
            cpu = cpu_generator(generator)
            net = config.draw_net(cpu)
            seed = int(torch.randint(2**62, (), generator=cpu))
            tasks = draws.at(seed).to(model.device)
            with torch.no_grad():
                shares = seen(model, tasks, 1).shares
            writer = model.writer(net)
            x = solve(writer, tasks, shares, config.bank, config.numbers, generator)
            entries.append(Entry(net, seed, x.cpu()))
            update(i + 1, net)
    return entries


def _save(path: Path, entries: Sequence[Entry]) -> None:
    about = json.dumps([[entry.net, entry.seed] for entry in entries])
    save_tensors(path, {str(i): e.x for i, e in enumerate(entries)}, {"entries": about})


def _load(path: Path) -> list[Entry]:
    tensors, about = load_tensors(path)
    found = json.loads(about["entries"])
    return [Entry(net, seed, tensors[str(i)]) for i, (net, seed) in enumerate(found)]
