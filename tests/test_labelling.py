"""Labelling a folder: what is written and shown, confidences, and all that can be wrong with folders."""

from __future__ import annotations

import csv
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import flown
from flown.base import trust
from flown.base.errors import FlownError
from flown.heads import calibrate, labelling
from flown.heads.classifiers import apply_heads, ridge_heads
from flown.heads.features import load_backbone
from flown.heads.labelling import Labelled, label
from flown.heads.validate import validate
from flown.report.fewshot import write_labelled
from flown.tasks import ManyClass, load_many, read_image, read_pictures
from tests.test_cli import call

COLOURS = {"blå hav": (30, 60, 200), "fire engine": (210, 40, 30), "草": (40, 170, 50)}
OURS = trust.allow("tests.test_labelling:colours")


class Colours(nn.Module):
    """Mean colours of a picture's quarters: a backbone that is one's own."""

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, 2).expand(-1, 3, -1, -1).flatten(1)


def colours() -> nn.Module:
    return Colours()


def picture(
    colour: tuple[int, int, int], random: np.random.Generator, size: tuple[int, int] = (20, 20)
) -> Image.Image:
    noise = random.normal(0, 25, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def fill(folder: Path, each: int, seed: int, flat: bool = False) -> Path:
    random = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        target = folder if flat else folder / name
        target.mkdir(parents=True, exist_ok=True)
        for i in range(each):
            picture(colour, random).save(target / f"{name} {i}.png")
    return folder


@pytest.fixture
def known(tmp_path: Path) -> Path:
    return fill(tmp_path / "my photos", 3, seed=0)


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return fill(tmp_path / "ny bilder", 4, seed=1, flat=True)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- what comes out


@pytest.mark.parametrize("head", labelling.LINEAR)
def test_every_head_labels_and_its_file_says_the_same(
    head: str, known: Path, new: Path, tmp_path: Path
) -> None:
    found = label(known, new, head=head, backbone=None if head == "flow" else OURS)
    assert found.classes == tuple(sorted(COLOURS)) and found.warnings == ()
    assert [path.name for path in found.save(tmp_path / "out")] == [
        "predictions.csv",
        "head.safetensors",
        "labels.json",
    ]
    rows = read(tmp_path / "out" / "predictions.csv")
    assert len(rows) == 12 and "true class" not in rows[0]
    for row in rows:
        assert Path(row["file"]).stem.rsplit(" ", 1)[0] == row["class"]
        shares = [float(row[f"p({name})"]) for name in found.classes]
        assert sum(shares) == pytest.approx(1, abs=1e-3) and max(shares) == float(row["confidence"])

    batch = flown.WeightBatch.load(tmp_path / "out" / "head.safetensors")
    assert (
        batch.task is not None
        and batch.task.classes == found.classes
        and batch.provenance["backbone"] == found.backbone
    )
    pictures = torch.stack([read_image(Path(row["file"])) for row in rows])
    p = batch.module(0)(load_backbone(found.backbone)(pictures)).softmax(dim=1)
    torch.testing.assert_close(p, found.probabilities, atol=1e-4, rtol=1e-4)


def test_written_networks_label_and_their_file_says_the_same(
    known: Path, new: Path, tmp_path: Path
) -> None:
    found = label(known, new, head="written")
    left, *_ = found.figures()
    assert left[:3] == ("left out in turn", 9, 100.0)
    found.save(tmp_path / "out")
    rows = read(tmp_path / "out" / "predictions.csv")
    assert all(Path(row["file"]).stem.rsplit(" ", 1)[0] == row["class"] for row in rows)
    batch = flown.WeightBatch.load(tmp_path / "out" / "head.safetensors")
    assert batch.task is not None and batch.task.classes == found.classes
    images = torch.stack([read_image(Path(row["file"])) for row in rows])
    images = F.interpolate(images.float(), (32, 32), mode="bilinear", antialias=True)
    p = batch.logits(batch.preprocess(images.round().to(torch.uint8))).softmax(dim=2).mean(dim=0)
    torch.testing.assert_close(p, found.probabilities, atol=1e-2, rtol=0)


def test_drawings_get_written_networks_but_with_a_backbone_of_ones_own(tmp_path: Path) -> None:
    glyphs = load_many("glyphs")
    for part, first in (("drawings", 0), ("others", 5)):
        for character in range(0, 40, 10):
            rows = (glyphs.labels == character).nonzero().flatten()[first : first + 5]
            (folder := tmp_path / part / str(character)).mkdir(parents=True)
            for row in rows.tolist():
                Image.fromarray(glyphs.images[row, 0].numpy()).save(folder / f"{row}.png")
    found = label(tmp_path / "drawings", tmp_path / "others")
    assert found.method == "written"
    assert (
        dict((name, right) for name, _, right, _ in found.figures())["to label, class known"] > 85
    )
    assert label(tmp_path / "drawings", backbone=OURS).method == "centroid"


@pytest.mark.parametrize("head", ["centroid", "caml", "written"])
def test_pictures_of_no_class_are_unknown(
    head: str, known: Path, new: Path, tmp_path: Path
) -> None:
    random = np.random.default_rng(7)
    for i in range(4):  # stripes of black and white, like nothing that was shown
        strange = np.zeros((20, 20, 3), np.uint8)
        strange[:, (i % 2) :: 2] = 255
        Image.fromarray(strange ^ random.integers(0, 9, strange.shape, np.uint8)).save(
            new / f"stripes {i}.png"
        )
    found = label(known, new, head=head, backbone=OURS if head == "centroid" else None, unknown=0.2)
    assert found.novelty is not None
    strange = [i for i, file in enumerate(found.queries.files) if "stripes" in file.name]
    assert all(found.is_unknown(i) for i in strange)
    assert sum(map(found.is_unknown, range(len(found.queries)))) <= 4 + 5
    found.save(tmp_path / "out")
    rows = read(tmp_path / "out" / "predictions.csv")
    for i, row in enumerate(rows):
        assert (row["class"] == "unknown") == (float(row["novelty"]) > 1) == found.is_unknown(i)
    write_labelled(page := tmp_path / "page.html", found)
    assert "<h3>unknown (" in page.read_text("utf-8")


def test_what_unknown_needs(known: Path, new: Path, tmp_path: Path) -> None:
    with pytest.raises(FlownError, match="between 0 and 1"):
        label(known, new, backbone=OURS, unknown=0.0)
    with pytest.raises(FlownError, match="two images of a class"):
        label(known, new, backbone=OURS, unknown=0.1, shots=1)
    shutil.copytree(known / "草", known / "unknown")
    with pytest.raises(FlownError, match="a class is called 'unknown'"):
        label(known, new, backbone=OURS, unknown=0.1)


def test_classes_that_are_known_are_measured(known: Path, tmp_path: Path) -> None:
    asked = fill(tmp_path / "asked", 2, seed=2)
    picture((30, 60, 200), np.random.default_rng(5)).save(asked / "no idea.png")
    found = label(known, asked, backbone=OURS)
    left, queries = found.figures()
    assert left[:3] == ("left out in turn", 9, 100.0)
    assert queries[:3] == ("to label, class known", 6, 100.0) and 0 <= queries[3] < 50
    found.save(tmp_path)
    rows = read(tmp_path / "predictions.csv")
    assert {row["true class"] for row in rows} == {"", *COLOURS}
    assert all(row["class"] == row["true class"] for row in rows if row["true class"])


def test_the_same_seed_the_same_bytes(known: Path, new: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        label(known, new, head="probe", backbone=OURS, shots=2, seed=3).save(tmp_path / name)
    texts = [(tmp_path / name / "predictions.csv").read_bytes() for name in ("a", "b")]
    heads = [flown.WeightBatch.load(tmp_path / name / "head.safetensors") for name in ("a", "b")]
    assert texts[0] == texts[1] and torch.equal(heads[0].vectors, heads[1].vectors)


def test_pictures_of_other_sizes_do_not_meet(known: Path, new: Path) -> None:
    """What is said of a picture does not depend on the others; their order is that of the files."""
    random = np.random.default_rng(9)
    for i, size in enumerate([(30, 20), (20, 30), (30, 20)]):
        picture(COLOURS["草"], random, size).save(new / f"a {i}.png")
    whole = label(known, new, backbone=OURS)
    assert whole.queries is not None and whole.probabilities is not None
    assert list(whole.queries.files) == sorted(new.iterdir())
    z = F.normalize(Colours()(whole.queries.image(1)[None]) - whole.head.frozen["centre"])  # type: ignore[union-attr]
    logits = apply_heads(whole.head.vectors, z[None])[0, 0]  # type: ignore[union-attr]
    torch.testing.assert_close(logits.softmax(0), whole.probabilities[1], atol=1e-5, rtol=1e-4)


def test_the_page_shows_every_image_and_nothing_is_fetched(
    known: Path, new: Path, tmp_path: Path
) -> None:
    (new / "<script>.png").write_bytes((known / "草" / "草 0.png").read_bytes())
    found = label(known, new, backbone=OURS)
    write_labelled(tmp_path / "index.html", found)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 9 + 13
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http" not in page and "草 (" in page and "the same image as" in page
    prose = re.sub(r"<[^>]*>", "", page.partition("</style>")[2])
    assert not re.search(r"[a-z]\.[A-Z]", prose), "sentences stand apart"


def test_generated_heads_do_not_know_the_order_of_classes(
    known: Path, new: Path, tmp_path: Path
) -> None:
    """Folders renamed, so that classes come in another order: the same pictures, the same confidences."""
    names = dict(zip(sorted(COLOURS), ("c", "a", "b"), strict=True))
    for old, name in names.items():
        shutil.copytree(known / old, tmp_path / "renamed" / name)
    plain, turned = (label(folder, new, head="flow") for folder in (known, tmp_path / "renamed"))
    order = [turned.classes.index(names[name]) for name in plain.classes]
    assert (
        order == [2, 0, 1] and plain.probabilities is not None and turned.probabilities is not None
    )
    torch.testing.assert_close(
        turned.probabilities[:, order], plain.probabilities, atol=1e-4, rtol=1e-3
    )
    assert turned.temperature == plain.temperature


# ---- the command


def test_the_command_with_what_ships(
    known: Path,
    new: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    (new / "torn.png").write_bytes(b"\x89PNG torn")
    arguments = ("fewshot", known, "--label", new, "--out", out)
    assert call(monkeypatch, *arguments) == 0
    text = capsys.readouterr().out
    assert "9 images left out in turn: accuracy 100.0 %" in text and "torn.png" in text
    rows = read(out / "predictions.csv")
    assert len(rows) == 12 and all(row["class"] in row["file"] for row in rows)
    assert call(monkeypatch, *arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert call(monkeypatch, *arguments, "--overwrite", "--head", "flow") == 0
    assert all(row["class"] in row["file"] for row in read(out / "predictions.csv"))
    assert flown.WeightBatch.load(out / "head.safetensors").provenance["method"] == "flow"
    assert call(monkeypatch, *arguments, "--overwrite", "--head", "caml") == 0
    assert len(read(out / "predictions.csv")) == 12
    assert not (out / "head.safetensors").exists(), "another head's file is not left behind"
    assert call(monkeypatch, "fewshot", known, "--out", tmp_path / "head") == 0
    written = {"head.safetensors", "labels.json", "index.html"}
    assert {p.name for p in (tmp_path / "head").iterdir()} == written


# ---- what is refused, what is warned of


def refused(message: str, *arguments: object, **options: object) -> None:
    with pytest.raises(FlownError, match=message) as caught:
        label(*arguments, **{"backbone": OURS, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_support_folders_that_will_not_do(known: Path, new: Path, tmp_path: Path) -> None:
    refused("nowhere: no such folder", tmp_path / "nowhere", new)
    (known / "草" / "草 0.png").unlink()
    refused(r"class '草' has 2 images, 3 are needed", known, new, shots=3)
    assert len(label(known, new, backbone=OURS, shots=2).support) == 6
    torn = known / "草" / "torn.jpg"
    torn.write_bytes(b"\xff\xd8\xff torn")
    refused(r"torn\.jpg: not a readable image", known, new)
    torn.unlink()
    (known / "empty class").mkdir()
    refused("class 'empty class' has no image", known, new)
    (tmp_path / "one" / "cats").mkdir(parents=True)
    refused("two or more classes, found only 'cats'", tmp_path / "one", new)
    refused("two or more classes, found none", new, known)


def test_query_folders_that_will_not_do(known: Path, tmp_path: Path) -> None:
    refused("nowhere: no such folder", known, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("empty: no image", known, tmp_path / "empty")
    (tmp_path / "empty" / "x.png").write_bytes(b"torn")
    refused("none of 1 images can be read", known, tmp_path / "empty")
    for overlapping in (known, known / "草", tmp_path, known / ".." / "my photos"):
        refused("keep the images to label apart", known, overlapping)


def test_heads_and_backbones_that_will_not_do(known: Path, new: Path) -> None:
    refused("unknown head 'rigde'. Did you mean 'ridge'", known, new, head="rigde")
    refused("unknown backbone 'resnet12-smal'", known, new, backbone="resnet12-smal")
    refused("CAML was trained on the features of 'context'", known, new, head="caml")
    refused(
        "--head flow: the generator was trained on the features of 'resnet12-small', not of "
        "'context'; leave --backbone out",
        known,
        new,
        head="flow",
        backbone="context",
    )


def test_warnings_name_the_files(known: Path, new: Path) -> None:
    """Torn queries, duplicates of either kind, folders that no class is named after."""
    same = (known / "草" / "草 1.png").read_bytes()
    (known / "blå hav" / "twin.png").write_bytes(same)
    (new / "twin.png").write_bytes(same)
    (new / "torn.png").write_bytes(b"torn")
    (new / "holidays").mkdir()
    (new / "holidays" / "x.png").write_bytes((known / "草" / "草 0.png").read_bytes())
    found = label(known, new, backbone=OURS)
    expected = (
        "holidays: no class of that name",
        "torn.png: not a readable image",
        "草 1.png: the same image as",
        "twin.png: the same image as",
        "holidays/x.png: the same image as",
    )
    assert len(found.warnings) == len(expected)
    for part in expected:
        assert any(part in line for line in found.warnings), (part, found.warnings)
    assert found.queries is not None and len(found.queries) == 14


def test_a_duplicate_in_another_file_format_is_one(known: Path, new: Path) -> None:
    Image.open(known / "草" / "草 2.png").convert("RGBA").save(new / "copy.webp", lossless=True)
    assert any(
        "copy.webp: the same image" in line for line in label(known, new, backbone=OURS).warnings
    )


def test_grey_transparent_palette_and_turned_pictures(known: Path, new: Path) -> None:
    blue = Image.open(known / "blå hav" / "blå hav 0.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    blue.resize((40, 20)).save(new / "turned.png", exif=exif)
    blue.convert("L").save(new / "grey.png")
    blue.convert("RGBA").save(new / "clear.png")
    blue.quantize(16).save(new / "palette.gif")
    found = label(known, new, backbone=OURS)
    assert found.queries is not None and found.probabilities is not None
    text = {
        file.name: found.classes[i]
        for file, i in zip(found.queries.files, found.probabilities.argmax(dim=1), strict=True)
    }
    assert {text[n] for n in ("turned.png", "clear.png", "palette.gif")} == {"blå hav"}
    shapes = {
        f.name: tuple(found.queries.image(i).shape) for i, f in enumerate(found.queries.files)
    }
    assert shapes["turned.png"] == (3, 40, 20) and shapes["grey.png"] == (1, 20, 20)


# ---- confidences


def ridge(support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
    return apply_heads(ridge_heads(support, labels, ways), query)


@given(counts=st.lists(st.integers(2, 6), min_size=2, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_every_image_is_left_out_once_and_not_seen(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    x = torch.arange(float(len(labels)))[:, None]  # a feature that is the row's own number

    def fit(support: Tensor, seen: Tensor, query: Tensor, ways: int) -> Tensor:
        assert not (support[:, :, None] == query[:, None]).any(), "an image was seen"
        assert torch.equal(seen, labels[support[..., 0].long()])
        assert support.shape[1] == len(labels) - ways and query.shape[1] == ways
        return query.expand(-1, -1, ways)

    logits, rows = calibrate.leave_one_out(fit, x, labels, len(counts))
    assert torch.equal(rows, torch.arange(len(labels)))
    assert torch.equal(logits[:, 0], x[:, 0]), "an image has another's logits"


def test_leaving_out_is_not_biased_against_a_class() -> None:
    """Without any signal, heads that have not seen an image are right at chance, not below it."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(200, 400, generator=generator), torch.arange(4).repeat(50)
    logits, rows = calibrate.leave_one_out(ridge, x, labels, 4)
    assert abs(float((logits.argmax(dim=1) == labels[rows]).float().mean()) - 0.25) < 0.09


@given(tau=st.floats(0.1, 10), seed=st.integers(0, 50))
@settings(max_examples=6, deadline=None)
def test_the_temperature_of_labels_drawn_with_one_is_found(tau: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * tau * torch.randn(4_000, 4, generator=generator)
    labels = torch.multinomial((logits / tau).softmax(dim=1), 1, generator=generator)[:, 0]
    found = calibrate.temperature(logits, labels)
    assert abs(math.log(found / tau)) < 0.12
    assert calibrate.calibration_error((logits / found).softmax(dim=1), labels) < 3
    assert calibrate.temperature(logits[:0], labels[:0], prior=tau) == pytest.approx(tau, rel=0.03)


def test_a_few_right_answers_do_not_make_certain() -> None:
    logits = 10 * torch.eye(3)
    assert calibrate.temperature(logits, torch.arange(3)) == pytest.approx(1e-3, rel=0.1)
    assert calibrate.temperature(logits, torch.arange(3), prior=4.0) > 2


def test_every_kind_of_head_is_measured_on_validation_classes_alone() -> None:
    random = np.random.default_rng(0)
    pixels = [np.array(picture(tuple(random.integers(0, 256, 3)), random)) for _ in range(6)]
    images = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pixels for _ in range(7)])
    images[14:] = 0  # only validation classes can be told apart
    labels = torch.arange(6).repeat_interleave(7)
    split = {"train": torch.arange(2, 4), "val": torch.arange(2), "test": torch.arange(4, 6)}
    rows = validate(ManyClass("x", tuple("abcdef"), images, labels, split), 4, 2, 2)
    assert [(row.head, row.shots) for row in rows] == [
        (head, shots) for shots in (1, 5) for head in labelling.HEADS
    ]
    assert all(row.accuracy == 100 for row in rows if row.head != "caml")
    with pytest.raises(FlownError, match="class 1 is in both"):
        validate(
            ManyClass("x", tuple("abcdef"), images, labels, split | {"test": torch.arange(1, 2)})
        )


def test_calibration_error_by_hand() -> None:
    p = torch.tensor([[0.92, 0.08], [0.94, 0.06], [0.4, 0.6], [0.35, 0.65]])
    labels = torch.tensor([0, 1, 1, 1])
    # bin 0.9-1: confidence 0.93, half right, half of all; bin 0.6-0.7: 0.625, all right
    assert calibrate.calibration_error(p, labels) == pytest.approx(100 * (0.43 + 0.375) / 2)
    sure = torch.eye(2)
    assert calibrate.calibration_error(sure, torch.tensor([0, 1])) == 0
    assert calibrate.calibration_error(sure, torch.tensor([1, 0])) == 100


def test_one_image_a_class_takes_the_temperature_that_ships(known: Path, new: Path) -> None:
    found: Labelled = label(known, new, backbone=OURS, shots=1)
    assert found.left_out is None and len(found.rows) == 0 and found.figures() == []
    assert found.temperature == labelling.LINEAR[labelling.PICTURES].taus[0]
    assert read_pictures(known, 1)[0].labels.tolist() == [0, 1, 2]
