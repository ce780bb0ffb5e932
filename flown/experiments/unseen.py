"""The sets that the any-task study measures on, as tasks; none of them is in any training.

Where classes are many they are drawn for each task; where they are ten, support sets are. Supports are
of training parts and queries of test parts, where a set has these.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flown.base.config import Config
from flown.tasks import ClassPool, Episodes, ManyClass, load_any


class Unseen(Config):
    """T tasks of one set.

    `part` is of classes, of a many-class set; `prefix` and `kind` choose among them by name.
    """

    set: str
    part: Literal["train", "val", "test", "all"] = "all"
    ways: int = 10
    shots: int = 5
    tasks: int = 50
    letters: bool = False

    @property
    def name(self) -> str:
        part = f" {self.part}" if self.part != "all" else ""
        kind = " letters" if self.letters else ""
        return f"{self.set}{part}{kind}, {self.ways}-way {self.shots}-shot"

    def draw(self, seed: int, queries: int = 10) -> tuple[Tensor, Episodes]:
        """All images of the set, uint8 (N, c, H, W), and tasks as rows of them.

        Raises:
            FlownError: the set is not here, or has too few classes or images.
        """
        generator = torch.Generator().manual_seed(seed)
        source = load_any(self.set)
        if isinstance(source, ManyClass):
            pool = ClassPool(source.labels, self._classes(source))
            return source.images, pool.draw(self.ways, self.shots, queries, generator, self.tasks)
        classes = range(len(source.classes))
        support = ClassPool(source.train.labels, classes)
        query = ClassPool(source.test.labels, classes)
        rows, asked, chosen = [], [], []
        for _ in range(self.tasks):
            places = torch.randperm(len(classes), generator=generator)[: self.ways]
            rows.append(support.draw_places(places.tolist(), self.shots, generator))
            asked.append(query.draw_places(places.tolist(), queries, generator))
            chosen.append(places)
        images = torch.cat([source.train.images, source.test.images])
        queried = torch.stack(asked) + len(source.train)
        return images, Episodes.of(torch.stack(rows), queried, torch.stack(chosen))

    def _classes(self, source: ManyClass) -> list[int]:
        parts = source.class_split if self.part == "all" else [self.part]
        chosen = sorted(int(c) for part in parts for c in source.class_split[part])
        return [c for c in chosen if not self.letters or source.classes[c].isalpha()]


VALIDATION = (
    Unseen(set="omniglot_full", part="val", tasks=20),
    Unseen(set="mini_imagenet", part="val", tasks=20),
)
ROWS = (
    Unseen(set="mnist"),
    Unseen(set="usps"),
    Unseen(set="emnist62", letters=True, tasks=200),
    Unseen(set="fashion_mnist"),
    Unseen(set="omniglot_full", part="test", tasks=200),
    Unseen(set="svhn_small"),
    Unseen(set="cifar10"),
    Unseen(set="natural10"),
    Unseen(set="mini_imagenet", part="test", tasks=200),
    Unseen(set="omniglot_full", part="test", ways=5, shots=1, tasks=200),
    Unseen(set="omniglot_full", part="test", ways=20, shots=1, tasks=200),
    Unseen(set="emnist62", ways=5, shots=1, part="test", tasks=200),
    Unseen(set="mini_imagenet", part="test", ways=5, shots=1, tasks=200),
)
