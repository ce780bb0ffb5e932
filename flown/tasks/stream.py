"""Tasks without end: random ways and shots over pools of classes, each task with a look of its own.

One draw gives T tasks of one size: W classes, K support images and Q query images of each. Every class
of a pool of strokes is turned by a quarter of its own, so that a character makes four classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.tasks.draw import ClassPool, Episodes, cpu_generator
from flown.tasks.looks import Looks, grey
from flown.tasks.named import load_any
from flown.tasks.splits import ManyClass

SIDE = 32
_QUERIES = 20  # of a class, at most


class StreamConfig(Config):
    """Which tasks are drawn.

    `pools` are sets of many classes by name or folders of images, each with its share of the tasks;
    classes whose name begins with one of `without` are left out. Ways and shots go up to `ways` and
    `shots`; a task has at most `support` support images and about `queries` query images. With
    `count` there are only that many different tasks.
    """

    pools: dict[str, float] = Field(
        default={"omniglot_full": 0.3, "glyphs": 0.25, "mini_imagenet": 0.45}
    )
    without: tuple[str, ...] = ("Latin/",)
    part: str = "train"
    ways: int = 20
    shots: int = 20
    support: int = 100
    queries: int = 100
    images: int = 400
    count: Optional[int] = Field(default=None, ge=1)


class TaskStream:
    """Draws tasks from pools of classes.

    Args:
        sets: the pools by name; loaded by the names of `config.pools` otherwise.

    Raises:
        FlownError: a pool that is not to be had, or has too few classes or images.
    """

    def __init__(
        self, config: StreamConfig | None = None, sets: Mapping[str, ManyClass] | None = None
    ) -> None:
        self.config = config or StreamConfig()
        sets = sets or {name: load_pool(name) for name in self.config.pools}
        self.pools = {name: _Pool(sets[name], self.config) for name in self.config.pools}
        photos = [pool.images for pool in self.pools.values() if pool.images.shape[1] == 3]
        self.textures = torch.cat(photos)[:20_000] if photos else None

    @property
    def identity(self) -> dict[str, Any]:
        """Counts and fingerprints of the pools, by which a run knows its data again."""
        return {name: pool.source.identity for name, pool in self.pools.items()}

    def validation(self, count: int = 40) -> dict[str, Episodes]:
        """Fixed 10-way 5-shot tasks of classes that are kept for validation, by pool, as they are."""
        config = self.config.model_copy(update={"part": "val", "ways": 10})
        found = {}
        for name, pool in self.pools.items():
            if len(pool.source.class_split.get("val", ())) >= config.ways:
                generator = torch.Generator().manual_seed(0)
                stream = _Pool(pool.source, config)
                channels = stream.images.shape[1]
                episodes = stream.classes.draw(10, 5, 10, generator, count)
                found[name] = self._seen(stream, episodes, channels, generator, False)
        return found

    def draws(self, sizes: StreamConfig | None = None) -> Draws:
        """Draws of random size, by default the config's."""
        return Draws(self, sizes or self.config)

    @property
    def fewest(self) -> int:
        """Classes of the pool that has the fewest."""
        return min(len(pool.classes) for pool in self.pools.values())

    def size(
        self, generator: torch.Generator, config: StreamConfig | None = None
    ) -> tuple[int, int, int, int]:
        """Random numbers of tasks, ways, shots and queries: half of the draws have all the ways.

        A third of them has one shot, a third five.
        """
        config = config or self.config

        def within(low: int, high: int) -> int:
            return low + int(torch.rand((), generator=generator).item() * (high - low + 1))

        ways = config.ways if within(0, 1) else within(2, config.ways)
        most = max(1, min(config.shots, config.support // ways))
        shots = min(most, (1, 5, within(1, most))[within(0, 2)])
        queries = max(1, min(config.queries // ways, _QUERIES))
        tasks = max(1, min(16, config.images // (ways * (shots + queries))))
        return tasks, ways, shots, queries

    def draw(
        self,
        generator: torch.Generator,
        channels: int,
        size: tuple[int, int, int, int] | None = None,
        looks: bool = True,
    ) -> Episodes:
        """Tasks as images, floats in [0, 1]: support (T, W K, c, 32, 32), query (T, W Q, c, 32, 32).

        Args:
            size: numbers of tasks, ways, shots and queries a class; random by default.
            looks: False for images as they are.
        """
        return self.drawn(generator, channels, size, looks)[0]

    def drawn(
        self,
        generator: torch.Generator,
        channels: int,
        size: tuple[int, int, int, int] | None = None,
        looks: bool = True,
    ) -> tuple[Episodes, Tensor]:
        """The same, and which tasks are of pictures, not of strokes, (T,)."""
        generator = cpu_generator(generator)
        tasks, ways, shots, queries = size or self.size(generator)
        shares = torch.tensor([self.config.pools[name] for name in self.pools])
        chosen = torch.multinomial(shares, tasks, replacement=True, generator=generator)
        parts, pictures = [], []
        for place, pool in enumerate(self.pools.values()):
            if count := int((chosen == place).sum()):
                episodes = pool.classes.draw(ways, shots, queries, generator, count)
                parts.append(self._seen(pool, episodes, channels, generator, looks))
                pictures += [pool.images.shape[1] == 3] * count
        return Episodes.join(parts), torch.tensor(pictures)

    def _seen(
        self,
        pool: _Pool,
        episodes: Episodes,
        channels: int,
        generator: torch.Generator,
        looks: bool,
    ) -> Episodes:
        rows = torch.cat([episodes.support, episodes.query], dim=1)
        x = pool.images[rows].float() / 255  # (T, N, c, S, S)
        labels = torch.cat([episodes.labels, episodes.targets], dim=1)
        maker = Looks(generator, self.textures)
        if pool.images.shape[1] == 1:
            x = _turned(x, labels, episodes.ways, generator)
            x = maker.strokes(x, channels) if looks else x.expand(-1, -1, channels, -1, -1)
        elif looks or channels == 1:
            x = maker.photos(x, channels) if looks else grey(x)
        support, query = x.split([episodes.support.shape[1], episodes.query.shape[1]], dim=1)
        return episodes._replace(support=support, query=query)


class Draws:
    """Draws of random size, for grey images or colour images: all that a draw is follows from its seed.

    With `count`, the first draws that hold that many tasks are all that there are: a seed is taken
    modulo their number, so that tasks come back with their classes, images and looks.

    Args:
        sizes: of the tasks, and how many there are.
    """

    def __init__(self, stream: TaskStream, sizes: StreamConfig) -> None:
        self.stream, self.sizes = stream, sizes
        self.tasks = self._tasks(sizes.count) if sizes.count else []

    def _tasks(self, count: int) -> list[int]:
        """How many tasks each draw holds; they add up to `count`."""
        tasks: list[int] = []
        while (left := count - sum(tasks)) > 0:
            _, _, (most, *_) = self._begun(len(tasks))
            tasks.append(min(most, left))
        return tasks

    def _begun(self, seed: int) -> tuple[torch.Generator, int, tuple[int, int, int, int]]:
        """A draw's generator, channels and size."""
        generator = torch.Generator().manual_seed(seed)
        channels = (1, 3)[int(torch.randint(2, (), generator=generator))]
        return generator, channels, self.stream.size(generator, self.sizes)

    def at(self, seed: int) -> Episodes:
        """The draw of a seed, as images."""
        return self.drawn(seed)[0]

    def drawn(self, seed: int) -> tuple[Episodes, Tensor]:
        """The same, and which of its tasks are of pictures, (T,)."""
        if self.tasks:
            seed %= len(self.tasks)
        generator, channels, (tasks, *size) = self._begun(seed)
        ways, shots, queries = size
        if self.tasks:
            tasks = self.tasks[seed]
        return self.stream.drawn(generator, channels, (tasks, ways, shots, queries))

    def next(self, generator: torch.Generator) -> Episodes:
        """A random one."""
        return self.at(cpu_generator(generator).initial_seed())


def load_pool(name: str) -> ManyClass:
    """A pool by name: a set of many classes, or the training part of any images with classes."""
    source = load_any(name)
    if isinstance(source, ManyClass):
        return source
    every = {"train": torch.arange(len(source.classes))}
    return ManyClass(name, source.classes, source.train.images, source.train.labels, every)


class _Pool:
    """The images of a set, 32 pixels a side, and its classes to draw from."""

    def __init__(self, source: ManyClass, config: StreamConfig) -> None:
        wanted = [
            c
            for c in source.class_split[config.part].tolist()
            if not source.classes[c].startswith(config.without)
        ]
        if len(wanted) < config.ways:
            raise FlownError(
                f"{source.name}: {len(wanted)} classes to draw from, tasks have up to {config.ways}"
            )
        images = source.images
        if images.shape[-2:] != (SIDE, SIDE):
            images = (
                F.interpolate(
                    images.float(),
                    (SIDE, SIDE),
                    mode="bilinear",
                    antialias=True,
                    align_corners=False,
                )
                .round()
                .clamp(0, 255)
                .to(torch.uint8)
            )
        # Looks make another image of one that is drawn twice.
        self.source = source
        self.images, self.classes = images, ClassPool(source.labels, wanted, repeat=True)


def _turned(x: Tensor, labels: Tensor, ways: int, generator: torch.Generator) -> Tensor:
    """Images of each class of each task turned by a random quarter."""
    quarters = torch.randint(4, (len(x), ways), generator=generator).gather(1, labels)
    for turns in range(1, 4):
        x = torch.where((quarters == turns)[..., None, None, None], x.rot90(turns, (-2, -1)), x)
    return x
