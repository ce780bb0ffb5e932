"""Zoos of flown 0.1 come over with the same weights, and what is none of them is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import flown
from flown.base.errors import FlownError
from flown.zoo import Zoo
from flown.zoo.convert import convert


@pytest.fixture
def old(zoo: flown.Zoo, tmp_path: Path) -> Path:
    """The tiny zoo as 0.1 wrote it."""
    folder = tmp_path / "old"
    shutil.copytree(zoo.path, folder)
    about = json.loads((folder / "zoo.json").read_text())
    (layout,) = about["layouts"]
    architecture = layout.pop("architecture")
    kept = ("channels", "size", "activation", "mean", "std")
    task = {key: architecture[key] for key in kept}
    task |= {"name": "digits", "classes": list("0123456789")}
    about |= {"format": "flown-zoo-1", "layouts": [{**layout, "net": "cnn-small", "task": task}]}
    (folder / "zoo.json").write_text(json.dumps(about))
    (folder / "tasks.jsonl").unlink()
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    for line in lines:
        del line["layout"]
    (folder / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_an_old_zoo_comes_over(old: Path, zoo: flown.Zoo, tmp_path: Path) -> None:
    with pytest.raises(FlownError, match=r"written by flown 0\.1; convert it: flown zoo convert"):
        Zoo.open(old)
    made = convert(old, tmp_path / "new")
    assert made.verify() == [] and made.layouts == zoo.layouts
    assert list(made.tasks.items()) == list(zoo.tasks.items()) and made.rows == zoo.rows
    assert torch.equal(made.batch("digits").vectors, zoo.batch("digits").vectors)
    assert made.recipe("digits")["name"] == "tiny"


def test_what_is_no_old_zoo_is_refused(old: Path, zoo: flown.Zoo, tmp_path: Path) -> None:
    with pytest.raises(FlownError, match=r"no zoo of flown 0\.1; there is nothing to convert"):
        convert(zoo.path, tmp_path / "new")
    (old / "index.jsonl").write_text("{}\n")
    with pytest.raises(FlownError, match=r"not a whole zoo of flown 0\.1"):
        convert(old, tmp_path / "new")
    assert not (tmp_path / "new" / "zoo.json").exists()
