"""Few-shot episodes: the properties of every draw, for any sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flown.base.errors import FlownError
from flown.tasks import ClassPool, Episodes, check_disjoint
from flown.tasks.draw import cpu_generator

SIZES = torch.tensor([9, 12, 7, 30, 8, 11, 9])  # images a class; classes 0 and 5 are not drawn
LABELS = torch.arange(7).repeat_interleave(SIZES)[
    torch.randperm(86, generator=torch.Generator().manual_seed(0))
]
POOL = ClassPool(LABELS, torch.tensor([6, 1, 2, 3, 4]))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    ways=st.integers(1, 5),
    shots=st.integers(1, 4),
    queries=st.integers(1, 3),
    count=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_every_draw(ways: int, shots: int, queries: int, count: int, seed: int) -> None:
    drawn = POOL.draw(ways, shots, queries, seeded(seed), count)
    assert drawn.support.shape == drawn.labels.shape == (count, ways * shots)
    assert drawn.query.shape == drawn.targets.shape == (count, ways * queries)
    assert (drawn.ways, drawn.shots) == (ways, shots)
    assert set(drawn.classes.flatten().tolist()) <= {6, 1, 2, 3, 4}
    for episode in range(count):
        rows = torch.cat([drawn.support[episode], drawn.query[episode]])
        assert len(rows.unique()) == len(rows), "an image stands twice in an episode"
        places = torch.cat([drawn.labels[episode], drawn.targets[episode]])
        assert torch.equal(LABELS[rows], drawn.classes[episode][places])
        assert len(drawn.classes[episode].unique()) == ways
        assert drawn.labels[episode].bincount().tolist() == [shots] * ways
        assert drawn.targets[episode].bincount().tolist() == [queries] * ways


@given(shots=st.integers(1, 7), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_every_support_set(shots: int, seed: int) -> None:
    rows = POOL.draw_support(shots, seeded(seed))
    assert torch.equal(LABELS[rows], POOL.classes.repeat_interleave(shots))
    assert len(rows.unique()) == 5 * shots
    assert torch.equal(rows, POOL.draw_support(shots, seeded(seed)))


@given(count=st.integers(1, 30), longer=st.integers(0, 30), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_generator_decides_and_further_episodes_change_none(
    count: int, longer: int, seed: int
) -> None:
    drawn = POOL.draw(3, 2, 2, seeded(seed), count)
    beginning = POOL.draw(3, 2, 2, seeded(seed), count + longer).part(slice(count))
    for first, second in zip(drawn, beginning, strict=True):
        assert torch.equal(first, second)
    reseeded = POOL.draw(3, 2, 2, seeded(seed + 1), count)
    assert not torch.equal(drawn.support, reseeded.support)


def test_all_classes_and_images_are_equally_frequent() -> None:
    drawn = POOL.draw(2, 1, 1, seeded(0), 8000)
    share = torch.bincount(drawn.classes.flatten(), minlength=7)[POOL.classes] / 16000
    assert (share - 0.2).abs().max() < 0.02
    rows = drawn.support.flatten()
    of_three = torch.bincount(rows[LABELS[rows] == 3], minlength=86)[LABELS == 3]
    assert (of_three / of_three.sum() - 1 / 30).abs().max() < 0.012


def test_gathered_rows_joined_parts_and_first_shots() -> None:
    features = torch.stack([torch.arange(86.0), LABELS.float()], dim=1)
    drawn = POOL.draw(3, 2, 4, seeded(0), 5)
    gathered = drawn.gather(features)
    assert torch.equal(gathered.support[..., 0].long(), drawn.support)
    of_queries = drawn.classes.gather(1, drawn.targets)
    assert torch.equal(gathered.query[..., 1].long(), of_queries)
    parts = [gathered.part(slice(2)), gathered.part(torch.tensor([2, 3, 4]))]
    for whole, joined in zip(gathered, Episodes.join(parts), strict=True):
        assert torch.equal(whole, joined)
    one_shot = drawn.first_shots(1)
    assert torch.equal(one_shot.support, drawn.support[:, ::2])
    assert one_shot.labels[0].tolist() == [0, 1, 2] and one_shot.shots == 1


@pytest.mark.parametrize(
    ("ways", "shots", "queries", "count", "message"),
    [
        (6, 1, 1, 1, "6 ways asked for, there are 5 classes"),
        (1, 4, 4, 1, "class 2 has 7 images, 8 are needed"),
        (0, 1, 1, 1, "ways=0"),
        (2, 0, 1, 1, "shots=0"),
        (2, 1, 0, 1, "queries=0"),
        (2, 1, 1, 0, "count=0"),
    ],
)
def test_impossible_draws_are_refused(
    ways: int, shots: int, queries: int, count: int, message: str
) -> None:
    with pytest.raises(FlownError, match=message):
        POOL.draw(ways, shots, queries, seeded(0), count)


def test_a_class_without_images_is_named() -> None:
    pool = ClassPool(LABELS, [1, 9])
    with pytest.raises(FlownError, match="class 9 has 0 images, 2 are needed"):
        pool.draw_support(2, seeded(0))
    with pytest.raises(FlownError, match="class 9 has 0 images, 3 are needed"):
        pool.draw(1, 2, 1, seeded(0))


def test_a_generator_follows_from_another() -> None:
    first, second = (cpu_generator(seeded(seed)).initial_seed() for seed in (0, 1))
    assert first == cpu_generator(seeded(0)).initial_seed() != second


def test_parts_that_share_a_class_are_refused() -> None:
    parts = {"train": torch.arange(5), "val": torch.arange(5, 8), "test": torch.arange(8, 12)}
    check_disjoint(parts)
    with pytest.raises(FlownError, match="class 4 is in both 'train' and 'test'"):
        check_disjoint(parts | {"test": torch.tensor([9, 4])})
