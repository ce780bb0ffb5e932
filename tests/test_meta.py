"""Generated heads: exact symmetries of the generator, and whether it learns from support sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flown.base.errors import FlownError
from flown.base.files import load_tensors
from flown.encoders import VAEConfig
from flown.flow import VelocityConfig
from flown.heads.classifiers import apply_heads
from flown.heads.frames import (
    class_tokens,
    join_rows,
    split_heads,
    support_tokens,
)
from flown.heads.heads import HeadsConfig
from flown.heads.meta import HeadFlow, HeadFlowConfig, fit_heads
from flown.heads.pretrain import GeneratorConfig, train_generator
from flown.heads.probe import probe
from flown.tasks import ClassPool, Episodes
from flown.training import TrainConfig
from tests.test_backbone import many

SIZE = 12
CLASSES = torch.arange(16)
LABELS = CLASSES.repeat_interleave(20)


def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(len(CLASSES), SIZE, generator=generator)
    return means[LABELS] + 0.5 * torch.randn(len(LABELS), SIZE, generator=generator)


def tasks(count: int = 6, ways: int = 4, seed: int = 0, part: slice = slice(12)) -> Episodes:
    generator = torch.Generator().manual_seed(seed)
    drawn = ClassPool(LABELS, CLASSES[part]).draw(ways, 1, 5, generator, count)
    return drawn.gather(features())


def quick(**changes: object) -> HeadFlowConfig:
    short = TrainConfig(steps=60, batch_size=64, learning_rate=3e-3, warmup=10, ema=0.9)
    return HeadFlowConfig(
        velocity=VelocityConfig(channels=8, blocks=1, conditioning="concat"),
        flow_training=short,
        encoder_training=short,
    ).model_copy(update=changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HeadFlow:
    drawn = tasks(300)
    return fit_heads(
        probe(drawn.support, 4), class_tokens(drawn), quick(), out=tmp_path_factory.mktemp("heads")
    )


@settings(max_examples=20, deadline=None)
@given(ways=st.integers(2, 7), size=st.integers(1, 9), queries=st.booleans())
def test_rows_and_frames_undo_each_other(ways: int, size: int, queries: bool) -> None:
    generator = torch.Generator().manual_seed(ways)
    heads = torch.randn(3, ways * size + ways, generator=generator)
    assert torch.equal(join_rows(split_heads(heads, ways)), heads)
    drawn = Episodes.of(
        torch.randn(3, ways, size, generator=generator),
        torch.randn(3, 2 * ways, size, generator=generator),
        torch.zeros(3, ways),
    )
    tokens, rows = class_tokens(drawn, queries), split_heads(heads, ways)
    torch.testing.assert_close(tokens.unframed(tokens.framed(rows)), rows, rtol=1e-3, atol=1e-4)
    # A head in the task's frame says of f' what it said of f.
    inside = (drawn.query - tokens.centre[:, None]) / tokens.radius[:, None, None]
    framed = join_rows(tokens.framed(rows))
    torch.testing.assert_close(
        apply_heads(framed, inside), apply_heads(heads, drawn.query), rtol=1e-3, atol=1e-3
    )


def test_permuted_classes_give_permuted_heads(model: HeadFlow) -> None:
    tokens, order = class_tokens(tasks()), torch.tensor([3, 1, 0, 2])
    noise = torch.randn(6, 2, 4, *model.latent_shape)
    rows = split_heads(model.generate(tokens, 2, noise=noise), 4)
    turned = split_heads(model.generate(tokens.permuted(order), 2, noise=noise[:, :, order]), 4)
    torch.testing.assert_close(turned, rows[:, :, order], rtol=1e-3, atol=1e-4)


def test_features_moved_and_scaled_give_the_same_logits(model: HeadFlow) -> None:
    drawn = tasks()
    moved = drawn._replace(support=3 * drawn.support + 7, query=3 * drawn.query + 7)
    before, after = (
        apply_heads(model.generate(class_tokens(t), 2, seed=1), t.query[:, None])
        for t in (drawn, moved)
    )
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-2)


def test_queries_enter_unlabelled_and_only_if_asked() -> None:
    drawn = tasks()
    shuffled = drawn._replace(query=drawn.query[:, torch.randperm(20)])
    torch.testing.assert_close(
        class_tokens(drawn).tokens, class_tokens(shuffled).tokens, rtol=1e-4, atol=1e-5
    )
    changed = drawn._replace(query=drawn.query.flip(0))
    assert torch.equal(class_tokens(drawn, False).tokens, class_tokens(changed, False).tokens)
    assert not torch.equal(class_tokens(drawn).tokens, class_tokens(changed).tokens)


def test_the_mean_of_heads_is_permuted_with_its_classes(model: HeadFlow) -> None:
    drawn, order = tasks(), torch.tensor([3, 1, 0, 2])
    rows = split_heads(model.mean_heads(class_tokens(drawn), 3), 4)
    turned = split_heads(model.mean_heads(class_tokens(drawn).permuted(order), 3), 4)
    torch.testing.assert_close(turned, rows[:, order], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.mean_heads(class_tokens(drawn), 3), join_rows(rows))


def test_a_repeated_image_changes_no_token() -> None:
    drawn = tasks()
    labels = drawn.labels
    twice = support_tokens(
        torch.cat([drawn.support, drawn.support[:, :1]], dim=1),
        torch.cat([labels, labels[:, :1]], dim=1),
        4,
    )
    once = class_tokens(drawn, False)
    torch.testing.assert_close(twice.centre, once.centre, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        twice.tokens * twice.radius[:, None, None],
        once.tokens * once.radius[:, None, None],
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_euclidean_source_is_the_nearest_centroid() -> None:
    drawn = tasks()
    near = HeadFlow(quick(source="euclidean"), SIZE, 2 * SIZE)
    tokens = class_tokens(drawn, False)
    heads = join_rows(tokens.unframed(near.centroid_rows(tokens.tokens)))
    logits = apply_heads(heads, drawn.query).log_softmax(dim=2)
    expected = (
        -torch.cdist(drawn.query, drawn.support).square() / 2 / tokens.radius[:, None, None] ** 2
    )
    torch.testing.assert_close(logits, expected.log_softmax(dim=2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ways", [2, 4, 7])
def test_heads_for_any_ways_on_unseen_classes(model: HeadFlow, ways: int) -> None:
    drawn = tasks(60, min(ways, 4), part=slice(12, 16)) if ways <= 4 else tasks(60, ways)
    heads = model.generate(class_tokens(drawn), 4)
    assert heads.shape == (60, 4, ways * SIZE + ways)
    assert torch.equal(heads, model.generate(class_tokens(drawn), 4))
    assert not torch.equal(heads, model.generate(class_tokens(drawn), 4, seed=1))
    right = apply_heads(heads, drawn.query[:, None]).argmax(3) == drawn.targets[:, None]
    probed = apply_heads(probe(drawn.support, ways), drawn.query).argmax(2) == drawn.targets
    assert right.float().mean() > probed.float().mean() - 0.05


KINDS = [
    {"source": "gaussian"},
    {"source": "euclidean"},
    {"process": "diffusion"},
    {"process": "v-diffusion"},
    {"queries": False},
    {"encoder": VAEConfig(side=16, width=4, multipliers=(1, 2))},
]


@pytest.mark.parametrize("change", KINDS)
def test_every_kind_runs_saves_and_loads(
    change: dict[str, object], model: HeadFlow, tmp_path: Path
) -> None:
    drawn, short = tasks(20), TrainConfig(steps=3, batch_size=8)
    config = quick(**change).model_copy(update={"flow_training": short, "encoder_training": short})
    like = None if "encoder" in change else model
    made = fit_heads(probe(drawn.support, 4), class_tokens(drawn), config, out=tmp_path, like=like)
    assert made.latent_shape == (4, 8, 8)
    made.save(tmp_path / "model.safetensors")
    again = HeadFlow.load(tmp_path / "model.safetensors")
    a, b = (m.generate(class_tokens(drawn), 2, steps=2) for m in (made, again))
    assert a.shape == (20, 2, 4 * SIZE + 4) and (a - b).abs().max() < 0.05 * a.abs().max()
    resumed = fit_heads(
        probe(drawn.support, 4), class_tokens(drawn), config, out=tmp_path, like=like, resume=True
    )
    assert torch.equal(resumed.generate(class_tokens(drawn), 2, steps=2), a)


def test_the_generator_that_ships_is_made_by_a_function_that_goes_on(tmp_path: Path) -> None:
    short = TrainConfig(steps=4, batch_size=20, warmup=2, ema=0.9)
    config = GeneratorConfig(
        heads=HeadsConfig(tasks=60, queries=5), shots=(2,), fit=quick(flow_training=short)
    )
    made = train_generator(many(), config, out=tmp_path)
    written, about = load_tensors(tmp_path / "heads.safetensors")
    (tmp_path / "heads.safetensors").unlink()
    (tmp_path / "flow" / "flow.checkpoint.safetensors").unlink()
    train_generator(many(), config, out=tmp_path)
    again = load_tensors(tmp_path / "heads.safetensors")
    assert again[1] == about and all(torch.equal(again[0][name], x) for name, x in written.items())
    shipped = HeadFlow.pretrained()
    assert (
        shipped.features
        == made.features
        == HeadFlow.load(tmp_path / "heads.safetensors").features
        == 192
    )
    with pytest.raises(FlownError, match=r"holds a run with another (heads|features)"):
        train_generator(
            many(), config.model_copy(update={"heads": HeadsConfig(tasks=59)}), out=tmp_path
        )


def test_bad_input_is_named(model: HeadFlow, tmp_path: Path) -> None:
    drawn = tasks()
    with pytest.raises(
        FlownError, match=r"heads: expected \(6, 52\) for these tasks, got \(6, 51\)"
    ):
        fit_heads(torch.zeros(6, 51), class_tokens(drawn), quick(), out=tmp_path)
    with pytest.raises(FlownError, match="n of 1 or more and 12 features, got 0 and 12"):
        model.generate(class_tokens(drawn), 0)
    with pytest.raises(FlownError, match="choose euler"):
        model.generate(class_tokens(drawn), 1, solver="ddim")
    with pytest.raises(FlownError, match="no such file"):
        HeadFlow.load(tmp_path / "none.safetensors")
