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
    prepare_file,
    prepare_output,
    replacing,
    save_tensors,
    write_json,
)
from flown.base.run import Run
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


def test_output_is_not_overwritten_unasked(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("x")
    with pytest.raises(FlownError, match="--overwrite"):
        prepare_file(file, overwrite=False)
    assert prepare_file(file, overwrite=True) == prepare_file(file, False, resume=True) == file
    with pytest.raises(FlownError, match="f: a file; name a folder"):
        prepare_output(file, overwrite=True)
    with pytest.raises(FlownError, match="a folder; name a file"):
        prepare_file(tmp_path, overwrite=True)
    assert file.read_text() == "x"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"architectures": ["BertModel"], "model_type": "bert"}'),
        ("config.json", '{"format": "pt"}'),
        ("config.json", '{"format": "flown-finetune-1"}'),
        ("results.json", '{"format": "flown-results-1"}'),
        ("run.json", '["flown-run-1"]'),
        ("progress.json", "not JSON"),
        ("cat.png", "x"),
    ],
)
def test_a_folder_that_is_not_ours_stays(
    tmp_path: Path, name: str, content: str, resume: bool
) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / name).write_text(content)
    (folder / "thesis.txt").write_text("three years")
    with pytest.raises(FlownError, match="did not write"):
        prepare_output(folder, overwrite=True, resume=resume)
    assert (folder / name).read_text() == content
    assert (folder / "thesis.txt").read_text() == "three years"


def begin(folder: Path) -> None:
    """Marks a folder as this library's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "progress.json", {"format": "flown-run-1"})


def marked(folder: Path) -> bool:
    return (folder / "progress.json").exists()


def test_a_folder_of_ours_is_replaced_or_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run(out, {"seed": 3}, resume=False, overwrite=False).write()
    with pytest.raises(FlownError, match="pass --overwrite"):
        prepare_output(out, overwrite=False)
    assert prepare_output(out, overwrite=True, resume=True) == out and out.exists()
    assert prepare_output(out, overwrite=True) == out and not out.exists()
    out.mkdir()
    (out / ".run.json.x1.tmp").write_text("{")  # killed while it wrote its first file
    assert prepare_output(out, overwrite=False) == out


def test_no_place_of_the_users_is_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = tmp_path / "home", tmp_path / "work" / "here"
    for folder in (home, work, tmp_path, work.parent):
        begin(folder)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    for place, message in (
        (".", "is the working folder"),
        ("..", "holds the working folder"),
        (home, "is your home folder"),
        (tmp_path, "holds"),
        ("/", "holds the working folder"),
    ):
        with pytest.raises(FlownError, match=message):
            prepare_output(place, overwrite=True)
    (tmp_path / "real").mkdir()
    begin(tmp_path / "real")
    (work / "link").symlink_to(tmp_path / "real")
    with pytest.raises(FlownError, match="link: a link"):
        prepare_output("link", overwrite=True)
    assert marked(home) and marked(work) and marked(tmp_path / "real")


def test_what_is_read_is_not_removed(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    (tmp_path / "run" / "zoo").mkdir()
    for source in (tmp_path / "run", tmp_path / "run" / "zoo"):
        with pytest.raises(FlownError, match="which is read"):
            prepare_output(tmp_path / "run", overwrite=True, sources=[source])
    assert (tmp_path / "run" / "zoo").exists()


def test_config_names_the_nearest_key(tmp_path: Path) -> None:
    with pytest.raises(FlownError, match=r"unknown key 'encodr'. Did you mean 'encoder'"):
        FlownConfig.parse({"encodr": {}})
    with pytest.raises(FlownError, match=r"Did you mean 'steps'"):
        FlownConfig.parse({"flow_training": {"step": 3}})
    with pytest.raises(FlownError, match=r"Did you mean 'multipliers'"):
        FlownConfig.parse({"encoder": {"multiplier": [1]}})
    with pytest.raises(FlownError, match=r"flow_training.steps"):
        FlownConfig().override(["flow_training.steps=many"])
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
