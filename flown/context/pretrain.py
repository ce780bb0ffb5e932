"""Training the support encoder that ships: a backbone by classification, CAML by episodes.

Only the `train` classes of the given sets are learnt from; `val` classes measure. No image of a
task that networks are generated for is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from flown.context.backbones import features, train_backbone
from flown.context.episodes import FeatureSet, train_caml
from flown.context.support import SupportConfig, SupportEncoder
from flown.tasks import load_many
from flown.training import TrainConfig

# EMA is off for the backbone: BatchNorm's running statistics belong to the raw weights.
BACKBONE_TRAINING = TrainConfig(
    steps=1000, batch_size=128, learning_rate=3e-3, weight_decay=5e-4, ema=0.0, validate_every=250
)
CAML_TRAINING = TrainConfig(
    steps=700, batch_size=16, learning_rate=1e-3, weight_decay=1e-4, ema=0.99, validate_every=200
)


def train_support_encoder(
    names: Sequence[str] = ("mini_imagenet", "omniglot"),
    *,
    out: Path | str,
    config: SupportConfig | None = None,
    backbone_training: TrainConfig = BACKBONE_TRAINING,
    caml_training: TrainConfig = CAML_TRAINING,
    seed: int = 0,
    resume: bool = False,
    device: str = "cpu",
) -> SupportEncoder:
    """Trains backbone and CAML on many-class sets and saves `out/support.safetensors`.

    Args:
        names: sets as `flown.tasks.load_many` knows them.
        out: folder of checkpoints and result; `resume` goes on from what it holds.

    Raises:
        FlownError: a set is not there, or as the two trainings.
    """
    config = config or SupportConfig()
    sets = [load_many(name) for name in names]
    encoder = SupportEncoder(config)
    assert config.backbone is not None  # the constructor has refused it
    backbone = train_backbone(
        sets, config.backbone, backbone_training, out=out, seed=seed, resume=resume, device=device
    ).cpu()
    encoder.backbone.load_state_dict(backbone.state_dict())
    raw = [features(backbone, many.images) for many in sets]
    known = torch.cat(
        [
            rows[torch.isin(many.labels, many.class_split["train"])]
            for rows, many in zip(raw, sets, strict=True)
        ]
    )
    encoder.feature_mean.copy_(known.mean(dim=0))
    encoder.feature_std.copy_(known.std(dim=0).clamp_min(1e-3))  # a dead unit would divide by 0
    scaled = [(rows - encoder.feature_mean) / encoder.feature_std for rows in raw]
    cached = [
        FeatureSet(rows, many.labels, many.class_split)
        for rows, many in zip(scaled, sets, strict=True)
    ]
    caml = train_caml(
        cached, config.caml, caml_training, out=out, seed=seed, resume=resume, device=device
    )
    encoder.caml.load_state_dict(caml.cpu().state_dict())
    encoder.save(Path(out) / "support.safetensors")
    return encoder
