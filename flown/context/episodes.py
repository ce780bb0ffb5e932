"""Training CAML by episodes over a frozen backbone's cached features.

An episode is an n-way k-shot task: n random classes, k support images of each, and queries; the
loss is the cross-entropy of the query's class. n and k are drawn anew at every step, and so is
which vectors of the label frame stand for the classes, so that no vector comes to mean anything
(Fifty et al. 2310.10971, section 3).

Images of another kind lie elsewhere in feature space, and closer together or wider apart. To keep
that from hiding the classes, an episode's features f become m f + o in training, with one scale m
and one offset o for the whole episode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.context.caml import CAML, CAMLConfig
from flown.tasks import draw_episode
from flown.training import TrainConfig, train

_MAX_SHOTS = 5
_QUERIES = 4  # an episode in training; each is a sequence of its own, and long ones are dear


@dataclass(frozen=True)
class FeatureSet:
    """Cached features (N, F) with labels (N,) and the class numbers of each part."""

    features: Tensor
    labels: Tensor
    class_split: Mapping[str, Tensor]


class EpisodeBatch(NamedTuple):
    """B episodes: support (B, S, F), labels (B, S), queries (B, Q, F), their labels (B, Q)."""

    support: Tensor
    labels: Tensor
    query: Tensor
    targets: Tensor


def draw_batch(
    sets: Sequence[FeatureSet],
    part: str,
    ways: int,
    shots: int,
    episodes: int,
    frame: int,
    generator: torch.Generator,
) -> EpisodeBatch:
    """Episodes of random sets; labels are `ways` random numbers below `frame`."""
    drawn = []
    for _ in range(episodes):
        which = int(torch.randint(len(sets), (1,), generator=generator))
        some = sets[which]
        episode = draw_episode(
            some.features, some.labels, some.class_split[part], ways, shots, 1, generator
        )
        names = torch.randperm(frame, generator=generator)
        (support, labels), (query, targets) = episode.support, episode.query
        drawn.append((support, names[labels], query, names[targets]))
    return EpisodeBatch(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))


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
    """Accuracy (percent) at the queries, beside the nearest centroid's by cosine on the same."""
    generator = torch.Generator().manual_seed(seed)
    frame = caml.config.ways
    batch = draw_batch(sets, part, ways, shots, episodes, frame, generator)
    parts = [slice(i, i + 16) for i in range(0, episodes, 16)]
    logits = torch.cat(
        [caml.logits(batch.support[part], batch.labels[part], batch.query[part]) for part in parts]
    )
    present = F.one_hot(batch.labels, frame).float()  # (B, S, frame)
    absent = (present.sum(dim=1) == 0)[:, None]  # (B, 1, frame)
    centroids = F.normalize(present.transpose(1, 2) @ F.normalize(batch.support, dim=2), dim=2)
    cosines = F.normalize(batch.query, dim=2) @ centroids.transpose(1, 2)  # (B, Q, frame)

    def score(scores: Tensor) -> float:
        chosen = scores.masked_fill(absent, -torch.inf).argmax(dim=2)
        return 100 * float((chosen == batch.targets).float().mean())

    return {"accuracy": score(logits), "centroid": score(cosines)}


class _Episodes(nn.Module):
    """Cross-entropy at the queries of a batch of random episodes."""

    def __init__(self, caml: CAML, sets: Sequence[FeatureSet], batch: int, drift: float) -> None:
        super().__init__()
        self.caml, self.sets, self.batch, self.drift = caml, sets, batch, drift
        fewest = min(len(some.class_split["train"]) for some in sets)
        self.ways = min(caml.config.ways, fewest)

    def forward(self, generator: torch.Generator) -> Tensor:
        # Drawn on the CPU, where features are cached, whatever device trains.
        seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
        local = torch.Generator().manual_seed(int(seed))
        ways = int(torch.randint(2, self.ways + 1, (1,), generator=local))
        shots = int(torch.randint(1, _MAX_SHOTS + 1, (1,), generator=local))
        frame = self.caml.config.ways
        batch = draw_batch(self.sets, "train", ways, shots, self.batch, frame, local)
        offset = self.drift * torch.randn(self.batch, 1, batch.query.shape[2], generator=local)
        scale = torch.exp(self.drift / 2 * torch.randn(self.batch, 1, 1, generator=local))
        batch = batch._replace(
            support=scale * batch.support + offset, query=scale * batch.query + offset
        )
        device = self.caml.unk_emb.device
        support, labels, query, targets = (x.to(device) for x in batch)
        asked = torch.randperm(ways, generator=local)[:_QUERIES].to(device)
        query, targets = query[:, asked], targets[:, asked]
        logits = self.caml.logits(support, labels, query)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


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
        sets: cached features, standardised; every step's episodes come from random ones of them.
        drift: standard deviation of training episodes' offsets; their log scales have half of it.
        out: the folder of the checkpoint `caml.checkpoint.safetensors`.

    Raises:
        FlownError: no set, features of another length than `config.feature_dim`, or a set with too
            few classes or images for episodes.
    """
    if not sets:
        raise FlownError("train_caml: no set of features given")
    for some in sets:
        if some.features.ndim != 2 or some.features.shape[1] != config.feature_dim:
            got = tuple(some.features.shape)
            raise FlownError(f"train_caml: expected features (N, {config.feature_dim}), got {got}")
        if min(len(some.class_split[part]) for part in ("train", "val")) < 2:
            raise FlownError("train_caml: a set needs two training and two validation classes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        caml = CAML(config)
    ways = min(5, config.ways, *(len(some.class_split["val"]) for some in sets))

    def validate() -> dict[str, float]:
        there = caml.unk_emb.device
        figures = episode_accuracy(caml.cpu(), sets, ways=ways)
        caml.to(there)
        return figures

    objective = _Episodes(caml, sets, training.batch_size, drift)
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
