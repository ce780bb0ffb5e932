"""Table 5 from end to end on stripes and blobs, and the bench of heads in small."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.base.files import read_json
from flown.bench.heads import heads
from flown.context import CAMLConfig
from flown.experiments import table5
from flown.flow import VelocityConfig
from flown.heads.heads import HeadsConfig
from flown.heads.meta import HeadFlowConfig
from flown.report.table5 import accuracies, differences
from flown.training import TrainConfig
from tests.test_backbone import many
from tests.test_cli import call

SETS = ("mini_imagenet", "cifar10", "natural10", "omniglot")
PAPERS = "queries-top3-of-4, the paper's protocol"
GENERATED = {
    *("flown", "flown-mean", "flown-start", "flown+1", "flown+5", "flown+20"),
    *("flown-gaussian", "flown-gaussian-mean", "d2nwg", "d2nwg-mean", "d2nwg-v", "d2nwg-v-mean"),
}
ROWS = {
    "inductive": GENERATED
    | {"linear-probe", "linear-probe-zero", "vae-reconstruction", "nearest-cosine"}
    | {"nearest-euclidean", "ridge", "caml", "maml-first-order"},
    "transductive": GENERATED | {"soft-kmeans", "laplacian"},
}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set of many classes and two of ten, as files."""
    some = many()
    pixels = some.images.permute(0, 2, 3, 1).numpy()
    parts = np.array(["train"] * 5 + ["val"] * 5 + ["test"] * 5)
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(
        folder / "mini_imagenet.npz",
        images=pixels,
        labels=some.labels.numpy(),
        class_names=np.array(some.classes),
        class_split=parts,
    )
    np.savez(
        folder / "omniglot.npz",
        images=pixels[..., 0],
        labels=some.labels.numpy(),
        class_names=np.array(some.classes),
        class_split=parts,
    )
    ten = some.labels.numpy() < 10
    for name in ("cifar10", "natural10"):
        np.savez(
            folder / f"{name}.npz",
            train_images=pixels[ten],
            train_labels=some.labels.numpy()[ten],
            test_images=255 - pixels[ten],
            test_labels=some.labels.numpy()[ten],
            class_names=np.array(some.classes[:10]),
        )
    monkeypatch.setenv("FLOWN_DATA", str(folder))
    return folder


def tiny() -> Config:
    few = TrainConfig(steps=4, batch_size=20, warmup=2, ema=0.9)
    fit = HeadFlowConfig(velocity=VelocityConfig(channels=8, blocks=1), flow_training=few)
    return table5.config("smoke").model_copy(
        update={
            "heads": HeadsConfig(tasks=40),
            "fit": fit,
            "caml": CAMLConfig(label_dim=64, layers=1, mlp=32),
            "caml_training": few,
            "maml_training": few,
            "tasks": 4,
            "queries": 5,
            "samples": 4,
            "diffusion_samples": 3,
            "steps": 2,
            "diffusion_steps": 2,
        }
    )


def test_table5_has_every_row_and_goes_on(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "t5"
    rows = table5.table5(out, "smoke", settings=tiny())
    measured = [row for row in rows if row["interval"] is not None]
    for name, protocol in itertools.product(SETS, ROWS):
        own = [row for row in measured if (row["dataset"], row["protocol"]) == (name, protocol)]
        figures = [row for row in own if row["metric"] == "accuracy"]
        assert {row["method"] for row in figures} == ROWS[protocol]
        best = {row["selection"]: row["value"] for row in figures if row["method"] == "flown"}
        assert set(best) == {"all", "support-top3-of-4", PAPERS}
        assert max(best.values()) == best[PAPERS]
        value = {row["method"]: row["value"] for row in figures if row["selection"] == "all"}
        lead = {row["method"]: row["value"] for row in own if row["metric"] == "difference"}
        assert lead["flown - flown-start"] == pytest.approx(value["flown"] - value["flown-start"])
    order = next(row for row in rows if "permuted" in row["metric"])
    assert order["value"] < 1e-3
    assert read_json(out / "results.json")["rows"] == rows
    page = (out / "report.html").read_text()
    assert "nearest-cosine" in page and "soft-kmeans" in page and "differences" in page
    assert table5.table5(out, "smoke", settings=tiny(), resume=True) == rows
    with pytest.raises(FlownError, match="another scale"):
        table5.table5(out, "cpu", settings=tiny(), resume=True)
    head, body = accuracies(rows, "inductive")
    assert head == ["method", *SETS] and len(body) > len(ROWS["inductive"])
    assert all(
        cell[0] in "+-" for line in differences(rows, "transductive")[1] for cell in line[1:]
    )


def test_without_the_data_it_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t5"
    assert call(monkeypatch, "reproduce", "table5", "--scale", "smoke", "--out", out) == 2
    assert "mini_imagenet: set FLOWN_DATA" in capsys.readouterr().err


def test_the_bench_of_heads_compares_the_same(tmp_path: Path) -> None:
    rows = heads(1, tmp_path, tasks=1200, compared=6)
    seconds = {row["method"]: row for row in rows if row["metric"] == "seconds"}
    assert seconds["flown-zoo"]["n"] == 1200 and {"flown", "loop-fused-1-threads"} <= set(seconds)
    accuracy = {row["method"]: row["value"] for row in rows if row["metric"] == "accuracy"}
    assert accuracy["flown"] == pytest.approx(accuracy["loop"], abs=0.2) and accuracy["flown"] > 40
