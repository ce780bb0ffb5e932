"""Work that the machine's memory cannot hold is refused before it begins, with the sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

import flown
from flown.base import memory
from flown.base.errors import FlownError
from flown.measure.finetune import finetune
from tests import examples
from tests.test_adapt import tiny

TOO_MANY = r"memory, this machine has 0.0 GB; ask for fewer"


def test_sizes_are_compared_with_the_machine() -> None:
    memory.check_fits(1000, 1000, "networks")
    with pytest.raises(FlownError, match=r"^1,000,000,000 networks need at least 3,725.3 GB of"):
        memory.check_fits(10**9, 1000, "networks")


def test_what_takes_many_networks_asks_first(
    three_tasks: flown.Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, networks = tiny(), examples.networks(2)
    images = examples.images("digits").train
    some = flown.Flown.from_pretrained("flown-any")
    monkeypatch.setattr(memory, "_memory", lambda: 10_000)
    with pytest.raises(FlownError, match="^50 networks need at least .*" + TOO_MANY):
        model.generate(n=50)
    with pytest.raises(FlownError, match="^50 networks need .*" + TOO_MANY):
        some.generate(images.images[:100], images.labels[:100], n=50)
    with pytest.raises(FlownError, match="^2 networks in training need .*" + TOO_MANY):
        finetune(networks, examples.images("digits"), out=tmp_path / "a.safetensors")
    with pytest.raises(FlownError, match="networks at once need .*" + TOO_MANY):
        three_tasks.batch("digits")
    assert not list(tmp_path.iterdir())
