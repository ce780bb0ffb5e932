"""Glyphs, looks and streams of tasks: what is drawn, what is left out, and from which numbers."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from flown.base.errors import FlownError
from flown.tasks import ClassPool, ManyClass, load, load_many
from flown.tasks.looks import Looks
from flown.tasks.stream import StreamConfig, TaskStream

POOLS = StreamConfig(pools={"glyphs": 1.0, "colours": 1.0}, ways=6, shots=4)


@pytest.fixture(scope="module")
def colours() -> ManyClass:
    """Twenty classes of noisy plain colours, four of them to validate on."""
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(20, 3, generator=generator)
    noise = 0.1 * torch.randn(20, 12, 3, 24, 24, generator=generator)
    images = (means[:, None, :, None, None] + noise).clamp(0, 1).flatten(0, 1)
    labels = torch.arange(20).repeat_interleave(12)
    split = {"train": torch.arange(16), "val": torch.arange(16, 20), "test": torch.arange(0)}
    names = tuple(f"colour/{i}" for i in range(20))
    return ManyClass("colours", names, (255 * images).byte(), labels, split)


@pytest.fixture
def stream(colours: ManyClass) -> TaskStream:
    return TaskStream(POOLS, {"glyphs": load_many("glyphs"), "colours": colours})


def test_glyphs_are_many_and_none_is_a_digit_or_a_latin_letter() -> None:
    pool = load_many("glyphs")
    assert len(pool.classes) > 1500 and pool.images.shape[1:] == (1, 32, 32)
    assert torch.bincount(pool.labels, minlength=len(pool.classes)).min() >= 1
    characters = [unicodedata.lookup(name) for name in pool.classes]
    assert not [c for c in characters if unicodedata.category(c).startswith("N") or c.isdecimal()]
    assert not [name for name in pool.classes if name.startswith(("latin small letter ", "hira"))]
    assert all(image.any() for image in pool.images)


def test_glyphs_that_look_like_digits_are_left_out() -> None:
    """Correlations with sevens and threes as fonts draw them, by another computation."""
    from flown.tasks import glyphs

    pool = load_many("glyphs").images.float()
    font = glyphs._font(glyphs._font_files()[0])
    for digit in "37":
        wanted = glyphs._glyph(font, digit).float()
        both = F.avg_pool2d(F.avg_pool2d(torch.cat([wanted, pool]), 3, 1, 1), 2).flatten(1)
        correlation = torch.corrcoef(both[:400])[0, 1:]
        assert correlation.max() <= glyphs._ALIKE + 1e-4


def test_the_pool_is_rendered_once() -> None:
    from flown.tasks import cache_folder

    load_many("glyphs")
    (file,) = cache_folder().glob("glyphs-*.npz")
    before = file.stat().st_mtime_ns
    again = load_many("glyphs")
    assert file.stat().st_mtime_ns == before and again.identity == load_many("glyphs").identity


@pytest.mark.parametrize("channels", [1, 3])
def test_tasks_have_the_size_that_was_asked_for(stream: TaskStream, channels: int) -> None:
    tasks = stream.draw(torch.Generator().manual_seed(0), channels, (7, 5, 3, 2))
    assert tasks.support.shape == (7, 15, channels, 32, 32)
    assert tasks.query.shape == (7, 10, channels, 32, 32)
    assert tasks.labels[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert 0 <= tasks.support.min() and tasks.support.max() <= 1
    assert tasks.support.flatten(2).std(dim=2).min() >= 0 and torch.isfinite(tasks.query).all()


def test_the_same_generator_draws_the_same_tasks(stream: TaskStream) -> None:
    first, second, other = (
        stream.draw(torch.Generator().manual_seed(seed), 3) for seed in (4, 4, 5)
    )
    assert torch.equal(first.support, second.support) and torch.equal(first.query, second.query)
    assert first.support.shape != other.support.shape or not first.support.equal(other.support)


def test_sizes_stay_within_the_configs(stream: TaskStream) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        tasks, ways, shots, queries = stream.size(generator)
        assert 2 <= tasks <= 16 and 2 <= ways <= POOLS.ways and 1 <= shots <= POOLS.shots
        assert ways * shots <= POOLS.support and queries >= 1


def test_classes_of_the_task_can_be_told_apart(stream: TaskStream) -> None:
    """Looks change all images of a task alike: nearest centroids stay far above chance."""
    tasks = stream.draw(torch.Generator().manual_seed(1), 3, (40, 5, 4, 4))
    means = tasks.support.flatten(2).unflatten(1, (5, 4)).mean(dim=2)
    found = torch.cdist(tasks.query.flatten(2), means).argmin(dim=-1)
    assert (found == tasks.targets).float().mean() > 0.35


def test_looks_differ_between_tasks_more_than_within() -> None:
    images = torch.zeros(20, 6, 1, 32, 32)
    images[..., 8:24, 14:18] = 1
    made = Looks(torch.Generator().manual_seed(0)).strokes(images, 1).flatten(2).mean(dim=2)
    assert made.mean(dim=1).std() > made.std(dim=1).mean()


def test_validation_classes_are_not_those_of_training(stream: TaskStream) -> None:
    config = POOLS.model_copy(update={"pools": {"colours": 1.0}})
    fixed = TaskStream(config, {"colours": stream.pools["colours"].source})
    assert fixed.validation() == {}  # four classes are too few for ten-way tasks
    assert stream.pools["colours"].classes.classes.tolist() == list(range(16))


def test_named_classes_are_left_out(colours: ManyClass) -> None:
    config = StreamConfig(pools={"colours": 1.0}, without=("colour/1",), ways=5)
    pool = TaskStream(config, {"colours": colours}).pools["colours"]
    assert pool.classes.classes.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9]


def test_too_few_classes_are_named(colours: ManyClass) -> None:
    with pytest.raises(FlownError, match="colours: 16 classes to draw from, tasks have up to 20"):
        TaskStream(StreamConfig(pools={"colours": 1.0}), {"colours": colours})


def test_a_folder_of_images_is_a_pool(tmp_path: Path) -> None:
    train = load("digits").train
    for label in range(10):
        folder = tmp_path / "photos" / f"digit {label}"
        folder.mkdir(parents=True)
        for i, image in enumerate(train.images[train.labels == label][:8]):
            Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    name = str(tmp_path / "photos")
    stream = TaskStream(StreamConfig(pools={name: 1.0}, ways=5, shots=2))
    tasks = stream.draw(torch.Generator().manual_seed(0), 1, (2, 5, 2, 2), looks=False)
    assert tasks.support.shape == (2, 10, 1, 32, 32)


def test_a_class_with_too_few_images_gives_them_again() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    generator = torch.Generator().manual_seed(0)
    rows = ClassPool(labels, [0, 1], repeat=True).draw(2, 2, 3, generator, 1)
    drawn = torch.cat([rows.support, rows.query], 1)[0].tolist()
    assert drawn.count(3) == 5 and {0, 1, 2, 3} == set(drawn) and len(drawn) == 10
    with pytest.raises(FlownError, match="class 1 has 1 images, 5 are needed"):
        ClassPool(labels, [0, 1]).draw(2, 2, 3, generator, 1)


def test_a_limited_stream_repeats_its_tasks(stream: TaskStream) -> None:
    """Eleven tasks in all, whichever are asked for: the same classes, images and looks."""
    draws = stream.draws(POOLS.model_copy(update={"count": 11}))
    number = len(draws.tasks)
    assert sum(draws.tasks) == 11 and number > 1
    kept = [draws.at(seed) for seed in range(number)]
    assert [len(tasks.labels) for tasks in kept] == draws.tasks
    for seed in range(3 * number):
        again, wanted = draws.at(seed), kept[seed % number]
        for found, tensor in zip(again, wanted, strict=True):
            assert torch.equal(found, tensor)
    generator, sums = torch.Generator().manual_seed(0), {float(k.support.sum()) for k in kept}
    drawn = {float(draws.next(generator).support.sum()) for _ in range(8 * number)}
    assert drawn == sums, "random draws are these, and all of them"


def test_a_stream_without_end_does_not_repeat_itself(stream: TaskStream) -> None:
    draws, generator = stream.draws(), torch.Generator().manual_seed(0)
    assert len({float(draws.next(generator).support.sum()) for _ in range(30)}) == 30
    assert torch.equal(draws.at(7).query, draws.at(7).query)
    assert {draws.at(seed).support.shape[2] for seed in range(10)} == {1, 3}
