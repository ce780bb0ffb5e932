"""Distances and agreement of errors, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flown import FlownError
from flown.measure import novelty


def points(n: int, d: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def masks(n: int, images: int = 30, seed: int = 0) -> torch.Tensor:
    return points(n, images, seed) > 0.5


def l2_ratio(vectors: torch.Tensor, train: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    """The study's ratio, of its two parts."""
    return novelty.nearest_distance(vectors, train) / novelty.held_out_distance(train, held)


def test_nearest_distance_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = points(5), points(13, seed=1)
    expected = torch.stack([min((x - y).norm() for y in b) for x in a])
    torch.testing.assert_close(novelty.nearest_distance(a, b), expected)
    monkeypatch.setattr(novelty, "_CHUNK", 100)  # two rows at a time
    torch.testing.assert_close(novelty.nearest_distance(a, b), expected)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), scale=st.floats(0.1, 100), n=st.integers(1, 6))
def test_ratio_knows_neither_scale_nor_order(seed: int, scale: float, n: int) -> None:
    generated, train, held = (points(k, seed=seed + i) for i, k in enumerate((n, 7, 3)))
    ratio = l2_ratio(generated, train, held)
    torch.testing.assert_close(
        l2_ratio(scale * generated, scale * train.flip(0), scale * held),
        ratio,
        rtol=1e-4,
        atol=1e-5,
    )
    assert l2_ratio(held, train, held).mean().item() == pytest.approx(1)


def test_a_copy_is_at_zero_and_noise_in_proportion() -> None:
    train, held = points(9), points(4, seed=1)
    assert l2_ratio(train[:3], train, held).max() < 1e-5
    step = points(3, seed=2)
    near, far = (l2_ratio(train[:3] + s * step, train, held) for s in (0.01, 0.02))
    torch.testing.assert_close(far, 2 * near)


def test_checkpoints_of_one_network_do_not_count_as_others() -> None:
    train, models = points(4), [0, 1, 2, 3]
    twice = torch.cat([train, train + 1e-3])
    alone = novelty.nearest_distance(train, train, novelty.same_network(models, models))
    assert alone.min() > 1, "networks lie apart"
    same = novelty.same_network(models, models * 2)
    torch.testing.assert_close(
        novelty.nearest_distance(train, twice, same), alone, atol=0.01, rtol=0
    )
    assert novelty.nearest_distance(train, twice[4:]).max() < 0.01


def test_held_out_networks_are_needed() -> None:
    train = points(4)
    with pytest.raises(FlownError, match="held-out network at least"):
        l2_ratio(train, train, train[:0])
    with pytest.raises(FlownError, match="equals a training network"):
        l2_ratio(train, train, train[:2])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 5), m=st.integers(1, 5))
def test_iou_is_that_of_sets(seed: int, n: int, m: int) -> None:
    a, b = masks(n, seed=seed), masks(m, seed=seed + 1)
    found = novelty.iou(a, b)
    for i in range(n):
        for j in range(m):
            x, y = set(a[i].nonzero().flatten().tolist()), set(b[j].nonzero().flatten().tolist())
            assert found[i, j].item() == pytest.approx(len(x & y) / len(x | y) if x | y else 1)
    torch.testing.assert_close(found, novelty.iou(b, a).T)
    torch.testing.assert_close(novelty.iou(a, a).diagonal(), torch.ones(n))
    torch.testing.assert_close(novelty.largest_iou(a, b), found.amax(dim=1))


def test_iou_of_the_flawless_and_the_disjoint() -> None:
    none, some = torch.zeros(1, 8, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)
    assert novelty.iou(none, none).item() == 1
    assert novelty.iou(none, some).item() == 0


def test_excluded_pairs_do_not_count() -> None:
    wrong = masks(3)
    others = novelty.largest_iou(wrong, wrong, novelty.same_network([0, 1, 2], [0, 1, 2]))
    pairs = novelty.iou(wrong, wrong).fill_diagonal_(0)
    torch.testing.assert_close(others, pairs.amax(dim=1))


def test_diversity() -> None:
    wrong = masks(4)
    pairs = [novelty.iou(wrong[[i]], wrong[[j]]).item() for i in range(4) for j in range(i)]
    assert novelty.mutual_iou(wrong) == pytest.approx(sum(pairs) / 6)
    assert novelty.mutual_iou(wrong[:1]) == 1
    assert novelty.mutual_iou(wrong[[0, 0, 0]]) == pytest.approx(1)
