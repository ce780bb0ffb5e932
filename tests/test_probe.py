"""Probes of many tasks are those of a loop in PyTorch; heads are a zoo that goes on where it was cut off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flown.base.errors import FlownError
from flown.bench.heads import loop
from flown.heads.classifiers import apply_heads
from flown.heads.heads import HeadsConfig, all_tasks, train_heads
from flown.heads.probe import ProbeConfig, probe

CLASSES = torch.arange(8)
LABELS = CLASSES.repeat_interleave(12)


def features(size: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(len(CLASSES), size, generator=generator)
    return means[LABELS] + torch.randn(len(LABELS), size, generator=generator)


@settings(max_examples=12, deadline=None)
@given(ways=st.integers(2, 11), shots=st.integers(1, 4), size=st.integers(1, 70))
def test_a_probe_is_adamws(ways: int, shots: int, size: int) -> None:
    generator = torch.Generator().manual_seed(ways * 100 + size)
    support = torch.randn(2, ways * shots, size, generator=generator)
    start = torch.randn(2, ways * size + ways, generator=generator)
    found = probe(support, ways, start=start)
    torch.testing.assert_close(
        found, loop(support, ways, start, "foreach", 1), rtol=1e-4, atol=1e-4
    )


def test_no_epoch_changes_nothing_and_tasks_do_not_meet() -> None:
    support, start = torch.randn(5, 6, 10), torch.randn(5, 33)
    assert torch.equal(probe(support, 3, ProbeConfig(epochs=0), start), start)
    assert torch.equal(probe(support, 3)[2:3], probe(support[2:3], 3))


def test_classes_in_another_order_give_their_rows() -> None:
    support, order = torch.randn(3, 4, 2, 10), torch.tensor([2, 0, 3, 1])
    heads = probe(support.flatten(1, 2), 4)
    turned = probe(support[:, order].flatten(1, 2), 4)
    query = torch.randn(3, 7, 10)
    logits = apply_heads(heads, query)
    torch.testing.assert_close(apply_heads(turned, query), logits[..., order], rtol=1e-4, atol=1e-5)
    for vector, images, expected in zip(heads, query, logits, strict=True):
        linear = torch.nn.Linear(10, 4)
        torch.nn.utils.vector_to_parameters(vector, linear.parameters())
        torch.testing.assert_close(linear(images), expected)


@pytest.mark.parametrize(
    ("shape", "ways"), [((2, 6), 3), ((2, 7, 4), 3), ((2, 0, 4), 2), ((2, 6, 4), 1)]
)
def test_a_support_that_is_none_is_refused(shape: tuple[int, ...], ways: int) -> None:
    with pytest.raises(FlownError, match="expected a support"):
        probe(torch.randn(shape), ways)


def test_a_start_of_another_shape_is_refused() -> None:
    with pytest.raises(FlownError, match=r"expected a start \(2, 15\), got \(2, 14\)"):
        probe(torch.randn(2, 6, 4), 3, start=torch.randn(2, 14))


def config(**changes: object) -> HeadsConfig:
    return HeadsConfig(tasks=1100, ways=3, shots=2, queries=4).model_copy(update=changes)


def test_heads_are_a_zoo_of_their_tasks(tmp_path: Path) -> None:
    x = features()
    zoo = train_heads(x, LABELS, CLASSES, tmp_path / "zoo", config())
    assert len(zoo) == 1100 and zoo.verify() == []
    assert len({row.shard for row in zoo.rows}) == 2
    tasks = list(all_tasks(x, LABELS, CLASSES, config()))
    assert torch.equal(zoo.read(range(1000, 1100)), probe(tasks[1].support, 3))
    assert len(zoo.tasks) == 1100
    assert zoo.tasks[zoo.rows[1000].task].members == tuple(tasks[1].classes[0].tolist())
    batch = zoo.batch(zoo.rows[0].task)
    logits = batch.logits(tasks[0].query[0][..., None, None])[0]
    torch.testing.assert_close(logits, apply_heads(batch.vectors[0], tasks[0].query[0]))
    right = (logits.argmax(1) == tasks[0].targets[0]).float().mean()
    assert zoo.rows[0].val_accuracy == pytest.approx(100 * float(right))
    assert sum(row.val_accuracy or 0 for row in zoo.rows) / len(zoo) > 60


def test_an_interrupted_zoo_of_heads_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flown.heads import heads as module

    x, whole = features(), train_heads(features(), LABELS, CLASSES, tmp_path / "whole", config())
    calls, real = [], module.probe

    def once(*arguments: object, **options: object) -> torch.Tensor:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "probe", once)
    with pytest.raises(KeyboardInterrupt):
        train_heads(x, LABELS, CLASSES, tmp_path / "cut", config())
    monkeypatch.setattr(module, "probe", real)
    with pytest.raises(FlownError, match="holds a run with another heads;"):
        train_heads(x, LABELS, CLASSES, tmp_path / "cut", config(seed=3), resume=True)
    zoo = train_heads(x, LABELS, CLASSES, tmp_path / "cut", config(), resume=True)
    assert zoo.identity == whole.identity
    assert (
        train_heads(x, LABELS, CLASSES, tmp_path / "cut", config(), resume=True).identity
        == zoo.identity
    )
    for how, images in ((config(seed=3), x), (config(), x + 1)):
        with pytest.raises(FlownError, match=r"holds a run with another (heads|features)"):
            train_heads(images, LABELS, CLASSES, tmp_path / "cut", how, resume=True)


def test_heads_of_an_older_sampler_are_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tasks would be other ones than those drawn again for the class tokens."""
    train_heads(features(), LABELS, CLASSES, tmp_path / "zoo", config(tasks=3))
    monkeypatch.setattr("flown.heads.heads.SAMPLER", 99)
    with pytest.raises(FlownError, match="holds a run with another sampler; choose another --out"):
        train_heads(features(), LABELS, CLASSES, tmp_path / "zoo", config(tasks=3), resume=True)


def test_no_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlownError, match="tasks must be 1 or more, got 0"):
        train_heads(features(), LABELS, CLASSES, tmp_path / "zoo", config(tasks=0))
