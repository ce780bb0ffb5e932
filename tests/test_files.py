"""Files appear whole or not at all; configs refuse what they do not know."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from flown.base.errors import FlownError
from flown.base.files import (
    file_name,
    load_tensors,
    replacing,
    save_tensors,
    write_json,
)
from flown.generator.config import FlownConfig


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError), replacing(path) as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert "old" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FlownError, match=r"b.safetensors: cannot be written \(No space left"):
        save_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(3)})
    assert not list(tmp_path.iterdir())


def test_tensor_round_trip(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 4), "y": torch.arange(5)}
    save_tensors(tmp_path / "t.safetensors", tensors, {"note": "n"})
    again, about = load_tensors(tmp_path / "t.safetensors")
    assert about == {"note": "n"}
    assert all(torch.equal(again[k], v) for k, v in tensors.items())


def test_config_names_the_nearest_key(tmp_path: Path) -> None:
    with pytest.raises(FlownError, match=r"unknown key 'encodr'. Did you mean 'encoder'"):
        FlownConfig.parse({"encodr": {}})
    with pytest.raises(FlownError, match=r"Did you mean 'steps'"):
        FlownConfig.parse({"flow_training": {"step": 3}})
    with pytest.raises(FlownError, match=r"Did you mean 'multipliers'"):
        FlownConfig.parse({"encoder": {"multiplier": [1]}})
    with pytest.raises(FlownError, match=r"flow_training.steps"):
        FlownConfig().override(["flow_training.steps=many"])
    for number in ("nan", "inf"):
        with pytest.raises(FlownError, match=r"flow.sigma: Input should be a finite number"):
            FlownConfig().override([f"flow.sigma={number}"])
    (tmp_path / "c.yaml").write_text("seed: 3\nflow: {source: kaiming-normal}\n")
    loaded = FlownConfig.load(tmp_path / "c.yaml").override(["flow.sigma=0.1"])
    assert (loaded.seed, loaded.flow.source, loaded.flow.sigma) == (3, "kaiming-normal", 0.1)


def test_a_file_without_tensors_is_read_back(tmp_path: Path) -> None:
    save_tensors(tmp_path / "none.safetensors", {})
    assert load_tensors(tmp_path / "none.safetensors") == ({}, {})


def test_names_from_outside_do_not_meet_in_one_file() -> None:
    names = [
        *("photos-a", "photos/a", "photos a", "Photos-a", "/photos/a", "photos\\a", "photos:a"),
        *("", ".", "..", "-", "é", "e\u0301", "草", "森", "\udcff", "a" * 300, "a" * 301),
    ]
    made = [file_name(name) for name in names]
    assert len({name.casefold() for name in made}) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_.-]{1,90}", name) for name in made)
    assert file_name("photos-a") == "photos-a" and file_name("cnn_1.5") == "cnn_1.5"
