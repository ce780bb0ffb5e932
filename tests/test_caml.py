"""ELMES, CAML, its importer and its training by episodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flown.base.errors import FlownError
from flown.context import (
    CAML,
    CAMLConfig,
    FeatureSet,
    elmes,
    episode_accuracy,
    load_published,
    train_caml,
)
from flown.context.episodes import FramedPools
from flown.context.published import published_name
from flown.training import TrainConfig

TINY = CAMLConfig(ways=5, feature_dim=16, label_dim=8, layers=2, heads=4, mlp=32)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_caml(config: CAMLConfig = TINY) -> CAML:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CAML(config).eval()


@pytest.fixture
def caml() -> CAML:
    return make_caml()


def episode(ways: int, shots: int = 2, queries: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    support = torch.randn(2, ways * shots, TINY.feature_dim, generator=seeded(1))
    query = torch.randn(2, queries, TINY.feature_dim, generator=seeded(2))
    return support, torch.arange(ways).repeat(2, shots), query


# ---- the frame


@given(classes=st.integers(2, 24), spare=st.integers(0, 40), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_elmes_is_an_equiangular_frame(classes: int, spare: int, seed: int) -> None:
    frame = elmes(classes, classes + spare, seed).double()
    expected = (torch.eye(classes) * classes - 1).double() / (classes - 1)
    torch.testing.assert_close(frame @ frame.T, expected, atol=1e-5, rtol=0)  # lengths and angles
    assert frame.sum(dim=0).abs().max() < 1e-5


@given(classes=st.integers(2, 12), seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_elmes_permutations_are_isometries(classes: int, seed: int) -> None:
    frame = elmes(classes, 32)
    order = torch.randperm(classes, generator=seeded(seed))
    torch.testing.assert_close(torch.cdist(frame[order], frame[order]), torch.cdist(frame, frame))


def test_elmes_is_fixed_by_its_seed_and_refuses_too_few_dimensions() -> None:
    assert torch.equal(elmes(5, 16), elmes(5, 16, seed=50))
    assert not torch.equal(elmes(5, 16), elmes(5, 16, seed=51))
    for classes, dim in ((9, 8), (1, 8)):
        with pytest.raises(FlownError, match=f"got {classes} classes in {dim}"):
            elmes(classes, dim)


# ---- the transformer


@pytest.mark.parametrize("ways", [2, 3, 5])
def test_any_number_of_ways(caml: CAML, ways: int) -> None:
    support, labels, query = episode(ways)
    assert caml(support, labels, query).shape == (2, 3, TINY.width)
    assert caml.logits(support, labels, query).shape == (2, 3, TINY.ways)
    assert caml.logits(support, labels, query, ways=ways).shape == (2, 3, ways)


def test_order_of_the_support_changes_nothing(caml: CAML) -> None:
    support, labels, query = episode(5)
    order = torch.randperm(10, generator=seeded(0))
    shuffled = caml(support[:, order], labels[:, order], query)
    torch.testing.assert_close(shuffled, caml(support, labels, query), atol=1e-5, rtol=0)


def test_queries_do_not_see_each_other(caml: CAML) -> None:
    support, labels, query = episode(4)
    alone = torch.cat([caml(support, labels, query[:, [i]]) for i in range(3)], dim=1)
    torch.testing.assert_close(alone, caml(support, labels, query), atol=1e-5, rtol=0)


def test_renaming_labels_with_the_frame_permutes_logits(caml: CAML) -> None:
    support, labels, query = episode(5)
    order = torch.randperm(5, generator=seeded(3))
    renamed = make_caml()
    with torch.no_grad():  # vector order[i] now stands for label i
        renamed.label_elmes.copy_(caml.label_elmes[order])
        renamed.output_proj.weight.copy_(caml.output_proj.weight[order])
    inverse = order.argsort()
    before = caml.logits(support, labels, query)
    after = renamed.logits(support, inverse[labels], query)
    torch.testing.assert_close(after, before[..., order], atol=1e-5, rtol=0)


def test_labels_matter(caml: CAML) -> None:
    support, labels, query = episode(5)
    assert not torch.allclose(caml(support, labels.flip(1), query), caml(support, labels, query))


def test_gradients_reach_every_parameter(caml: CAML) -> None:
    caml.logits(*episode(5)).square().sum().backward()
    for name, parameter in caml.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_wrong_inputs_are_named(caml: CAML) -> None:
    support, labels, query = episode(5)
    with pytest.raises(FlownError, match=r"labels go from 1 to 5, it was built for 5 ways"):
        caml(support, labels + 1, query)
    with pytest.raises(FlownError, match=r"query features \(B, \*, 16\), got \(2, 3, 15\)"):
        caml(support, labels, query[..., :15])
    with pytest.raises(FlownError, match=r"expected labels \(2, 10\)"):
        caml(support, labels[:, :9], query)
    with pytest.raises(FlownError, match="no multiple of 5 heads"):
        CAML(TINY.model_copy(update={"heads": 5}))


# ---- the official checkpoint


def official(caml: CAML) -> dict[str, Tensor]:
    state = {published_name(name): tensor for name, tensor in caml.state_dict().items()}
    return {"feature_extractor.cls_token": torch.zeros(1), **state}


def test_published_names_and_sizes() -> None:
    config = CAMLConfig.published()
    assert (config.width, config.ways) == (1024, 5)
    assert (config.layers, config.heads, config.mlp) == (24, 16, 4096)
    names = {published_name(name) for name in make_caml().state_dict()}
    layer = "transformer_encoder.encoder.layers.encoder_layer_1"
    assert names >= {
        "transformer_encoder.label_elmes",
        "transformer_encoder.elmes_scale",
        "transformer_encoder.unk_emb",
        "transformer_encoder.output_proj.weight",
        "transformer_encoder.encoder.ln.weight",
        f"{layer}.self_attention.in_proj_weight",
        f"{layer}.mlp.0.weight",
        f"{layer}.mlp.3.bias",
        f"{layer}.ln_2.bias",
    }


def test_import_gives_the_same_outputs(caml: CAML) -> None:
    with torch.no_grad():
        for parameter in caml.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=seeded(4))
    loaded = load_published(official(caml), TINY)
    assert torch.equal(loaded.logits(*episode(5)), caml.logits(*episode(5)))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_import_knows_older_spellings(caml: CAML) -> None:
    renames = {
        "label_elmes": "label_etf",
        "elmes_scale": "etf_scale",
        "mlp.0": "mlp.linear_1",
        "mlp.3": "mlp.linear_2",
    }
    state = {}
    for name, tensor in official(caml).items():
        for new, old in renames.items():
            name = name.replace(new, old)
        state[f"module.{name}"] = tensor
    assert torch.equal(load_published(state, TINY).logits(*episode(5)), caml.logits(*episode(5)))


def test_import_names_what_is_wrong(caml: CAML) -> None:
    state = official(caml)
    with pytest.raises(FlownError, match=r"unexpected tensor 'transformer_encoder.cls'"):
        load_published(state | {"transformer_encoder.cls": torch.zeros(1)}, TINY)
    name = "transformer_encoder.encoder.layers.encoder_layer_0.mlp.0.weight"
    with pytest.raises(FlownError, match=rf"'{name}' is missing"):
        load_published({k: v for k, v in state.items() if k != name}, TINY)
    with pytest.raises(FlownError, match=rf"'{name}' is \(3, 24\), expected \(32, 24\)"):
        load_published(state | {name: torch.zeros(3, 24)}, TINY)


# ---- training


def clusters(classes: int = 24, each: int = 12, spread: float = 0.6) -> FeatureSet:
    """Classes as clouds around random centres; the first 16 train, the rest validate."""
    centres = torch.randn(classes, TINY.feature_dim, generator=seeded(5))
    features = centres.repeat_interleave(each, dim=0)
    features = features + spread * torch.randn(features.shape, generator=seeded(6))
    split = {"train": torch.arange(16), "val": torch.arange(16, classes)}
    return FeatureSet(features, torch.arange(classes).repeat_interleave(each), split)


def test_episodes_share_no_image_and_labels_vary() -> None:
    points = clusters()
    batch = FramedPools([points], "val", 9).draw(4, 3, 6, seeded(0))
    assert batch.support.shape == (6, 12, 16) and batch.query.shape == (6, 4, 16)
    assert len(batch.labels.unique()) > 4  # of the frame's 9
    for support, query in zip(batch.support, batch.query, strict=True):
        assert torch.cdist(support, query).min() > 0
    for labels, targets in zip(batch.labels, batch.targets, strict=True):
        assert torch.equal(labels.unique(), targets.sort().values)


def test_training_learns_new_classes_and_resumes(tmp_path: Path) -> None:
    points = clusters()
    settings = TrainConfig(
        steps=120,
        batch_size=8,
        learning_rate=3e-3,
        warmup=10,
        ema=0.9,
        validate_every=60,
        checkpoint_every=60,
    )
    before = episode_accuracy(make_caml(), [points], episodes=60)
    caml = train_caml([points], TINY, settings, out=tmp_path, drift=0.3)
    after = episode_accuracy(caml, [points], episodes=60)
    assert after["accuracy"] > max(80, before["accuracy"]), (before, after)
    assert before["centroid"] == after["centroid"] > 80
    again = train_caml([points], TINY, settings, out=tmp_path, drift=0.3, resume=True)
    assert torch.equal(again.unk_emb, caml.unk_emb)


def test_training_refuses_other_features(tmp_path: Path) -> None:
    with pytest.raises(FlownError, match=r"expected features \(N, 128\), got \(288, 16\)"):
        train_caml([clusters()], CAMLConfig(), TrainConfig(steps=1), out=tmp_path)
    with pytest.raises(FlownError, match="no set of features"):
        train_caml([], TINY, TrainConfig(steps=1), out=tmp_path)
