"""Training the base networks: one body for all tasks, whose head the support set determines.

    loss = sum over kinds of networks ce(head(body(query)), y) / number of kinds
    head = s R,   R = ridge(body(support), labels)
    body = base networks for strokes and for pictures, mixed by what the support set seems to be

What is shared by all tasks costs little here: no token writes, and the kinds of networks see the
same draws, each of them as many as its share allows. What a task changes in it is the flow's to
learn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.anytask.config import AnyTaskConfig
from flown.anytask.model import AnyTask, standardised
from flown.anytask.ridge import ridge, with_one
from flown.anytask.writer import Writer
from flown.anytask.written import of_queries
from flown.tasks import Episodes
from flown.tasks.draw import cpu_generator
from flown.tasks.stream import StreamConfig, TaskStream


class Bases(nn.Module):
    """The loss of one draw of tasks for the base networks, and for what reads support sets."""

    def __init__(self, model: AnyTask, stream: TaskStream) -> None:
        super().__init__()
        self.config = model.config
        self.draws = stream.draws(_sizes(model.config, stream))
        # What the flow alone trains is not among these parameters.
        self.encoder = model.trunk.images
        self.parts = nn.ModuleList()
        writers = [model.writer(net) for net in model.config.nets]
        self.gate = model.trunk.gate
        self.heads = nn.ParameterList([writers[0].regression[0].detach().clone()])
        for writer in writers:
            self.parts += [writer.base, writer.units]
            self.heads.append(writer.regression)
        self._writers = writers  # a plain list: no module of this one

    def forward(self, generator: torch.Generator) -> Tensor:
        cpu, shares = cpu_generator(generator), self.config.nets
        drawn, pictures = self.draws.drawn(cpu_generator(cpu).initial_seed())
        tasks, pictures = drawn.to(generator.device), pictures.to(generator.device)
        most, images = max(shares.values()), _seen(tasks)
        log_p = self.gate(images)
        mixed = log_p.detach().exp()
        losses = [F.nll_loss(log_p, pictures.long())] if log_p.shape[1] > 1 else []
        for writer in self._writers:
            if most * torch.rand((), generator=cpu) < shares[writer.kind.net]:
                losses.append(_loss(_logits(writer, tasks, mixed), tasks.targets))
        if torch.rand((), generator=cpu) < self.config.base.encoder:
            losses.append(_loss(self._read(tasks), tasks.targets))
        return torch.stack(losses).sum() / len(self.heads)

    def _read(self, tasks: Episodes) -> Tensor:
        """Logits (T, Q, C) of queries by the image encoder's features."""
        images = standardised(torch.cat([tasks.support, tasks.query], dim=1), tasks.support)
        features = self.encoder(images.expand(-1, -1, 3, -1, -1).flatten(0, 1))
        count, shape = tasks.support.shape[1], images.shape[:2]
        support, query = features.unflatten(0, shape).split([count, shape[1] - count], dim=1)
        shrink, scale = self.heads[0].exp()
        rows = scale * ridge(support, tasks.labels, tasks.ways, shrink)
        found: Tensor = with_one(query) @ rows.mT
        return found

    @torch.no_grad()
    def accuracies(self, tasks: Episodes) -> dict[str, float]:
        """Mean accuracy in percent of each kind of base network."""
        device = self.heads[0].device
        found: dict[str, list[Tensor]] = {writer.kind.net: [] for writer in self._writers}
        for start in range(0, len(tasks.labels), 8):
            some = tasks.part(slice(start, start + 8)).to(device)
            mixed = self.gate(_seen(some)).exp()
            for writer in self._writers:
                right = _logits(writer, some, mixed).argmax(-1) == some.targets
                found[writer.kind.net].append(right.float().mean(dim=1).cpu())
        return {net: 100 * float(torch.cat(hits).mean()) for net, hits in found.items()}


def _logits(writer: Writer, tasks: Episodes, shares: Tensor) -> Tensor:
    """Logits (T, Q, C) of queries by a base network, which no token changes."""
    tokens = len(writer.neurons) + tasks.ways
    x = tasks.support.new_zeros(len(tasks.labels), tokens, len(writer.head_decoder))
    return of_queries(writer, tasks, x, shares)[:, 0]


def _seen(tasks: Episodes) -> Tensor:
    """Support images (T, K, 3, 32, 32) as the gate sees them."""
    return standardised(tasks.support, tasks.support).expand(-1, -1, 3, -1, -1)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (T, Q, C) with targets (T, Q)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _sizes(config: AnyTaskConfig, stream: TaskStream) -> StreamConfig:
    """Sizes of the tasks: of half of the images the classes are given, of the others asked."""
    base = config.base
    half = base.images // 2
    ways = min(base.ways, stream.fewest)
    return config.tasks.model_copy(
        update={
            "ways": ways,
            "shots": base.shots,
            "support": half,
            "queries": half,
            "images": base.images,
        }
    )
