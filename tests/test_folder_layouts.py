"""Folders of pictures as people have them: parts, nested folders, links, litter, forms of names, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flown import tasks as data
from flown.base.errors import FlownError, FlownWarning
from flown.heads import folder as queries
from flown.heads.labelling import label
from flown.tasks import load_folder, npz, read_pictures
from flown.weights.batch import WeightBatch
from tests.test_cli import call
from tests.test_data_folder import picture, save


def fill(folder: Path, names: tuple[str, ...] = ("cat", "dog"), count: int = 4) -> Path:
    for name in names:
        for i in range(count):
            save(folder / name / f"{i}.png", picture(8, 8, 3))
    return folder


def test_published_parts_are_kept(tmp_path: Path) -> None:
    for part, count in (("train", 6), ("Valid", 3), ("test", 2)):
        fill(tmp_path / part, count=count)
    images = data.load(tmp_path)
    assert [len(part) for part in (images.train, images.val, images.test)] == [12, 6, 4]
    held = {p.tobytes() for p in images.test.images.numpy()}
    told = {p.tobytes() for p in load_folder(tmp_path / "test").train.images.numpy()}
    assert held == told
    with pytest.raises(FlownError, match="Valid, test, train are parts of a data set, not classes"):
        read_pictures(tmp_path)
    save(tmp_path / "test" / "cow" / "0.png", picture(8, 8, 3))
    with pytest.raises(FlownError, match="class 'cow' is not in both train and test"):
        data.load(tmp_path)


def test_parts_without_classes_are_no_classes(tmp_path: Path) -> None:
    fill(tmp_path, ("train", "test"))
    for load in (data.load, read_pictures):
        with pytest.raises(FlownError, match="parts of a data set"):
            load(tmp_path)


def test_classes_that_are_called_so_beside_others_are_classes(tmp_path: Path) -> None:
    assert load_folder(fill(tmp_path, ("exam", "test"))).classes == ("exam", "test")


def test_nested_and_linked_pictures_belong_to_their_class(tmp_path: Path) -> None:
    fill(tmp_path / "pets")
    save(tmp_path / "pets" / "cat" / "2024" / "may" / "x.png", picture(8, 8, 3))
    fill(tmp_path / "elsewhere", ("cow",))
    (tmp_path / "pets" / "cow").symlink_to(tmp_path / "elsewhere" / "cow")
    found = load_folder(tmp_path / "pets")
    assert found.classes == ("cat", "cow", "dog")
    assert torch.bincount(found.train.labels).tolist() == [5, 4, 4]


def test_litter_and_what_was_written_here_are_no_classes(tmp_path: Path) -> None:
    fill(tmp_path)
    for name in ("__MACOSX", "@eaDir", "lost+found", ".git"):
        (tmp_path / name).mkdir()
    save(tmp_path / "cat" / "@eaDir" / "thumb.png", picture(4, 4))
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"?")
    label(tmp_path, None, head="centroid").save(tmp_path / "page")
    found, classes = read_pictures(tmp_path)
    assert classes == ("cat", "dog") and len(found) == 8
    assert label(tmp_path, None, head="centroid").classes == classes


def test_pictures_are_known_by_what_they_are(tmp_path: Path) -> None:
    fill(tmp_path)
    Image.fromarray(picture(8, 8, 3)).save(tmp_path / "cat" / "x.JFIF", "jpeg")
    Image.fromarray(picture(8, 8, 3)).save(tmp_path / "cat" / "plain", "png")
    Image.fromarray(picture(8, 8, 3)).save(tmp_path / "cat" / "x.tga")
    (tmp_path / "cat" / "LICENSE").write_text("all yours")
    (tmp_path / "cat" / "x.heic").write_bytes(b"?")
    save(tmp_path / "loose.png", picture(8, 8, 3))
    with pytest.warns() as told:
        assert len(load_folder(tmp_path).train) == 11
    assert {one.category for one in told} == {FlownWarning}
    others, loose = sorted(str(one.message).removeprefix(str(tmp_path)) for one in told)
    assert "2 files are not read" in others and "LICENSE" in others and "x.heic" in others
    assert loose == ": loose.png lies beside the folders of classes and is of none"


def test_names_are_compared_as_they_are_read(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    fill(tmp_path / "known", (apart, "tea"))
    fill(tmp_path / "new", (composed, "tea", "rum"), count=2)
    found = label(tmp_path / "known", tmp_path / "new", head="centroid")
    assert found.classes == (composed, "tea") and found.queries is not None
    assert sorted(found.queries.labels.tolist()) == [-1, -1, 0, 0, 1, 1]
    assert any("rum: no class of that name" in line for line in found.warnings)
    fill(tmp_path / "known", (composed,))
    with pytest.raises(FlownError, match="two forms of Unicode"):
        load_folder(tmp_path / "known")


def test_names_may_be_no_text_and_hold_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are no UTF-8, formulas, rich's markup, HTML: from folder to table, page and networks."""
    names = (os.fsdecode(b"caf\xe9"), "a$b$c[red]", "{y}_{z}^2 & <b>")
    for folder in ("known", os.fsdecode(b"new\xff")):
        fill(tmp_path / folder, names, count=6)
    new = tmp_path / os.fsdecode(b"new\xff")
    known, out = tmp_path / "known", tmp_path / "out"
    assert call(monkeypatch, "fewshot", known, "--label", new, "--out", out) == 0
    table = (out / "predictions.csv").read_text("utf-8")
    assert "p(caf\\xe9)" in table and "a$b$c[red]" in table and "new\\udcff" in table
    page = (out / "index.html").read_text("utf-8")
    assert "&lt;b&gt;" in page and "& <b>" not in page and "a$b$c[red]" in page
    images = data.load(str(new))
    assert images.classes == ("a$b$c[red]", "caf\\xe9", "{y}_{z}^2 & <b>")
    assert images.name.endswith("new\\xff")
    nets = tmp_path / "nets.safetensors"
    arguments = ["generate", "flown-any", "--support", new, "-n", 1, "--out", nets]
    assert call(monkeypatch, *arguments) == 0
    assert WeightBatch.load(nets).task.classes == images.classes  # type: ignore[union-attr]


def test_one_odd_picture_decides_for_none(tmp_path: Path) -> None:
    for i in range(12):
        save(tmp_path / ("cat", "dog")[i % 2] / f"{i}.png", picture(20 + i, 30 + i, 3))
    save(tmp_path / "cat" / "icon.png", picture(4, 4, 3))
    assert load_folder(tmp_path).train.images.shape[2:] == (25, 35)
    assert data.load(tmp_path, size=16).train.images.shape[2:] == (16, 16)


@pytest.mark.parametrize("form", ["bare", "named", "grey"])
def test_npz_files_as_they_are_published(tmp_path: Path, form: str) -> None:
    arrays = {}
    for part, count in (("train", 20), ("val", 6), ("test", 8)):
        arrays[f"{part}_images"] = picture(count, 8, 8, *([1] if form == "grey" else []))
        arrays[f"{part}_labels"] = np.arange(count, dtype=np.uint8).reshape(-1, 1) % 2
    if form == "named":
        arrays["class_names"] = np.array(["a", "b"])
    np.savez(tmp_path / "x.npz", **arrays)
    parts = npz.read_parts(tmp_path / "x.npz")
    assert parts.classes == (("a", "b") if form == "named" else ("0", "1"))
    assert parts.val is not None and parts.test is not None
    assert [len(part) for part in (parts.train, parts.val, parts.test)] == [20, 6, 8]
    assert parts.train.images.shape == (20, 1, 8, 8)


BLANK = """
import torch
from torch import nn
class Own(nn.Module):
    def forward(self, x):
        f = x.float().mean(dim=(2, 3)).repeat(1, 4)[:, :4]
        made = {"nan": f / f.sum(dim=1, keepdim=True), "map": f[:, :, None, None],
                "tokens": f[:, None], "pair": (f, f), "named": {"out": f}, "whole": f.int()}
        return made[KIND]
KIND = %r
make = Own
"""


@pytest.mark.parametrize("kind", ["nan", "map", "tokens", "pair", "named", "whole"])
def test_what_a_backbone_gives_is_checked(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"backbone_{kind}.py").write_text(BLANK % kind)
    fill(tmp_path / "known")
    fill(tmp_path / "new", ("rest",))
    save(tmp_path / "new" / "blank.png", np.zeros((8, 8), np.uint8))
    command = ("fewshot", tmp_path / "known", "--label", tmp_path / "new", "--out")
    named = ("--backbone", f"backbone_{kind}:make")
    code = call(monkeypatch, *command, tmp_path / "out", *named)
    printed = capsys.readouterr()
    if kind == "nan":
        assert code == 0 and "blank.png: the backbone gives NaN or Inf" in printed.out
        rows = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
        assert len(rows) == 5 and "nan" not in "".join(rows)
        save(tmp_path / "known" / "cat" / "blank.png", np.zeros((8, 8), np.uint8))
        assert call(monkeypatch, *command, tmp_path / "out2", *named) == 2
        assert "blank.png: the backbone gives NaN or Inf" in capsys.readouterr().err
    elif kind == "map":
        assert code == 0
    else:
        assert code == 2 and "backbone Own: gives" in printed.err


MEASURE = """
import resource, sys
from pathlib import Path
import flown.heads.labelling
from flown.report.fewshot import write_labelled
from flown.tasks import load_folder
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
{before}
start = peak()
{run}
print(peak() - start)
"""


def growth(run: str, before: str = "") -> int:
    """Megabytes that some Python takes."""
    script = MEASURE.format(run=run, before=before)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def copies(file: Path, folders: tuple[Path, ...], count: int) -> None:
    for folder in folders:
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i}{file.suffix}").hardlink_to(file)


def test_photographs_shrink_while_they_are_read(tmp_path: Path) -> None:
    photo = save(tmp_path / "photo.jpg", picture(3000, 4000, 3) // 8)  # 12 megapixels
    copies(photo, (tmp_path / "a" / "x", tmp_path / "a" / "y"), 50)
    assert growth(f"load_folder(Path({str(tmp_path / 'a')!r}))") < 350


def test_labelling_takes_memory_that_does_not_grow(tmp_path: Path) -> None:
    fill(tmp_path / "known")
    large = save(tmp_path / "large.png", np.kron(picture(8, 8, 3), np.ones((64, 64, 1), np.uint8)))
    copies(large, (tmp_path / "new",), 600)  # half a gigabyte of pixels
    known, new = (repr(str(tmp_path / name)) for name in ("known", "new"))
    page = repr(str(tmp_path / "page.html"))
    run = f"write_labelled({page}, flown.heads.labelling.label({{}}, {{}}, head='centroid'))"
    assert growth(run.format(known, new), before=run.format(known, None)) < 300


def test_a_page_says_what_it_is_of(tmp_path: Path) -> None:
    fill(tmp_path / "known")
    found = label(tmp_path / "known", None, head="centroid")
    found.save(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert record["classes"] == ["cat", "dog"] and record["images learnt from"] == 8
    assert queries.digest(found.support.images[0]) != queries.digest(found.support.images[1])
