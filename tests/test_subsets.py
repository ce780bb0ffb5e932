"""Subset zoos: which tensors, the frozen rest stored once, BatchNorm statistics, no test image."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

import flown
from flown import nets
from flown.base.errors import FlownError
from flown.base.seeding import seeded
from flown.nets import subsets
from flown.nets.architecture import Architecture
from flown.nets.batched import batchnorm, stacked
from flown.tasks import ImageData, Split
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout
from flown.zoo import Recipe, Zoo
from flown.zoo.align.align import align_zoo
from flown.zoo.train.base import Base
from flown.zoo.train.shard import Shard
from flown.zoo.train.train import train_zoo
from tests import examples

TINY = Recipe(
    name="tiny-norms",
    dataset="digits",
    net="tests.examples:ConvNorm",
    size=10,
    activation="relu",
    subset="last-2-norms",
    base_epochs=2,
    learning_rate=3e-3,
    batch_size=16,
    epochs=2,
    keep=(),
    keep_steps=(4, 8, 12, 16),
)
CONV = Architecture(
    net="tests.examples:ConvNorm",
    channels=1,
    size=10,
    outputs=10,
    activation="relu",
    mean=0.5,
    std=0.5,
)
NORMS = ["norm2.weight", "norm2.bias", "norm3.weight", "norm3.bias"]


class Untouchable:
    """A test split that nobody may look at."""

    def __getattribute__(self, name: str) -> object:
        raise AssertionError(f"a test image was touched: {name}")

    def __len__(self) -> int:
        raise AssertionError("the test images were counted")

    def __getitem__(self, rows: object) -> object:
        raise AssertionError("a test image was read")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return train_zoo(
        TINY,
        2,
        tmp_path_factory.mktemp("subset") / "zoo",
        held_out=1 / 2,
        images=examples.images("digits"),
    )


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def drawn(subset: list[str] | None, n: int = 3) -> WeightBatch:
    """n networks that differ in a subset, or in all."""
    with seeded(0):
        net = examples.ConvNorm()
    layout = WeightLayout.of(net, CONV, subset)
    vectors = layout.pack({k: v[None] for k, v in net.state_dict().items() if k in layout.names})
    noise = torch.randn(n, layout.size, generator=torch.Generator().manual_seed(1))
    frozen = {k: v for k, v in net.state_dict().items() if k not in layout.names}
    return WeightBatch(layout, vectors + 0.1 * noise, frozen=frozen if subset else None)


@pytest.mark.parametrize(
    ("net", "numbers", "side"),
    [("resnet18", 2048, 32), ("vit_base", 3072, 224), ("convnext_tiny", 3072, 224)],
)
def test_published_parameter_counts(net: str, numbers: int, side: int) -> None:
    if net != "resnet18":
        pytest.importorskip("timm")
    with torch.device("meta"):
        bare = nets.build(net, 3, 10, "gelu").eval()
        assert bare(torch.empty(2, 3, side, side)).shape == (2, 10)
    layout = WeightLayout.of(bare, CONV, subsets.patterns(bare, "last-2-norms"))
    assert layout.size == numbers and len(layout.names) == 4


def test_vit_is_made_for_the_recipes_images() -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        net = nets.build("vit_base", 3, 10, "gelu", 32)
        assert net(torch.empty(1, 3, 32, 32)).shape == (1, 10)
    with pytest.raises(FlownError, match="multiple of 16, got 28"):
        nets.build("vit_base", 3, 10, "gelu", 28)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(FlownError, match=r"pip install 'flown\[timm\]'"):
        nets.build("convnext_tiny", 3, 10, "gelu")


def test_patterns() -> None:
    net = examples.ConvNorm()
    assert list(subsets.last_norms(net, 2)) == NORMS
    layout = WeightLayout.of(net, CONV, ["head.*", "conv1.weight"])
    assert layout.names == ("conv1.weight", "head.weight", "head.bias"), "the network's order"
    with pytest.raises(FlownError, match=r"no tensor matches 'norm2\.weigth'.*norm2\.weight"):
        WeightLayout.of(net, CONV, ["norm2.weigth"])
    with pytest.raises(FlownError, match="ConvNorm has 3 norm layers"):
        subsets.patterns(net, "last-4-norms")
    for wrong in ({"base_epochs": 0}, {"init": "uniform"}, {"subset": None}):
        with pytest.raises(FlownError, match="base"):
            TINY.model_copy(update=wrong).check()


def test_the_rest_is_stored_once(tmp_path: Path) -> None:
    wide = TINY.model_copy(update={"net": "tests.examples:wide_conv_norm", "base_epochs": 1})
    zoo = train_zoo(wide, 3, tmp_path / "zoo", images=examples.images("digits"))
    assert len(zoo) == 12
    batch = zoo.batch("digits")
    full = sum(t.numel() * t.element_size() for t in batch.state_dict(0).values())
    assert sum(map(len, files(zoo.path).values())) < 1.2 * full
    assert {path.name for path in zoo.path.iterdir()} == {
        "zoo.json",
        "index.jsonl",
        "weights-00000.safetensors",
        "rest-0.safetensors",
        "tasks.jsonl",
    }
    batch.save(tmp_path / "batch.safetensors")
    assert (tmp_path / "batch.safetensors").stat().st_size < 1.2 * full


def test_networks_share_all_but_the_subset(made: Zoo) -> None:
    batch = made.batch("digits")
    assert batch.layout.names == tuple(NORMS) and len(batch) == 8
    first, last = (batch.module(i).state_dict() for i in (0, 7))
    assert {name for name in first if not torch.equal(first[name], last[name])} == set(NORMS)
    assert len({(row.model, row.split) for row in made.rows}) == 2, "split by network"


def test_rows_say_accuracies_with_calibrated_statistics(made: Zoo) -> None:
    images = examples.images("digits")
    batch = made.batch("digits").calibrated(images.train.images, batch_size=16)
    measured = flown.evaluate(batch, images.val.images, images.val.labels)
    stored = torch.tensor([row.val_accuracy for row in made.rows])
    assert torch.allclose(measured, stored, atol=2.6)  # one image of 40 may flip by rounding


def test_no_test_image_is_touched(made: Zoo, tmp_path: Path) -> None:
    images = examples.images("digits")
    noise = torch.randint(256, (9, 1, 5, 7)).to(torch.uint8)
    parts = images.name, images.classes, images.train, images.val
    garbage = ImageData(*parts, Split(noise, torch.full((9,), -1)))
    closed = ImageData(*parts, Untouchable())  # type: ignore[arg-type]
    for name, data in (("garbage", garbage), ("closed", closed)):
        train_zoo(TINY, 2, tmp_path / name, held_out=1 / 2, images=data)
        assert files(tmp_path / name) == files(made.path), name


@pytest.mark.parametrize("subset", [NORMS, ["norm3.*"], ["conv1.weight"], None])
def test_calibrated_is_update_bn(subset: list[str] | None) -> None:
    batch, images = drawn(subset), examples.images("digits").train.images
    found = batch.calibrated(images, batches=50, batch_size=16, seed=3)
    seen = [CONV.preprocess(some) for some in batchnorm.draw(images, 50, 16, 3)]
    for i in range(len(batch)):
        alone = examples.ConvNorm()
        own = {k: v[i] for k, v in batch.layout.unpack(batch.vectors).items()}
        alone.load_state_dict(batch.frozen | own, strict=False)
        update_bn(seen, alone)
        for name, value in found.module(i).state_dict().items():
            assert torch.allclose(value, alone.state_dict()[name], rtol=1e-4, atol=1e-5), name
    assert ("norm1.running_mean" in found.buffers) == (subset in (None, ["conv1.weight"]))
    looped = torch.stack([found.module(i)(seen[0]) for i in range(len(batch))])
    assert torch.allclose(found.logits(seen[0]), looped, atol=1e-5)


def test_every_image_is_drawn_before_one_comes_again() -> None:
    images = torch.arange(10)
    some = torch.cat(list(batchnorm.draw(images, 5, 4, 0)))
    assert sorted(some[:10].tolist()) == sorted(some[10:].tolist()) == list(range(10))
    assert [len(x) for x in batchnorm.draw(images, 3, 64, 0)] == [10, 10, 10]
    with pytest.raises(FlownError, match="batch of two images"):
        batchnorm.draw(images[:1], 50, 64, 0)


def test_networks_without_batchnorm_stay_as_they_are() -> None:
    batch = examples.networks(2)
    assert batch.calibrated(examples.images("digits").train.images) is batch


def test_what_is_missing_is_named() -> None:
    batch = drawn(NORMS)
    bare = WeightBatch(batch.layout, batch.vectors)
    images = torch.zeros(2, 1, 10, 10)
    with pytest.raises(FlownError, match=r"tensors \('conv1.weight', ...\) are missing; pass"):
        bare.logits(images)
    with pytest.raises(FlownError, match="pass the frozen rest"):
        bare.calibrated(torch.zeros(4, 1, 10, 10, dtype=torch.uint8))
    with pytest.raises(FlownError, match=r"'norm1' are not known; use .calibrated"):
        drawn(None).module(0)


def test_the_frozen_part_runs_once_for_all() -> None:
    """Convolutions before the subset cost the same for one network and for eight."""
    counts = {}
    for n in (1, 8):
        batch = drawn(["norm3.*"], n)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            batch.logits(torch.zeros(4, 1, 10, 10))
        counts[n] = counter.get_flop_counts()["Global"]
    convolutions = [
        {str(k): v for k, v in some.items() if "conv" in str(k)} for some in counts.values()
    ]
    assert convolutions[0] and convolutions[0] == convolutions[1]


def test_large_batches_come_in_chunks_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, images = drawn(NORMS, 5), torch.randn(9, 1, 10, 10)
    whole = batch.logits(images)
    monkeypatch.setattr(stacked, "_NUMBERS", 1000)
    assert torch.allclose(batch.logits(images), whole, atol=1e-6)


def test_files_round_trip(tmp_path: Path) -> None:
    images = examples.images("digits").train.images
    batch = drawn(NORMS, 4).calibrated(images)[[2, 0]].to("cpu")
    batch.save(tmp_path / "nets.safetensors")
    again = WeightBatch.load(tmp_path / "nets.safetensors")
    assert again.layout == batch.layout and set(again.buffers) == set(batch.buffers)
    for i in range(2):
        for name, value in batch.state_dict(i).items():
            assert torch.equal(again.state_dict(i)[name], value), name


def test_generated_weights_are_evaluated(made: Zoo) -> None:
    images, known = examples.images("digits"), made.batch("digits")
    noise = torch.randn(3, known.layout.size, generator=torch.Generator().manual_seed(0))
    vectors = known.vectors[:3] + 0.05 * noise
    new = WeightBatch(known.layout, vectors, frozen=made.frozen("digits")).calibrated(
        images.train.images
    )
    found = flown.evaluate(new, images.test.images, images.test.labels)
    x = CONV.preprocess(images.test.images)
    alone = [
        float((new.module(i)(x).argmax(1) == images.test.labels).float().mean()) for i in range(3)
    ]
    assert torch.allclose(found, 100 * torch.tensor(alone), atol=1.7)
    assert found.mean() > 20


def test_a_lone_network_is_split_by_time(tmp_path: Path) -> None:
    zoo = train_zoo(TINY, 1, tmp_path / "zoo", held_out=1 / 4, images=examples.images("digits"))
    assert [(row.step, row.split) for row in zoo.rows] == [
        (4, "train"),
        (8, "train"),
        (12, "train"),
        (16, "held-out"),
    ]
    with pytest.raises(FlownError, match="at least 2 models"):
        train_zoo(TINY.model_copy(update={"keep_steps": (4,)}), 1, tmp_path / "one")


@pytest.mark.parametrize("part", [Base, Shard])
def test_resuming_ends_with_the_same_bits(
    part: type, made: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = part._checkpoint, []  # type: ignore[attr-defined]

    def stop(self: object, *about: object) -> None:
        original(self, *about)
        calls.append(about)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(part, "_checkpoint", stop)
    options = {"held_out": 1 / 2, "images": examples.images("digits")}
    with pytest.raises(KeyboardInterrupt):
        train_zoo(TINY, 2, tmp_path / "zoo", **options)  # type: ignore[arg-type]
    train_zoo(TINY, 2, tmp_path / "zoo", resume=True, **options)  # type: ignore[arg-type]
    assert len(calls) == 2
    assert files(tmp_path / "zoo") == files(made.path)


def test_join_copies_the_rest(made: Zoo, tmp_path: Path) -> None:
    other = train_zoo(
        TINY.model_copy(update={"dataset": "turned"}),
        2,
        tmp_path / "turned",
        images=examples.images("turned"),
    )
    both = Zoo.join([made, other], tmp_path / "both")
    for zoo, task in ((made, "digits"), (other, "turned")):
        mine, theirs = (z.batch(task).state_dict(0) for z in (both, zoo))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(FlownError, match="there is nothing to align"):
        align_zoo(made, tmp_path / "aligned")


def test_whole_networks_with_batchnorm_train(tmp_path: Path) -> None:
    whole = TINY.model_copy(update={"subset": None, "base_epochs": 0})
    images = examples.images("digits")
    zoo = train_zoo(whole, 2, tmp_path / "zoo", images=images)
    batch = zoo.batch("digits").calibrated(images.train.images, batch_size=16)
    assert isinstance(batch.module(0), nn.Module) and not batch.frozen
    stored = torch.tensor([row.val_accuracy for row in zoo.rows])
    measured = flown.evaluate(batch, images.val.images, images.val.labels)
    assert torch.allclose(measured, stored, atol=2.6)
