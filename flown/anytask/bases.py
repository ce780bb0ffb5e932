"""Training the base networks: one body for all tasks, whose head the support set determines.

    loss = mean over kinds of networks ce(head(body(query)), y)
    head = s R,   R = ridge(body(support), labels)

What is shared by all tasks costs little here: no token writes, and every kind of network sees the
same draw. What a task changes in it is the flow's to learn.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.anytask.config import AnyTaskConfig
from flown.anytask.model import AnyTask, standardised
from flown.anytask.ridge import ridge, with_one
from flown.anytask.trunk import ImageEncoder
from flown.anytask.writer import Writer
from flown.anytask.written import of_queries
from flown.tasks import Episodes
from flown.tasks.stream import StreamConfig, TaskStream


class Bases(nn.Module):
    """The loss of one draw of tasks for the base networks, and for what reads support sets."""

    def __init__(self, model: AnyTask, stream: TaskStream) -> None:
        super().__init__()
        self.draws = stream.draws(_sizes(model.config, stream))
        # What the flow alone trains is not among these parameters.
        self.parts = nn.ModuleList([model.trunk.images])
        writers = [writer for writer in model.writers.values() if isinstance(writer, Writer)]
        self.heads = nn.ParameterList([writers[0].ridge.bias.detach().clone()])
        for writer in writers:
            self.parts += [writer.base, writer.units]
            self.heads.append(writer.ridge.bias)
        self._writers = writers  # a plain list: no module of this one

    def forward(self, generator: torch.Generator) -> Tensor:
        tasks = self.draws.next(generator).to(generator.device)
        losses = []
        for found in self.logits(tasks):
            losses.append(F.cross_entropy(found.flatten(0, 1), tasks.targets.flatten()))
        return torch.stack(losses).mean()

    def logits(self, tasks: Episodes) -> list[Tensor]:
        """Logits (T, Q, C) of queries by the image encoder's features and by each base network's.

        Args:
            tasks: float images in [0, 1].
        """
        images = torch.cat([tasks.support, tasks.query], dim=1)
        images = standardised(images, tasks.support)
        encoder = self.parts[0]
        assert isinstance(encoder, ImageEncoder)
        features = encoder(images.expand(-1, -1, 3, -1, -1).flatten(0, 1))
        found = [_classified(features.unflatten(0, images.shape[:2]), tasks, self.heads[0])]
        for writer in self._writers:
            tokens = len(writer.neurons) + tasks.ways
            x = images.new_zeros(len(images), tokens, len(writer.head_decoder))
            found.append(of_queries(writer, tasks, x)[:, 0])
        return found

    @torch.no_grad()
    def accuracies(self, tasks: Episodes) -> dict[str, float]:
        """Mean accuracy in percent of each kind of base network."""
        device = self.heads[0].device
        found: dict[str, list[Tensor]] = {writer.kind.net: [] for writer in self._writers}
        for start in range(0, len(tasks.labels), 8):
            some = tasks.part(slice(start, start + 8)).to(device)
            for hits, logits in zip(found.values(), self.logits(some)[1:], strict=True):
                hits.append((logits.argmax(-1) == some.targets).float().mean(dim=1).cpu())
        return {net: 100 * float(torch.cat(hits).mean()) for net, hits in found.items()}


def _classified(features: Tensor, tasks: Episodes, head: Tensor) -> Tensor:
    """Logits (T, Q, C) of queries, features (T, W K + Q, F) of supports and queries."""
    support, query = features.split([tasks.support.shape[1], tasks.query.shape[1]], dim=1)
    shrink, scale = head.exp()
    found: Tensor = scale * (with_one(query) @ ridge(support, tasks.labels, tasks.ways, shrink).mT)
    return found


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
