"""Support sets of training's tasks as class tokens.

    features of a data set's images, computed once --draw k of each class--> tokens (classes, width)

A task is a choice of classes and a rotation. Where tasks are few, each has so many numbered support sets,
which follow from their numbers and are encoded once: a step of the flow's training takes half the time.
Of many tasks, sets are drawn afresh at every step. All are training images; evaluation draws its support
sets from the validation part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.context.support import TOKENS, SupportEncoder, pick_queries, token_width
from flown.tasks import ClassPool, ImageData, ManyClass, Split, Task
from flown.tasks.draw import cpu_generator

_KEPT = 2**25  # numbers that are kept, in all support sets' tokens: 128 MiB

Images: TypeAlias = Mapping[str, "ImageData | ManyClass"]


class ContextConfig(Config):
    """How support sets condition the flow.

    A support set of `shots` images a class becomes one token a class: `caml`'s output for it (the
    paper's), or the `centroid` of its features. `mode` makes one vector of the tokens: the paper's
    class-ordered concatenation, or an order-free mean. Every step of training sees `draws` support sets
    (of more tasks, one a task) from at most `per_class` images of a class; where tasks are few, of `sets`
    for each task. With `permute`, classes change places at random: tokens and the networks' outputs
    together.
    """

    mode: Literal["ordered", "mean", "none"] = "ordered"
    tokens: Literal["caml", "centroid"] = "caml"
    shots: int = Field(default=5, ge=1)
    draws: int = Field(default=8, ge=1)
    sets: int = Field(default=256, ge=1)
    per_class: int = Field(default=200, ge=1)
    permute: bool = False


class Contexts:
    """Draws class tokens of tasks (B, C, width), classes beyond a task's own all zero.

    Args:
        images: by data set; many-class sets and data sets with parts alike.
        classes: C, the largest number of classes.

    Raises:
        FlownError: a task's data set is missing, or a class has fewer images than `shots`.
    """

    def __init__(
        self,
        support: SupportEncoder,
        tasks: Sequence[Task],
        images: Images,
        config: ContextConfig,
        classes: int,
    ) -> None:
        self.support, self.tasks, self.images = support, list(tasks), images
        self.config, self.classes = config, classes
        self.encode = TOKENS[config.tokens]
        self.device = support.feature_mean.device
        self._sets: dict[str, Split] = {}
        self._pools: dict[str, ClassPool] = {}
        self._features: dict[tuple[str, int], Tensor] = {}
        self._tokens: dict[tuple[int, int], Tensor] = {}  # by task and number of a support set
        numbers = len(self.tasks) * config.sets * classes * token_width(support, config.tokens)
        self.keeps = numbers <= _KEPT
        for task in self.tasks:
            self._check(task)

    def _check(self, task: Task) -> None:
        if task.dataset not in self.images:
            raise FlownError(
                f"task '{task.id}': the images of data set '{task.dataset}' are not given"
            )
        pool = self._pool(task.dataset)
        for name, place in zip(task.classes, task.places(self.images[task.dataset]), strict=True):
            count = len(pool.rows[place])
            if count < self.config.shots:
                raise FlownError(
                    f"task '{task.id}': class '{name}' has {count} images for contexts, "
                    f"{self.config.shots} are needed; lower context.shots"
                )

    def _pool(self, dataset: str) -> ClassPool:
        """The images of a data set that contexts are drawn from, by class."""
        if dataset not in self._pools:
            source = self.images[dataset]
            everything = Task(id=dataset, dataset=dataset, classes=source.classes)
            found = everything.images(source).train
            numbers = range(len(source.classes))
            rows = [x[: self.config.per_class] for x in ClassPool(found.labels, numbers).rows]
            self._sets[dataset] = found[torch.cat(rows)]
            self._pools[dataset] = ClassPool(self._sets[dataset].labels, numbers)
        return self._pools[dataset]

    def _table(self, dataset: str, rotation: int) -> Tensor:
        """Features (N, F) of a data set's images, turned."""
        if (dataset, rotation) not in self._features:
            images = self._sets[dataset].images.rot90(rotation // 90, (2, 3))
            found = [
                self.support.features(part.to(self.device)).cpu() for part in images.split(2048)
            ]
            self._features[dataset, rotation] = torch.cat(found)
        return self._features[dataset, rotation]

    def sets(self, tasks: Sequence[int], generator: torch.Generator) -> Tensor:
        """The tokens (N, C, width) of a support set for each of N tasks, by place among `tasks`.

        Sets are drawn one after another, and encoded together where they have as many classes.
        """
        return self._encoded(tasks, [generator] * len(tasks))

    def _encoded(self, tasks: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
        """As `sets`, a generator for each."""
        chosen = [self.tasks[place] for place in tasks]
        features, queries = zip(*map(self._set, chosen, generators), strict=True)
        width = token_width(self.support, self.config.tokens)
        tokens = torch.zeros(len(chosen), self.classes, width, device=self.device)
        sizes = torch.tensor([len(task.classes) for task in chosen])
        for size in sizes.unique().tolist():
            labels = self._labels(size).to(self.device)
            members = (sizes == size).nonzero().flatten().tolist()
            found = torch.stack([features[i] for i in members]).to(self.device)
            asked = torch.stack([queries[i] for i in members]).to(self.device)
            tokens[members, :size] = self.encode(self.support, found, labels, asked)
        return tokens

    def _labels(self, classes: int) -> Tensor:
        """Labels (classes K,) of a support set's images."""
        return torch.arange(classes).repeat_interleave(self.config.shots)

    def _set(self, task: Task, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features (S, F) of a random support set, and the rows (classes,) of its queries."""
        places = task.places(self.images[task.dataset])
        rows = self._pool(task.dataset).draw_places(places, self.config.shots, generator)
        labels = self._labels(len(places))
        picks = self.config.tokens == "caml"  # a class's mean asks about no image
        queries = pick_queries(labels, len(places), generator) if picks else rows[: len(places)]
        return self._table(task.dataset, task.rotation)[rows], queries

    def draw(self, tasks: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens (B, C, width) for networks of tasks (B,); networks of a task share support sets.

        Args:
            generator: on any device; support sets are drawn on the CPU, from a seed it gives.
        """
        draw = cpu_generator(generator)
        kinds, places = tasks.cpu().unique(return_inverse=True)
        each = max(1, self.config.draws // len(kinds))
        chosen = kinds.repeat_interleave(each).tolist()
        if self.keeps:
            numbers = torch.randint(self.config.sets, (len(chosen),), generator=draw).tolist()
            bank = self._numbered(list(zip(chosen, numbers, strict=True)))
        else:
            bank = self.sets(chosen, draw)  # (kinds each, C, width)
        which = places * each + torch.randint(each, (len(tasks),), generator=draw)
        return bank[which.to(bank.device)]

    def _numbered(self, asked: Sequence[tuple[int, int]]) -> Tensor:
        """Tokens (N, C, width) of support sets by task and number."""
        for task, number in asked:
            if (task, number) not in self._tokens:
                # Alone: how sums are rounded depends on what else is in a batch, and on a resumption.
                (tokens,) = self._encoded([task], [_draw_of(task, number)])
                self._tokens[task, number] = tokens
        return torch.stack([self._tokens[key] for key in asked])


def _draw_of(task: int, number: int) -> torch.Generator:
    """The random numbers of a task's support set; torch's generator reads 32 bits of a seed."""
    return torch.Generator().manual_seed((task * 1_000_003 + number) % 2**32)
