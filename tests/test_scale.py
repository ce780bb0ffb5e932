"""A zoo of a gigabyte trains an encoder in the memory of a small one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flown.bench.store import CHECKPOINTS, encoder_memory, noise_zoo
from flown.zoo import networks
from flown.zoo.networks import Networks


def test_mapped_and_held_populations_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = noise_zoo(tmp_path, 1500)
    places = list(range(0, 1500, 7))
    held = Networks(zoo, zoo.joint, places)
    monkeypatch.setattr(networks, "HELD", 0)
    mapped = Networks(zoo, zoo.joint, places)
    assert held.held is not None and mapped.held is None
    for some in (held, mapped):
        some.scale.fit(some.blocks())
    rows = torch.tensor([5, 0, 200, 5])
    assert torch.equal(held[rows], mapped[rows])
    assert torch.equal(held.raw(rows)[0], zoo.batch("digits").vectors[35])


@pytest.mark.slow
def test_an_encoders_memory_does_not_grow_with_the_zoo(tmp_path: Path) -> None:
    """Ten times the zoo, a gigabyte, and what grows is the index: a few hundred bytes a row."""
    small, large = (noise_zoo(tmp_path / str(n), n) for n in (CHECKPOINTS // 10, CHECKPOINTS))
    weights = sum(path.stat().st_size for path in large.path.glob("*.safetensors")) / 2**20
    assert weights > 900
    assert encoder_memory(large.path) < encoder_memory(small.path) + 0.25 * weights
