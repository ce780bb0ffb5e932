"""The trajectory study in small: its rows, its resumption, its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from flown.base.files import read_json
from flown.base.provenance import Row
from flown.experiments.trajectory import PATHS, TrajectoryConfig, config, run
from flown.measure.finetune import FinetuneConfig
from flown.report.trajectory import GAP, table
from flown.training import TrainConfig


def tiny() -> TrajectoryConfig:
    short = TrainConfig(steps=2, batch_size=4)
    whole = config("smoke")
    fit = whole.fit.model_copy(
        update={"encoder_training": short, "path_training": short, "flow_training": short}
    )
    return whole.model_copy(
        update={
            "fit": fit,
            "samples": 3,
            "steps": 4,
            "further": (0, 1),
            "recipe": whole.recipe.model_copy(update={"max_train_images": 64}),
            "finetune": FinetuneConfig(epochs=1, test_at=(0,), max_train_images=64),
        }
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    out = tmp_path_factory.mktemp("trajectory")
    return out, run(tiny(), out, "smoke")


def test_every_flow_is_measured_at_every_epoch(study: tuple[Path, list[Row]]) -> None:
    _, rows = study
    found = {(r["method"], r["until"], r["epoch"]): r for r in rows if r["metric"] == "accuracy"}
    methods = {"zoo", "zoo-held-out", "flown", *PATHS[1:]}
    assert set(found) == {(m, e, f) for m in methods for e in (1.0, 2.0) for f in (0, 1)}
    assert all(r["n"] == 3 for (m, _, _), r in found.items() if not m.startswith("zoo"))
    assert all((r["std"] is None) == (r["n"] == 1) for r in found.values())
    held = next(line for line in table(rows, 0)[1] if "held" in line[0])
    assert "±" not in held[1], "one network has no deviation"
    gaps = {r["method"]: r["value"] for r in rows if r["metric"] == GAP}
    by_hand = [
        abs(found["spline", e, 0]["value"] - found["zoo", e, 0]["value"]) for e in (1.0, 2.0)
    ]
    assert gaps["spline"] == pytest.approx(sum(by_hand) / 2, abs=1e-4)
    assert set(gaps) == methods - {"zoo"}


def test_paths_through_the_epochs_share_an_encoder(study: tuple[Path, list[Row]]) -> None:
    out, _ = study
    files = [(out / "runs" / path / "model" / "encoder.safetensors").read_bytes() for path in PATHS]
    assert files[1] == files[2] == files[3] != files[0]


def test_it_goes_on_where_it_was(study: tuple[Path, list[Row]]) -> None:
    out, rows = study
    (out / "runs" / "metric" / "model" / "config.json").unlink()
    (out / "further" / "spline-1.json").unlink()
    assert run(tiny(), out, "smoke") == rows
    assert read_json(out / "results.json")["rows"] == rows


def test_the_page_shows_the_tables(study: tuple[Path, list[Row]]) -> None:
    out, rows = study
    page = (out / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 1
    for further in (0, 1):
        for line in table(rows, further)[1]:
            assert all(f"<td>{cell}</td>" in page for cell in line)
