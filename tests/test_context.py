"""Backbone, support encoder, heads; and the encoder that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.base.files import save_tensors
from flown.context import (
    Backbone,
    BackboneConfig,
    CAMLConfig,
    ContextHead,
    FeatureSet,
    SupportConfig,
    SupportEncoder,
    episode_accuracy,
)
from flown.context.backbones import features
from flown.context.tokens import ContextConfig, Contexts, _draw_of
from tests import examples

SMALL = BackboneConfig(widths=(8, 16), size=16)
CONFIG = SupportConfig(
    backbone=SMALL, caml=CAMLConfig(ways=6, feature_dim=16, label_dim=8, layers=2, heads=4, mlp=32)
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, channels: int = 3, size: int = 20, seed: int = 0) -> Tensor:
    shape = (count, channels, size, size)
    return torch.randint(256, shape, generator=seeded(seed), dtype=torch.uint8)


@pytest.fixture
def encoder() -> SupportEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SupportEncoder(CONFIG)


# ---- backbone


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 32, 32), (3, 40, 27)])
def test_backbone_takes_any_size(channels: int, height: int, width: int) -> None:
    backbone = Backbone(SMALL).eval()
    images = pictures(3, channels, 64)[:, :, :height, :width]
    assert backbone(images).shape == (3, SMALL.features)


def test_grey_images_equal_their_three_channel_copies() -> None:
    backbone = Backbone(SMALL).eval()
    grey = pictures(2, 1)
    assert torch.equal(backbone(grey), backbone(grey.expand(-1, 3, -1, -1)))


def test_features_are_the_same_in_parts_and_leave_the_mode() -> None:
    backbone = Backbone(SMALL).train()
    images = pictures(7)
    torch.testing.assert_close(features(backbone, images, batch=3), features(backbone, images))
    assert backbone.training


class _Elsewhere(nn.Module):
    """A backbone on a device without data, which says what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, device="meta"))
        self.seen: list[torch.device] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.device)
        return torch.ones(len(images), 2)


def test_features_are_computed_where_the_backbone_is() -> None:
    backbone, images = _Elsewhere(), pictures(5)
    found = features(backbone, images, batch=2)
    assert {device.type for device in backbone.seen} == {"meta"} and len(backbone.seen) == 3
    assert found.device == images.device and found.shape == (5, 2)


def test_backbone_faults_are_named() -> None:
    with pytest.raises(FlownError, match="Did you mean 'conv'"):
        Backbone(BackboneConfig(kind="convv"))
    with pytest.raises(FlownError, match="halve 4 pixels"):
        Backbone(BackboneConfig(size=4))
    with pytest.raises(FlownError, match=r"got torch.float32 \(2, 3, 8, 8\)"):
        Backbone(SMALL)(torch.zeros(2, 3, 8, 8))


# ---- support encoder


def test_encode_is_deterministic_and_picks_by_the_generator(encoder: SupportEncoder) -> None:
    images, labels = pictures(20), torch.arange(5).repeat(4)
    first = encoder.encode(images, labels, 5, seeded(0))
    assert first.shape == (5, encoder.width) and not first.requires_grad
    assert torch.equal(first, encoder.train().encode(images, labels, 5, seeded(0)))
    assert not torch.equal(first, encoder.encode(images, labels, 5, seeded(1)))


def test_given_queries_are_averaged_per_class(encoder: SupportEncoder) -> None:
    images, labels = pictures(10), torch.arange(5).repeat(2)
    asked, targets = pictures(15, seed=1), torch.arange(5).repeat(3)
    together = encoder.encode(images, labels, 5, seeded(0), (asked, targets))
    parts = [
        encoder.encode(images, labels, 5, seeded(0), (asked[i : i + 5], targets[:5]))
        for i in (0, 5, 10)
    ]
    torch.testing.assert_close(together, torch.stack(parts).mean(dim=0))


def test_bad_supports_are_named(encoder: SupportEncoder) -> None:
    images, labels = pictures(10), torch.arange(5).repeat(2)
    with pytest.raises(FlownError, match="support set: class 5 has no image"):
        encoder.encode(images, labels, 6, seeded(0))
    with pytest.raises(FlownError, match="queries: class 4 has no image"):
        encoder.encode(images, labels, 5, seeded(0), (images[:4], labels[:4]))
    with pytest.raises(FlownError, match="built for 6 ways"):
        encoder.encode(images, torch.arange(10), 10, seeded(0))


def test_save_and_load(encoder: SupportEncoder, tmp_path: Path) -> None:
    path = tmp_path / "support.safetensors"
    encoder.feature_mean += 0.5
    encoder.save(path)
    loaded = SupportEncoder.load(path)
    assert loaded.config == encoder.config
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)
    loaded.save(tmp_path / "again.safetensors")  # halves are kept to the bit
    again = SupportEncoder.load(tmp_path / "again.safetensors")
    images, labels = pictures(6), torch.arange(3).repeat(2)
    assert torch.equal(
        again.encode(images, labels, 3, seeded(0)), loaded.encode(images, labels, 3, seeded(0))
    )


def test_foreign_files_are_refused(encoder: SupportEncoder, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.zeros(1)})
    with pytest.raises(FlownError, match="header has no 'config'"):
        SupportEncoder.load(path)
    header = {"config": CONFIG.model_dump_json()}
    state = encoder.state_dict()
    save_tensors(path, {k: v for k, v in state.items() if k != "caml.unk_emb"}, header)
    with pytest.raises(FlownError, match=r"tensor 'caml.unk_emb' is missing"):
        SupportEncoder.load(path)
    save_tensors(path, state | {"caml.unk_emb": torch.zeros(1, 1, 3)}, header)
    with pytest.raises(FlownError, match=r"'caml.unk_emb' is \(1, 1, 3\), expected \(1, 1, 8\)"):
        SupportEncoder.load(path)


class _Pixels(nn.Module):
    """A user's backbone: the first pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :16].float() / 255


def test_a_backbone_of_the_users_own(tmp_path: Path) -> None:
    config = SupportConfig(backbone=None, caml=CONFIG.caml)
    encoder = SupportEncoder(config, _Pixels())
    encoder.save(tmp_path / "own.safetensors")
    loaded = SupportEncoder.load(tmp_path / "own.safetensors", _Pixels())
    images, labels = pictures(4), torch.arange(4)
    assert loaded.encode(images, labels, 4, seeded(0)).shape == (4, 24)
    for given in (config, CONFIG):
        with pytest.raises(FlownError, match=r"give either config.backbone or"):
            SupportEncoder(given, None if given is config else _Pixels())
    with pytest.raises(FlownError, match=r"backbone has 16 features, caml.feature_dim is 32"):
        SupportEncoder(SupportConfig(backbone=SMALL, caml=CAMLConfig(feature_dim=32)))


# ---- heads


@pytest.mark.parametrize("mode", ["ordered", "mean"])
def test_head_contract(mode: Literal["ordered", "mean"]) -> None:
    head = ContextHead(5, 12, mode)
    outputs = torch.randn(3, 5, 12, generator=seeded(0))
    context = head(outputs)
    assert context.shape == (3, 128)
    context.square().sum().backward()
    for parameter, value in head.named_parameters():
        assert value.grad is not None and value.grad.abs().sum() > 0, parameter
    copy = ContextHead(5, 12, mode)
    copy.load_state_dict(head.state_dict())
    assert torch.equal(copy(outputs), context)
    # Zero rows are absent classes, whether they are there or not.
    padded = nn.functional.pad(outputs[:, :3], (0, 0, 0, 2))
    torch.testing.assert_close(head(outputs[:, :3]), head(padded), atol=1e-6, rtol=0)
    with pytest.raises(FlownError, match=r"expected class outputs \(B, C, 12\), got \(3, 5, 11\)"):
        head(outputs[..., :11])


def test_mean_forgets_the_order_of_classes_and_ordered_does_not() -> None:
    outputs = torch.randn(2, 6, 12, generator=seeded(0))
    order = torch.randperm(6, generator=seeded(1))
    mean, ordered = ContextHead(6, 12, "mean"), ContextHead(6, 12, "ordered")
    torch.testing.assert_close(mean(outputs[:, order]), mean(outputs), atol=1e-5, rtol=0)
    assert (ordered(outputs[:, order]) - ordered(outputs)).abs().max() > 1e-2
    assert mean(torch.cat([outputs, outputs], dim=1)).shape == (2, 128)
    with pytest.raises(FlownError, match="7 classes, built for 6"):
        ordered(torch.ones(1, 7, 12))


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(FlownError, match="Did you mean 'ordered'"):
        ContextHead(5, 12, "orderd")  # type: ignore[arg-type]


# ---- tokens


@pytest.mark.parametrize("tokens", ["caml", "centroid"])
def test_sets_encoded_together_are_as_one_by_one(
    shipped: SupportEncoder, tokens: Literal["caml", "centroid"]
) -> None:
    """The same images and queries, whatever else is drawn in the same call."""
    images = {name: examples.images(name) for name in examples.TASKS}
    tasks = [examples.task(name) for name in examples.TASKS]
    config = ContextConfig(tokens=tokens, draws=6, shots=3)
    contexts = Contexts(shipped, tasks, images, config, classes=10)
    asked = [0, 2, 1, 0, 2]
    together, draw = contexts.sets(asked, seeded(5)), seeded(5)
    for tokens_of, place in zip(together, asked, strict=True):
        alone = contexts.sets([place], draw)[0]
        torch.testing.assert_close(tokens_of, alone, atol=1e-4, rtol=1e-4)
        assert bool(alone.abs().sum(dim=1).bool().equal(torch.arange(10) < (10, 10, 2)[place]))


@pytest.mark.parametrize("sets", [3, 10_000])
def test_drawn_tokens_are_of_the_tasks_numbered_sets(shipped: SupportEncoder, sets: int) -> None:
    """The same whatever was drawn before, as a resumed run draws them; few sets are encoded once.

    The sets of a task are its own: other images, not those of other tasks' numbers.
    """
    images = {name: examples.images(name) for name in examples.TASKS}
    tasks = [examples.task(name) for name in examples.TASKS]
    config = ContextConfig(draws=6, shots=3, sets=sets)
    contexts, again = (Contexts(shipped, tasks, images, config, classes=10) for _ in range(2))
    asked = torch.tensor([2, 0, 2, 1, 0])
    for seed in range(8):
        contexts.draw(asked, seeded(seed))
    drawn = contexts.draw(asked, seeded(5))
    assert torch.equal(drawn, again.draw(asked, seeded(5)))
    assert not torch.equal(drawn, contexts.draw(asked, seeded(6)))
    for tokens, place in zip(drawn, asked.tolist(), strict=True):
        assert bool(tokens.abs().sum(dim=1).bool().equal(torch.arange(10) < (10, 10, 2)[place]))
    if sets == 3:
        every = [contexts._numbered([(2, number)])[0] for number in range(3)]
        assert any(torch.equal(drawn[0], one) for one in every)
        assert len(contexts._tokens) == 9 and not torch.equal(every[0], every[1])
        orders = [torch.randperm(99, generator=_draw_of(*key)) for key in contexts._tokens]
        assert len({tuple(order.tolist()) for order in orders}) == 9
    else:
        assert not contexts._tokens


def test_a_drawn_set_is_as_encoding_its_images(shipped: SupportEncoder) -> None:
    data = examples.images("digits")
    config = ContextConfig(shots=3, per_class=4)
    contexts = Contexts(shipped, [examples.task()], {"digits": data}, config, classes=10)
    draw = seeded(3)
    rows = [(data.train.labels == k).nonzero().flatten()[:4] for k in range(10)]
    picked = torch.cat([row[torch.randperm(4, generator=draw)[:3]] for row in rows])
    support = data.train[picked]
    alone = shipped.encode(support.images, support.labels, 10, draw)
    torch.testing.assert_close(contexts.sets([0], seeded(3))[0], alone, atol=1e-4, rtol=1e-4)


# ---- what ships


@pytest.fixture(scope="module")
def shipped() -> SupportEncoder:
    return SupportEncoder.pretrained()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)
    return images[:, None], torch.from_numpy(data.target).long()


def test_pretrained_tells_digits_apart(
    shipped: SupportEncoder, digits: tuple[Tensor, Tensor]
) -> None:
    """Digits were not trained on; chance is 20 %."""
    images, labels = digits
    points = FeatureSet(shipped.features(images), labels, {"val": torch.arange(10)})
    found = episode_accuracy(shipped.caml, [points], ways=5, shots=5, episodes=100)
    assert found["accuracy"] > 40, found


def test_pretrained_tells_tasks_apart(
    shipped: SupportEncoder, digits: tuple[Tensor, Tensor]
) -> None:
    """Contexts of two support sets of a task lie nearer to each other than to another task's."""
    images, labels = digits
    turned = images.rot90(1, (2, 3))

    def context(pixels: Tensor, seed: int) -> Tensor:
        rows = torch.cat(
            [(labels == k).nonzero().flatten()[10 * seed : 10 * seed + 5] for k in range(10)]
        )
        return shipped.encode(pixels[rows], labels[rows], 10, seeded(seed))

    same = (context(images, 0) - context(images, 1)).norm()
    original = (context(images, 0) - context(turned, 1)).norm()
    assert shipped.width == shipped.config.caml.width and same < original
