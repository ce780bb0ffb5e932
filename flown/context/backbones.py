"""Image backbones: uint8 images of any size to feature vectors, frozen once they are trained.

    image (1 or 3, H, W) --resize, 3 channels, scale--> (3, 32, 32) --body--> feature (F,)

The default body is the four-block convolutional network of the few-shot literature (Snell et al.
1703.05175) with a global mean at the end. It is trained by classification over all training
classes with a linear classifier, which is then thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.config import Config
from flown.base.errors import FlownError, unknown
from flown.nets.resnet12 import resnet12
from flown.tasks import ManyClass
from flown.training import TrainConfig, train

Augment = Callable[[Tensor, torch.Generator], Tensor]
_SHIFT = 3  # pixels of the random crop's padding


class BackboneConfig(Config):
    """`kind` is a name of `BACKBONES`; `widths` are the channels of its stages, the last one F."""

    kind: str = "conv"
    widths: tuple[int, ...] = (32, 64, 128, 128)
    size: int = 32

    @property
    def features(self) -> int:
        """F."""
        return self.widths[-1]


def _conv(config: BackboneConfig) -> nn.Module:
    """Conv -> BatchNorm -> ReLU -> pool, once a stage, then the mean over positions."""
    layers: list[nn.Module] = []
    channels = 3
    for width in config.widths:
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _resnet12(config: BackboneConfig) -> nn.Module:
    return resnet12(config.widths)


BACKBONES: dict[str, Callable[[BackboneConfig], nn.Module]] = {"conv": _conv, "resnet12": _resnet12}


class Backbone(nn.Module):
    """Features (N, F) of uint8 images (N, 1 or 3, H, W)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        if config.kind not in BACKBONES:
            raise unknown("backbone", config.kind, BACKBONES)
        if not config.widths or config.size < 2 ** len(config.widths):
            raise FlownError(
                f"backbone: {len(config.widths)} stages halve {config.size} pixels to nothing; "
                "give fewer widths or a larger size"
            )
        self.config = config
        self.body = BACKBONES[config.kind](config)

    def prepare(self, images: Tensor) -> Tensor:
        """Resizes uint8 images (N, 1 or 3, H, W) to (N, 3, size, size), scaled to [-1, 1].

        Raises:
            FlownError: another shape or type.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
            got = f"{images.dtype} {tuple(images.shape)}"
            raise FlownError(f"images: expected uint8 (N, 1 or 3, H, W), got {got}")
        x = images.float() / 127.5 - 1
        side = (self.config.size, self.config.size)
        if x.shape[-2:] != side:
            x = F.interpolate(x, side, mode="bilinear", antialias=True, align_corners=False)
        return x.expand(-1, 3, -1, -1)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.prepare(images))  # type: ignore[no-any-return]


@torch.no_grad()
def features(backbone: nn.Module, images: Tensor, batch: int = 256) -> Tensor:
    """A backbone's features (N, F) of many images (N, c, H, W), computed in eval mode."""
    was_training = backbone.training
    backbone.eval()
    parts = [backbone(images[i : i + batch]) for i in range(0, len(images), batch)]
    backbone.train(was_training)
    return torch.cat(parts)


def random_crop(images: Tensor, generator: torch.Generator, shift: int = _SHIFT) -> Tensor:
    """Images (N, c, H, W) moved by up to `shift` pixels, each by its own; edges are repeated.

    No flips: a mirrored glyph is another glyph.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (shift,) * 4, mode="replicate")
    device = images.device
    offsets = torch.randint(2 * shift + 1, (2, count, 1), generator=generator, device=device)
    rows = offsets[0] + torch.arange(height, device=device)  # (N, H)
    columns = offsets[1] + torch.arange(width, device=device)  # (N, W)
    which = torch.arange(count, device=device)[:, None, None]
    # (N, H, W, c): the two advanced axes come first, the sliced channel axis last
    return padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None]].movedim(3, 1)


class Classification(nn.Module):
    """Cross-entropy over the training classes of all sets, with smoothed labels.

    `augment` changes prepared images (B, 3, size, size) at random.
    """

    images: Tensor
    labels: Tensor

    def __init__(
        self,
        backbone: Backbone,
        sets: Sequence[ManyClass],
        batch: int,
        augment: Augment = random_crop,
    ) -> None:
        super().__init__()
        self.backbone, self.batch, self.augment = backbone, batch, augment
        images, labels, classes = [], [], 0
        for many in sets:
            known = many.class_split["train"]
            rows = torch.isin(many.labels, known)
            images.append(backbone.prepare(many.images[rows]))
            labels.append(torch.searchsorted(known, many.labels[rows]) + classes)
            classes += len(known)
        # Data, not state: they move with the module and stay out of checkpoints' way.
        self.images, self.labels = torch.cat(images), torch.cat(labels)
        self.linear = nn.Linear(backbone.config.features, classes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Classification:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.linear.weight.device
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def forward(self, generator: torch.Generator) -> Tensor:
        rows = torch.randint(
            len(self.images), (self.batch,), generator=generator, device=self.images.device
        )
        found = self.backbone.body(self.augment(self.images[rows], generator))
        return F.cross_entropy(self.linear(found), self.labels[rows], label_smoothing=0.1)


def train_backbone(
    sets: Sequence[ManyClass],
    config: BackboneConfig,
    training: TrainConfig,
    *,
    out: Path | str,
    seed: int = 0,
    resume: bool = False,
    device: str = "cpu",
) -> Backbone:
    """Trains a backbone to tell all `train` classes of all sets apart; returns it frozen.

    Args:
        sets: images of many classes; only classes of `class_split["train"]` are learnt from.
        out: the folder of the checkpoint `backbone.checkpoint.safetensors`.

    Raises:
        FlownError: no set, or as `flown.training.train`.
    """
    if not sets:
        raise FlownError("train_backbone: no set of images given")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # parameters are initialised by torch's own rules
        backbone = Backbone(config)
        objective = Classification(backbone, sets, training.batch_size)
    train(
        objective, training, out=Path(out), name="backbone", seed=seed, resume=resume, device=device
    )
    return backbone.requires_grad_(False).eval()
