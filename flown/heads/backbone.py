"""ResNet-12 trained as in Meta-Baseline (Chen et al. 2003.04390): classification, then episodes.

    1. cross-entropy over all base classes with a linear classifier, which is thrown away
    2. episodes of base classes: logits_k = s cos(f(x), mean of f over class k's support), s learnt

Both stages see randomly resized, mirrored and recoloured crops. Whichever of the two does better by
nearest centroid on the validation classes is kept; test classes are never looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.context.backbones import Backbone, BackboneConfig, Classification, features
from flown.tasks import ManyClass, draw_episode
from flown.training import TrainConfig, train

_WAYS, _QUERIES = 5, 15
_SMALLEST = 0.6  # side of a crop, as a share of the image's
_COLOUR = 0.4  # how far brightness, contrast and saturation go


class MetaBaselineConfig(Config):
    """Sizes and both trainings; the defaults are for 7,680 images and two cores.

    `tasks` 5-way episodes of `shots` images a class make a batch of the second stage, whose
    `batch_size` has no meaning. `bfloat16`: halves the time on CPUs that have it.
    """

    backbone: BackboneConfig = BackboneConfig(kind="resnet12", widths=(64, 128, 256, 512))
    # No EMA: BatchNorm's running statistics belong to the raw weights.
    classification: TrainConfig = TrainConfig(
        steps=2600,
        batch_size=64,
        learning_rate=2e-3,
        weight_decay=0.05,
        warmup=200,
        ema=0.0,
        validate_every=650,
        checkpoint_every=325,
    )
    episodes: TrainConfig = TrainConfig(
        steps=100,
        learning_rate=1e-4,
        weight_decay=5e-4,
        warmup=10,
        ema=0.0,
        validate_every=50,
        checkpoint_every=50,
    )
    tasks: int = 4
    shots: int = 1
    bfloat16: bool = True


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops, mirrored half of the time, of other brightness, contrast and saturation.

    Args:
        images: (N, 3, H, W) in [-1, 1]; a crop is resized to the whole.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator, device=device)

    side = uniform(_SMALLEST, 1)
    sign = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    zero, free = torch.zeros(count, device=device), 1.1 - side  # up to a tenth beyond the edge
    rows = [side * sign, zero, free * uniform(-1, 1), zero, side, free * uniform(-1, 1)]
    grid = F.affine_grid(
        torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False
    )
    x = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * uniform(1 - _COLOUR, 1 + _COLOUR, 1, 1, 1)
    level = x.mean(dim=(1, 2, 3), keepdim=True)
    x = level + (x - level) * uniform(1 - _COLOUR, 1 + _COLOUR, 1, 1, 1)
    x = x + uniform(-_COLOUR, _COLOUR, 1, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def cosine_logits(support: Tensor, query: Tensor, ways: int) -> Tensor:
    """Cosines (T, Q, ways) of queries (T, Q, F) to the class means of support (T, ways*K, F)."""
    centroids = support.unflatten(1, (ways, -1)).mean(dim=2)
    return F.normalize(query, dim=2) @ F.normalize(centroids, dim=2).transpose(1, 2)


@torch.no_grad()
def centroid_accuracy(
    backbone: nn.Module,
    many: ManyClass,
    part: str = "val",
    shots: int = 1,
    tasks: int = 600,
    seed: int = 0,
) -> Tensor:
    """Percent right (tasks,) of 5-way tasks with 15 queries a class, by the nearest centroid."""
    known = torch.isin(many.labels, many.class_split[part])
    found, labels = features(backbone, many.images[known]), many.labels[known]
    generator = torch.Generator().manual_seed(seed)
    classes, right = many.class_split[part], []
    for _ in range(tasks):
        episode = draw_episode(found, labels, classes, _WAYS, shots, _QUERIES, generator)
        logits = cosine_logits(episode.support.images[None], episode.query.images[None], _WAYS)[0]
        right.append((logits.argmax(dim=1) == episode.query.labels).float().mean())
    return 100 * torch.stack(right)


class _Classification(Classification):
    """Classification of augmented images, in bfloat16 if asked for."""

    narrow = False

    def forward(self, generator: torch.Generator) -> Tensor:
        kind = self.linear.weight.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.narrow):
            return super().forward(generator)


class _Episodes(nn.Module):
    """Cross-entropy at the queries of a batch of episodes, by scaled cosines to class means."""

    def __init__(self, backbone: Backbone, many: ManyClass, config: MetaBaselineConfig) -> None:
        super().__init__()
        self.backbone, self.many, self.config = backbone, many, config
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, generator: torch.Generator) -> Tensor:
        device, shots = self.scale.device, self.config.shots
        seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
        local = torch.Generator().manual_seed(int(seed))  # images lie on the CPU
        episodes = [
            draw_episode(
                self.many.images,
                self.many.labels,
                self.many.class_split["train"],
                _WAYS,
                shots,
                _QUERIES,
                local,
            )
            for _ in range(self.config.tasks)
        ]
        images = torch.cat([part.images for e in episodes for part in (e.support, e.query)])
        x = augmented(self.backbone.prepare(images.to(device)), generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.bfloat16):
            found = self.backbone.body(x)
        found = found.float().unflatten(0, (self.config.tasks, -1))
        support, query = found.split([_WAYS * shots, _WAYS * _QUERIES], dim=1)
        logits = self.scale * cosine_logits(support, query, _WAYS)
        targets = torch.stack([e.query.labels for e in episodes]).to(device)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train_backbone(
    many: ManyClass,
    config: MetaBaselineConfig | None = None,
    *,
    out: Path | str,
    seed: int = 0,
    resume: bool = False,
    device: str = "cpu",
) -> tuple[Backbone, dict[str, float]]:
    """Trains a backbone on the `train` classes of a set; returns it frozen, and what it does.

    Args:
        out: the folder of the checkpoints, of which `resume` goes on.

    Returns:
        The backbone, and its accuracies on the `val` classes in percent: by stage and shots.

    Raises:
        FlownError: a part has fewer than five classes, or as `flown.training.train`.
    """
    config, out = config or MetaBaselineConfig(), Path(out)
    for part in ("train", "val"):
        if len(many.class_split[part]) < _WAYS:
            have = len(many.class_split[part])
            raise FlownError(f"{many.name}: {have} '{part}' classes, episodes need {_WAYS}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # parameters are initialised by torch's own rules
        backbone = Backbone(config.backbone)
        first = _Classification(backbone, [many], config.classification.batch_size, augmented)
    backbone.to(memory_format=torch.channels_last)
    first.narrow = config.bfloat16

    def measure() -> Mapping[str, float]:
        return {
            f"{shots}-shot": float(centroid_accuracy(backbone, many, shots=shots).mean())
            for shots in (1, 5)
        }

    stages = {}
    for name, objective, training in (
        ("classification", first, config.classification),
        ("episodes", _Episodes(backbone, many, config), config.episodes),
    ):
        train(
            objective,
            training,
            out=out,
            name=name,
            seed=seed,
            resume=resume,
            validate=measure,
            device=device,
        )
        weights = {key: value.clone() for key, value in backbone.state_dict().items()}
        stages[name] = (measure(), weights)
    best = max(stages, key=lambda name: sum(stages[name][0].values()))
    backbone.load_state_dict(stages[best][1])
    accuracies = {
        f"{name} {key}": value
        for name, (found, _) in stages.items()
        for key, value in found.items()
    }
    return backbone.requires_grad_(False).eval(), accuracies
