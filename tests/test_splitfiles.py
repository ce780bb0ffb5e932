"""mini-ImageNet's official split files and a folder of images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from flown.base.errors import FlownError
from flown.tasks import available, load_many
from flown.tasks.splitfiles import load_split_files

PARTS = {"train": ("n01", "n02"), "val": ("n03",), "test": ("n04",)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    own = tmp_path / "mini_imagenet"
    (own / "images").mkdir(parents=True)
    for p, (part, names) in enumerate(PARTS.items()):
        lines = ["filename,label"]
        for k, name in enumerate(names):
            for i in range(3):
                Image.new("RGB", (100 + i, 90), (50 * p, 70 * k, 40)).save(
                    own / "images" / f"{name}{i}.png"
                )
                lines.append(f"{name}{i}.png,{name}")
        (own / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return own


def test_parts_and_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWN_DATA", str(folder.parent))
    many = load_many("mini_imagenet")
    assert many.images.shape == (12, 3, 84, 84) and many.images.dtype == torch.uint8
    assert many.classes == ("n01", "n02", "n03", "n04")
    assert {k: v.tolist() for k, v in many.class_split.items()} == {
        "train": [0, 1],
        "val": [2],
        "test": [3],
    }
    assert many.labels.bincount().tolist() == [3, 3, 3, 3]
    assert many.images[many.labels == 1][0, :, 40, 40].tolist() == [0, 70, 40]
    assert next(s for s in available() if s.name == "mini_imagenet").present
    assert load_split_files(folder, 32).images.shape == (12, 3, 32, 32)


def test_what_can_be_wrong_is_named(folder: Path) -> None:
    val = folder / "val.csv"
    good = val.read_text()
    for text, message in (
        ("file,class\n", "first line is not 'filename,label'"),
        ("filename,label\n", "names no image"),
        ("filename,label\nn030.png\n", "val.csv, line 2: expected a file name and a label"),
        (good.replace("n03\n", "n01\n"), "class 'n01' is in train.csv and val.csv"),
        (good.replace("n031.png", "gone.png"), "gone.png: no such image"),
    ):
        val.write_text(text)
        with pytest.raises(FlownError, match=message):
            load_split_files(folder)
    val.write_text(good)
    (folder / "images" / "n030.png").write_bytes(b"rubbish")
    with pytest.raises(FlownError, match=r"n030.png: not a readable image"):
        load_split_files(folder)
    val.unlink()
    with pytest.raises(FlownError, match=r"val.csv: cannot be read"):
        load_split_files(folder)


@pytest.mark.parametrize("form", ["mark", "blank", "index"])
def test_tables_as_other_programs_save_them(folder: Path, form: str) -> None:
    plain = load_split_files(folder, 8)
    for part in PARTS:
        table = folder / f"{part}.csv"
        lines = table.read_text().splitlines()
        if form == "index":
            lines = [f"{i if i else ''},{line}" for i, line in enumerate(lines)]
        text = "\n".join(lines) + ("\n\n\n" if form == "blank" else "\n")
        table.write_text(text, encoding="utf-8-sig" if form == "mark" else "utf-8")
    again = load_split_files(folder, 8)
    assert torch.equal(again.images, plain.images) and torch.equal(again.labels, plain.labels)
