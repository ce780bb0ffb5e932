"""Training a backbone as in Meta-Baseline (Chen et al. 2003.04390): classification, then episodes.

    1. cross-entropy over all base classes with a linear classifier, which is thrown away
    2. episodes of base classes: logits_k = s cos(f(x), m_k), m_k class k's mean, s learnt

Both stages see randomly resized, mirrored and recoloured crops. The stage with the higher accuracy by
nearest centroid on the validation classes is kept; test classes are never looked at. Here m_k is the mean
of features of length 1, as everywhere in this library, there of features as they are: with one shot, as
in the second stage's defaults, both are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.base.seeding import seeded
from flown.context.backbones import Backbone, BackboneConfig, features
from flown.context.centroids import cosine_logits
from flown.context.episodes import EpisodeLoss
from flown.tasks import ClassPool, Episodes, ManyClass
from flown.training import LoopConfig, TrainConfig, train

_WAYS, _QUERIES = 5, 15
_SMALLEST = 0.6  # side of a crop, as a share of the image's
_COLOUR = 0.4  # largest relative change of brightness, contrast and saturation


class MetaBaselineConfig(Config):
    """Sizes and both trainings; the defaults are for 7,680 images and two cores.

    `tasks` 5-way episodes of `shots` images a class make a batch of the second stage. `bfloat16`:
    halves the time on CPUs that have it.
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
    episodes: LoopConfig = LoopConfig(
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
    """Random crops, half of them mirrored, with brightness, contrast and saturation changed.

    Args:
        images: (N, 3, H, W) in [-1, 1]; a crop is resized to H by W.
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


@torch.no_grad()
def centroid_accuracy(
    backbone: nn.Module,
    many: ManyClass,
    part: str = "val",
    shots: int = 1,
    tasks: int = 600,
    seed: int = 0,
) -> Tensor:
    """Percent (tasks,) of 5-way tasks' queries, 15 a class, by the nearest centroid."""
    rows = torch.isin(many.labels, many.class_split[part])
    found, labels = features(backbone, many.images[rows]), many.labels[rows]
    pool, generator = ClassPool(labels, many.class_split[part]), torch.Generator().manual_seed(seed)
    drawn = pool.draw(_WAYS, shots, _QUERIES, generator, tasks).gather(found)
    logits = cosine_logits(drawn.support, drawn.labels, drawn.query, _WAYS)
    return 100 * (logits.argmax(dim=2) == drawn.targets).float().mean(dim=1)


class _Classification(nn.Module):
    """Cross-entropy over the training classes of augmented images, with smoothed labels."""

    def __init__(self, backbone: Backbone, many: ManyClass, config: MetaBaselineConfig) -> None:
        super().__init__()
        self.backbone, self.batch = backbone, config.classification.batch_size
        self.narrow = config.bfloat16
        classes = many.class_split["train"]
        rows = torch.isin(many.labels, classes)
        # Data, not buffers: they move with the module, and checkpoints need not hold them.
        self.images = backbone.prepare(many.images[rows])
        self.labels = torch.searchsorted(classes, many.labels[rows])
        self.linear = nn.Linear(backbone.config.features, len(classes))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Classification:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.linear.weight.device
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def forward(self, generator: torch.Generator) -> Tensor:
        device = self.images.device
        rows = torch.randint(len(self.images), (self.batch,), generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.narrow):
            found = self.backbone.body(augmented(self.images[rows], generator))
            logits = self.linear(found)
            return F.cross_entropy(logits, self.labels[rows], label_smoothing=0.1)


class _CosineClassifier(nn.Module):
    """Scaled cosines (T, W Q, W) of queries' features and the class means of the support."""

    def __init__(self, backbone: Backbone, narrow: bool) -> None:
        super().__init__()
        self.backbone, self.narrow = backbone, narrow
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, episodes: Episodes, generator: torch.Generator) -> Tensor:
        """For episodes of uint8 images (T, W K, c, H, W)."""
        images = torch.cat([episodes.support, episodes.query], dim=1)
        x = augmented(self.backbone.prepare(images.flatten(0, 1)), generator)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.narrow):
            found = self.backbone.body(x)
        found = found.float().unflatten(0, images.shape[:2])
        count = episodes.support.shape[1]
        support, query = found[:, :count], found[:, count:]
        return self.scale * cosine_logits(support, episodes.labels, query, episodes.ways)


def _episode_loss(backbone: Backbone, many: ManyClass, config: MetaBaselineConfig) -> EpisodeLoss:
    pool = ClassPool(many.labels, many.class_split["train"])

    def draw(generator: torch.Generator) -> Episodes:
        drawn = pool.draw(_WAYS, config.shots, _QUERIES, generator, config.tasks)
        return drawn.gather(many.images)

    classifier = _CosineClassifier(backbone, config.bfloat16)
    return EpisodeLoss(classifier, draw, classifier)


def train_backbone(
    many: ManyClass,
    config: MetaBaselineConfig | None = None,
    *,
    out: Path | str,
    seed: int = 0,
    resume: bool = False,
    device: str = "cpu",
) -> tuple[Backbone, dict[str, float]]:
    """Trains a backbone on the `train` classes of a set; returns it frozen, with its accuracies.

    Args:
        out: the folder of the checkpoints; `resume` continues from them.

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
    with seeded(seed):  # parameters are initialised by torch's own rules
        backbone = Backbone(config.backbone)
        first = _Classification(backbone, many, config)
    backbone.to(memory_format=torch.channels_last)

    def measure() -> Mapping[str, float]:
        return {
            f"{shots}-shot": float(centroid_accuracy(backbone, many, shots=shots).mean())
            for shots in (1, 5)
        }

    stages = {}
    for name, objective, training in (
        ("classification", first, config.classification),
        ("episodes", _episode_loss(backbone, many, config), config.episodes),
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
