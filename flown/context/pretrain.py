"""Training the support encoder that ships: a backbone by classification, CAML by episodes.

Only the `train` classes of the given sets are learnt from; `val` classes measure. No image of a
task that networks are generated for is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.context.support import SupportConfig, SupportEncoder
from flown.data import ManyClass, draw_episode, load_many
from flown.training import TrainConfig, train


class _Classify(nn.Module):
    """Cross-entropy of all training classes of all sets, from randomly shifted images."""

    def __init__(self, encoder: SupportEncoder, sets: Sequence[ManyClass], batch: int) -> None:
        super().__init__()
        self.backbone, self.batch = encoder.backbone, batch
        images, labels, classes = [], [], 0
        for many in sets:
            known = many.class_split["train"]
            rows = torch.isin(many.labels, known)
            images.append(self.backbone.prepare(many.images[rows]))
            labels.append(torch.searchsorted(known, many.labels[rows]) + classes)
            classes += len(known)
        self.images, self.labels = torch.cat(images), torch.cat(labels)
        self.linear = nn.Linear(encoder.config.backbone.features, classes)

    def forward(self, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.images), (self.batch,), generator=generator)
        x = F.pad(self.images[rows], (3, 3, 3, 3), mode="replicate")
        top, left = torch.randint(7, (2,), generator=generator).tolist()
        size = self.images.shape[-1]
        x = x[:, :, top : top + size, left : left + size]
        return F.cross_entropy(self.linear(self.backbone.body(x)), self.labels[rows],
                               label_smoothing=0.1)  # fmt: skip


class _Episodes(nn.Module):
    """Cross-entropy at the queries of random episodes over cached features."""

    def __init__(self, encoder: SupportEncoder, sets: Sequence[ManyClass],
                 features: Sequence[Tensor], batch: int) -> None:  # fmt: skip
        super().__init__()
        self.caml, self.sets, self.features, self.batch = encoder.caml, sets, features, batch

    def draw(self, part: str, ways: int, shots: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """One set's episode: support features and labels, query features and labels."""
        which = int(torch.randint(len(self.sets), (1,), generator=generator))
        many = self.sets[which]
        episode = draw_episode(self.features[which], many.labels, many.class_split[part], ways,
                               shots, 1, generator)  # fmt: skip
        # Which vectors of the frame stand for the classes is arbitrary: any may.
        frame = torch.randperm(self.caml.config.ways, generator=generator)
        support, query = episode.support, episode.query
        return support.images, frame[support.labels], query.images, frame[query.labels]

    def forward(self, generator: torch.Generator) -> Tensor:
        ways = int(torch.randint(2, self.caml.config.ways + 1, (1,), generator=generator))
        shots = int(torch.randint(1, 6, (1,), generator=generator))
        drawn = [self.draw("train", ways, shots, generator) for _ in range(self.batch)]
        support, labels, query, targets = (torch.stack(x) for x in zip(*drawn, strict=True))
        logits = self.caml.logits(support, labels, query)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def accuracy(self, ways: int = 5, shots: int = 5, episodes: int = 100) -> dict[str, float]:
        """Accuracy on validation classes, beside that of the nearest centroid by cosine."""
        hits = centroid_hits = total = 0
        for seed in range(episodes):
            generator = torch.Generator().manual_seed(seed)
            support, labels, query, targets = self.draw("val", ways, shots, generator)
            predicted = self.caml.logits(support[None], labels[None], query[None])[0].argmax(-1)
            hits += int((predicted == targets).sum())
            known = labels.unique()
            centroids = torch.stack([support[labels == c].mean(dim=0) for c in known])
            nearest = known[(F.normalize(query) @ F.normalize(centroids).T).argmax(dim=1)]
            centroid_hits += int((nearest == targets).sum())
            total += len(targets)
        return {"accuracy": 100 * hits / total, "centroid": 100 * centroid_hits / total}


def pretrain(out: Path | str, names: Sequence[str] = ("mini_imagenet", "omniglot"), *,
             config: SupportConfig | None = None, backbone_steps: int = 1000,
             caml_steps: int = 1500, seed: int = 0, resume: bool = False) -> SupportEncoder:  # fmt: skip
    """Trains backbone and CAML on many-class sets and saves `out/support.safetensors`."""
    out = Path(out)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = SupportEncoder(config or SupportConfig())
        sets = [load_many(name) for name in names]
        classify = _Classify(encoder, sets, batch=128)
    encoder.backbone.requires_grad_(True)
    settings = TrainConfig(steps=backbone_steps, batch_size=128, weight_decay=5e-4,
                           learning_rate=3e-3, ema=0.0)  # fmt: skip
    train(classify, settings, out=out, name="backbone", seed=seed, resume=resume)
    encoder.backbone.requires_grad_(False).eval()
    features = [encoder.backbone.features(many.images) for many in sets]
    known = torch.cat([f[torch.isin(many.labels, many.class_split["train"])]
                       for f, many in zip(features, sets, strict=True)])  # fmt: skip
    encoder.feature_mean.copy_(known.mean(dim=0))
    encoder.feature_std.copy_(known.std(dim=0).clamp_min(1e-3))
    features = [(f - encoder.feature_mean) / encoder.feature_std for f in features]
    encoder.caml.requires_grad_(True)
    episodes = _Episodes(encoder, sets, features, batch=8)
    settings = TrainConfig(steps=caml_steps, batch_size=8, learning_rate=1e-3, weight_decay=1e-4)
    train(episodes, settings, out=out, name="caml", seed=seed, resume=resume,
          validate=episodes.accuracy)  # fmt: skip
    encoder.requires_grad_(False).eval()
    encoder.save(out / "support.safetensors")
    return encoder
