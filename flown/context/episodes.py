"""Training CAML by episodes over a frozen backbone's cached features.

The loss is the cross-entropy of the queries' classes. Ways and shots are drawn anew at every step, and
so are the vectors of the label frame that stand for the classes, so that no vector takes on a meaning
(Fifty et al. 2310.10971, section 3).

Images of another kind lie elsewhere in feature space, closer together or wider apart. The model has to
find the classes there too: in training an episode's features f become m f + o, with one scale m and one
offset o for the whole episode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.base.seeding import seeded
from flown.context.caml import CAML, CAMLConfig
from flown.context.centroids import cosine_logits
from flown.tasks import ClassPool, Episodes
from flown.tasks.draw import cpu_generator
from flown.training import TrainConfig, train

_MAX_SHOTS = 5
_QUERIES = 4  # per episode in training; each is a separate sequence, whose length costs time


@dataclass(frozen=True)
class FeatureSet:
    """Cached features (N, F) with labels (N,) and the class numbers of each part."""

    features: Tensor
    labels: Tensor
    class_split: Mapping[str, Tensor]

    def pool(self, part: str) -> ClassPool:
        """The rows of the classes of a part, to draw episodes from."""
        return ClassPool(self.labels, self.class_split[part])


class EpisodeLoss(nn.Module):
    """Cross-entropy at the queries of episodes that are drawn anew at every step.

    Args:
        model: the module in training.
        draw: gathered episodes, from a generator on the CPU, where the sets lie.
        logits: the model's logits (T, N, W) for episodes on its device; the generator, of the same
            device, is for augmentation.
    """

    def __init__(
        self,
        model: nn.Module,
        draw: Callable[[torch.Generator], Episodes],
        logits: Callable[[Episodes, torch.Generator], Tensor],
    ) -> None:
        super().__init__()
        self.model, self.draw, self.logits = model, draw, logits

    def forward(self, generator: torch.Generator) -> Tensor:
        episodes = self.draw(cpu_generator(generator)).to(generator.device)
        logits = self.logits(episodes, generator)
        return F.cross_entropy(logits.flatten(0, 1), episodes.targets.flatten())


class FramedPools:
    """Episodes of random sets, their labels random numbers of a frame of label vectors."""

    def __init__(self, sets: Sequence[FeatureSet], part: str, frame: int) -> None:
        self.sets = [(known.features, known.pool(part)) for known in sets]
        self.frame = frame

    def draw(self, ways: int, shots: int, count: int, generator: torch.Generator) -> Episodes:
        """`count` episodes with one query a class; labels are `ways` random numbers below `frame`."""
        parts = []
        for _ in range(count):
            features, pool = self.sets[
                int(torch.randint(len(self.sets), (1,), generator=generator))
            ]
            episode = pool.draw(ways, shots, 1, generator).gather(features)
            names = torch.randperm(self.frame, generator=generator)
            parts.append(
                episode._replace(labels=names[episode.labels], targets=names[episode.targets])
            )
        return Episodes.join(parts)


@torch.no_grad()
def episode_accuracy(
    caml: CAML,
    sets: Sequence[FeatureSet],
    part: str = "val",
    *,
    ways: int = 5,
    shots: int = 5,
    episodes: int = 100,
    seed: int = 0,
) -> dict[str, float]:
    """Percent of the queries: CAML's `accuracy`, and `centroid`, that of the nearest class mean."""
    generator = torch.Generator().manual_seed(seed)
    frame = caml.config.ways
    drawn = FramedPools(sets, part, frame).draw(ways, shots, episodes, generator)
    batches = [drawn.part(slice(i, i + 16)) for i in range(0, episodes, 16)]
    logits = torch.cat([caml.logits(b.support, b.labels, b.query) for b in batches])
    cosines = cosine_logits(drawn.support, drawn.labels, drawn.query, frame)
    absent = F.one_hot(drawn.labels, frame).sum(dim=1, keepdim=True) == 0  # (T, 1, frame)

    def score(scores: Tensor) -> float:
        chosen = scores.masked_fill(absent, -torch.inf).argmax(dim=2)
        return 100 * float((chosen == drawn.targets).float().mean())

    return {"accuracy": score(logits), "centroid": score(cosines)}


def _training_episodes(
    pools: FramedPools, most_ways: int, count: int, drift: float, generator: torch.Generator
) -> Episodes:
    """Episodes of random ways and shots, moved and scaled, with a few queries each."""
    ways = int(torch.randint(2, most_ways + 1, (1,), generator=generator))
    shots = int(torch.randint(1, _MAX_SHOTS + 1, (1,), generator=generator))
    drawn = pools.draw(ways, shots, count, generator)
    offset = drift * torch.randn(count, 1, drawn.query.shape[2], generator=generator)
    scale = torch.exp(drift / 2 * torch.randn(count, 1, 1, generator=generator))
    asked = torch.randperm(ways, generator=generator)[:_QUERIES]
    return drawn._replace(
        support=scale * drawn.support + offset,
        query=scale * drawn.query[:, asked] + offset,
        targets=drawn.targets[:, asked],
    )


def train_caml(
    sets: Sequence[FeatureSet],
    config: CAMLConfig,
    training: TrainConfig,
    *,
    out: Path | str,
    drift: float = 1.0,
    seed: int = 0,
    resume: bool = False,
    device: str = "cpu",
) -> CAML:
    """Trains CAML on episodes of the `train` classes; its history follows the `val` classes.

    Args:
        sets: cached features, standardised; each episode comes from a random one of them.
        drift: standard deviation of training episodes' offsets; their log scales have half of it.
        out: the folder of the checkpoint `caml.checkpoint.safetensors`.

    Raises:
        FlownError: no set, features of another length than `config.feature_dim`, or a set with too
            few classes or images for episodes.
    """
    if not sets:
        raise FlownError("train_caml: no set of features given")
    for known in sets:
        if known.features.ndim != 2 or known.features.shape[1] != config.feature_dim:
            got = tuple(known.features.shape)
            raise FlownError(f"train_caml: expected features (N, {config.feature_dim}), got {got}")
        if min(len(known.class_split[part]) for part in ("train", "val")) < 2:
            raise FlownError("train_caml: a set needs two training and two validation classes")
    with seeded(seed):
        caml = CAML(config)
    ways = min(5, config.ways, *(len(known.class_split["val"]) for known in sets))

    def validate() -> dict[str, float]:
        trained_on = caml.unk_emb.device
        figures = episode_accuracy(caml.cpu(), sets, ways=ways)
        caml.to(trained_on)
        return figures

    pools = FramedPools(sets, "train", config.ways)
    most_ways = min(config.ways, *(len(pool) for _, pool in pools.sets))
    objective = EpisodeLoss(
        caml,
        lambda generator: _training_episodes(
            pools, most_ways, training.batch_size, drift, generator
        ),
        lambda episodes, _: caml.logits(episodes.support, episodes.labels, episodes.query),
    )
    train(
        objective,
        training,
        out=Path(out),
        name="caml",
        seed=seed,
        resume=resume,
        validate=validate,
        device=device,
    )
    return caml.requires_grad_(False).eval()
