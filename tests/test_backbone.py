"""ResNet-12 and its training, backbones by name, and the cache of their features."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flown.base import trust
from flown.base.errors import FlownError
from flown.base.files import load_tensors, save_tensors
from flown.context.backbones import Backbone, BackboneConfig, features
from flown.context.pretrain import (
    MetaBaselineConfig,
    augmented,
    centroid_accuracy,
    train_backbone,
)
from flown.heads.features import Standardised, cached_features, fingerprint, load_backbone
from flown.nets.resnet12 import resnet12
from flown.tasks import ManyClass
from flown.training import LoopConfig, TrainConfig

TINY = BackboneConfig(kind="resnet12", widths=(4, 6, 8, 10))
OURS = trust.allow("tests.test_backbone:means")
WRONG = trust.allow("tests.test_backbone:none"), trust.allow("tests.test_backbone:no_module")


class Means(nn.Module):
    """Mean colours: a backbone that is one's own."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))


def means() -> nn.Module:
    return Means()


def no_module() -> int:
    return 3


def many(classes: int = 15, each: int = 22) -> ManyClass:
    """Stripes, a colour and a frequency a class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each)
    colours = torch.rand(classes, 3, 1, 1, generator=generator)
    waves = torch.sin(torch.arange(32.0) * (1 + torch.arange(classes)[:, None]) / 5)
    images = 100 * colours[labels] + 80 + 50 * waves[labels][:, None, None]
    images = images + 10 * torch.randn(len(labels), 3, 32, 32, generator=generator)
    split = {"train": torch.arange(5), "val": torch.arange(5, 10), "test": torch.arange(10, 15)}
    return ManyClass(
        "stripes", tuple(map(str, range(classes))), images.clamp(0, 255).byte(), labels, split
    )


def test_resnet12_as_published() -> None:
    net = resnet12()
    # 3 x 3 convolutions of four blocks, their 1 x 1 shortcuts, scale and shift of every BatchNorm
    widths, expected = (3, 64, 128, 256, 512), 0
    for i, o in pairwise(widths):
        expected += 9 * (i * o + 2 * o * o) + i * o + 4 * 2 * o
    assert sum(p.numel() for p in net.parameters()) == expected
    assert net.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 512)


def test_augmented_images_stay_images(generator: torch.Generator) -> None:
    images = torch.full((200, 3, 8, 8), 0.25)
    changed = augmented(images, generator)
    assert changed.shape == images.shape and changed.isfinite().all()
    flat = changed.flatten(2)
    torch.testing.assert_close(flat.std(dim=2), torch.zeros(200, 3), atol=1e-5, rtol=0)
    assert 0.15 < changed.mean() < 0.35 and changed.mean(dim=(1, 2, 3)).std() > 0.1
    assert not torch.equal(changed, augmented(images, generator))


def test_meta_baseline_learns_and_goes_on(tmp_path: Path) -> None:
    short = TrainConfig(
        steps=6, batch_size=16, warmup=2, ema=0.0, learning_rate=3e-3, checkpoint_every=3
    )
    config = MetaBaselineConfig(
        backbone=TINY,
        classification=short,
        tasks=1,
        episodes=LoopConfig(steps=2, warmup=2, ema=0.0, learning_rate=3e-3, checkpoint_every=3),
        bfloat16=False,
    )
    made, found = train_backbone(many(), config, out=tmp_path)
    assert set(found) == {f"{a} {b}-shot" for a in ("classification", "episodes") for b in (1, 5)}
    again, same = train_backbone(many(), config, out=tmp_path, resume=True)
    assert same == found
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert float(centroid_accuracy(made, many(), tasks=30).mean()) > 40  # chance is 20


def test_episodes_need_five_classes(tmp_path: Path) -> None:
    stripes = many()
    stripes.class_split["val"] = torch.arange(5, 8)
    with pytest.raises(FlownError, match="stripes: 3 'val' classes, episodes need 5"):
        train_backbone(stripes, out=tmp_path)


def test_standardised_features_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = many().images
    made = Standardised(Backbone(TINY).eval()).fit(images)
    found = features(made, images)
    assert found.mean(dim=0).abs().max() < 1e-3
    made.save(tmp_path / "b.safetensors")
    torch.testing.assert_close(
        features(load_backbone(tmp_path / "b.safetensors"), images), found, rtol=0.05, atol=0.05
    )


def test_the_shipped_backbone_and_ones_own() -> None:
    images = many().images[:3]
    assert load_backbone("resnet12-small")(images).shape == (3, 192)
    assert load_backbone(OURS)(images).shape == (3, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet12-smal", "Did you mean 'resnet12-small'"),
        (WRONG[0], "cannot be imported"),
        (WRONG[1], "returned int, expected nn.Module"),
        ("nowhere.safetensors", "no such file"),
    ],
)
def test_backbones_that_are_none(name: str, message: str) -> None:
    with pytest.raises(FlownError, match=message):
        load_backbone(name)


def test_timms_models_by_name() -> None:
    pytest.importorskip("timm")
    with pytest.raises(FlownError, match=r"unknown timm model 'resnet81'. Did you mean 'resnet18'"):
        load_backbone("timm/resnet81")


def test_a_file_of_something_else_is_no_backbone(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    with pytest.raises(FlownError, match="no backbone that flown wrote"):
        load_backbone(tmp_path / "x.safetensors")


def test_features_are_computed_once(tmp_path: Path) -> None:
    class Counting(Means):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            Counting.calls += 1
            return super().forward(images)

    images = many().images[:5]
    first = cached_features(Counting(), images, tmp_path)
    assert torch.equal(cached_features(Counting(), images, tmp_path), first) and Counting.calls == 1
    cached_features(Counting(), images.flip(0), tmp_path)
    assert Counting.calls == 2 and len(list(tmp_path.iterdir())) == 2


def test_another_weight_is_another_fingerprint() -> None:
    backbone = Backbone(TINY)
    before = fingerprint(backbone)
    with torch.no_grad():
        next(backbone.parameters()).view(-1)[0] += 1
    assert fingerprint(backbone) != before


def test_a_damaged_or_foreign_cache_is_named(tmp_path: Path) -> None:
    images = many().images[:5]
    cached_features(means(), images, tmp_path)
    (path,) = tmp_path.iterdir()
    tensors, about = load_tensors(path)
    save_tensors(path, {"features": tensors["features"] + 1}, about)
    with pytest.raises(FlownError, match=f"{path.name}: the checksum differs"):
        cached_features(means(), images, tmp_path)
    save_tensors(path, tensors, {**about, "images": "0"})
    with pytest.raises(
        FlownError, match="features of other images than requested; remove the file"
    ):
        cached_features(means(), images, tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FlownError, match=path.name):
        cached_features(means(), images, tmp_path)
