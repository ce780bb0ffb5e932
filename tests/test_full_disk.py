"""The disk is full at the k-th write, for every k: one line says so, and a rerun ends as if it had not.

A process that is killed between two writes leaves the same files, so that this shows both.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flown
from flown.base.errors import FlownError
from flown.base.files import load_tensors
from flown.context.tokens import ContextConfig
from flown.encoders import IdentityConfig
from flown.flow import VelocityConfig
from flown.generator.adapt import AdaptConfig, adapt
from flown.generator.config import FlownConfig
from flown.heads.heads import HeadsConfig, train_heads
from flown.measure.finetune import FinetuneConfig, finetune
from flown.training import TrainConfig
from flown.zoo import Recipe
from flown.zoo.align.align import align_zoo
from tests import examples
from tests.test_adapt import tiny

SHORT = TrainConfig(steps=4, batch_size=4, checkpoint_every=2, validate_every=2)
Work = Callable[[Path, bool], Any]


class Disk:
    """Counts files as they are written, and has room for no more than `room`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written, self.room = 0, 10**9
        self._sync = os.fsync
        monkeypatch.setattr(os, "fsync", self._write)

    def _write(self, handle: int) -> None:
        if self.written >= self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.written += 1
        self._sync(handle)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def contents(folder: Path) -> dict[str, Any]:
    """All that lies in a folder; safetensors does not order what it says of a file."""
    return {
        str(path.relative_to(folder)): _content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _content(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return path.read_bytes()
    tensors, about = load_tensors(path)
    return about, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def train(out: Path, resume: bool) -> None:
    recipe = Recipe(
        name="few", dataset="digits", learning_rate=1e-3, batch_size=32, epochs=2, keep=(1, 2)
    )
    flown.train_zoo(recipe, 3, out / "zoo", resume=resume)


def fit(out: Path, resume: bool, zoo: flown.Zoo) -> None:
    config = FlownConfig(
        encoder=IdentityConfig(),
        encoder_training=SHORT,
        velocity=VelocityConfig(channels=8, blocks=1),
        context=ContextConfig(draws=1),
        flow_training=SHORT,
    )
    images = {task: examples.images(task) for task in examples.TASKS}
    flown.Flown.fit(zoo, config, images=images, out=out / "run", resume=resume)


def adapted(out: Path, resume: bool) -> None:
    config = AdaptConfig(networks=2, steps=2, validated=2, training=SHORT)
    adapt(tiny(), examples.images("digits"), config, out=out / "run", resume=resume)


def finetuned(out: Path, resume: bool) -> None:
    config = FinetuneConfig(epochs=2, batch_size=64, max_train_images=256)
    networks, images = examples.networks(2), examples.images("digits")
    finetune(networks, images, config, out=out / "nets.safetensors", resume=resume)


def few_shot_heads(out: Path, resume: bool) -> None:
    classes = examples.images("digits").train
    features = classes.images.flatten(1).float()[:200]
    config = HeadsConfig(ways=2, shots=1, queries=5, tasks=3)
    few = classes.labels[:200]
    train_heads(features, few, torch.arange(10), out / "zoo", config, resume=resume)


def aligned(out: Path, resume: bool, zoo: flown.Zoo) -> None:
    align_zoo(zoo, out / "aligned", overwrite=resume)


def joined(out: Path, resume: bool, zoo: flown.Zoo) -> None:
    flown.Zoo.join([zoo], out / "joined", resume=resume)


@pytest.mark.parametrize(
    "work",
    [train, fit, adapted, finetuned, few_shot_heads, aligned, joined],
    ids=lambda w: w.__name__,
)
def test_a_full_disk_at_every_write(
    work: Callable[..., None], disk: Disk, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    given = [request.getfixturevalue("three_tasks")] if "zoo" in work.__annotations__ else []
    disk.written = 0
    work(tmp_path / "whole", False, *given)
    whole, writes = contents(tmp_path / "whole"), disk.written
    assert writes > 2
    for room in range(writes):
        out = tmp_path / str(room)
        disk.written, disk.room = 0, room
        with pytest.raises(FlownError, match=r": cannot be written \(No space left on device\)"):
            work(out, False, *given)
        assert not list(out.rglob(".*")), "nothing half written stays"
        disk.room = 10**9
        work(out, room > 0, *given)
        again = contents(out)
        assert again.keys() == whole.keys()
        assert [name for name in whole if again[name] != whole[name]] == []
