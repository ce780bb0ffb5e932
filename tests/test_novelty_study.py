"""The novelty study in small: its figures' units, its resumption, its pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flown.base.files import read_json
from flown.base.provenance import Row
from flown.context.tokens import ContextConfig
from flown.experiments.novelty import DATA, IDEAS, NoveltyConfig, Variant, config, run
from flown.flow import VelocityConfig
from flown.generator.config import FlownConfig
from flown.report.novelty import HEAD, table
from flown.training import TrainConfig
from tests import test_docs
from tests.conftest import DIGITS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "novelty" / "cpu.json"


def tiny() -> NoveltyConfig:
    recipe = DIGITS.model_copy(update={"epochs": 2, "keep": (2,)})
    short = TrainConfig(steps=2, batch_size=4)
    variants = tuple(
        Variant(
            name=name,
            dataset="digits",
            aligned=IDEAS[name][0],
            fit=FlownConfig(
                encoder_training=short,
                flow_training=short,
                functional=IDEAS[name][1],
                context=ContextConfig(mode="none"),
                velocity=VelocityConfig(channels=8, blocks=1),
            ),
        )
        for name in ("weights", "aligned, ce + spread 1")
    )
    return NoveltyConfig(recipes=(recipe,), models=8, variants=variants, samples=3, steps=2)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    out = tmp_path_factory.mktemp("novelty")
    return out, run(tiny(), out, "smoke")


def test_held_out_networks_are_the_unit(study: tuple[Path, list[Row]]) -> None:
    _, rows = study
    found = {(r["variant"], r["method"], r["metric"]): r for r in rows}
    for variant in ("zoo", "zoo, aligned"):
        for metric in ("l2-ratio", "l2-ratio-aligned"):
            assert found[variant, "zoo-held-out", metric]["value"] == pytest.approx(1, abs=1e-6)
        assert found[variant, "noise-0.06", "l2-ratio"]["value"] < 0.2
        assert found[variant, "noise-0.06", "max-iou"]["value"] > 0.8
    for metric in ("accuracy", "max-iou", "diversity-iou"):  # alignment changes no function
        for method in ("zoo", "zoo-held-out"):
            one, other = (found[v, method, metric] for v in ("zoo", "zoo, aligned"))
            assert one["value"] == pytest.approx(other["value"], abs=0.2)
    drawn = {method for variant, method, _ in found if variant == "aligned, ce + spread 1"}
    assert drawn == {"reconstruction-train", "reconstruction-held-out", "flown", "latent-gaussian"}
    assert all(
        found["weights", method, "accuracy"]["n"] == 3 for method in ("flown", "latent-gaussian")
    )


def test_it_goes_on_where_it_was(study: tuple[Path, list[Row]]) -> None:
    out, rows = study
    kept, lost = (out / "measured" / f"digits-{name}.json" for name in ("zoo", "weights"))
    before, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    assert run(tiny(), out, "smoke") == rows
    assert lost.read_bytes() == before, "a variant is measured again from its model"
    assert kept.stat().st_mtime_ns == stamp, "what is there is not made again"
    assert read_json(out / "results.json")["rows"] == rows


def test_the_report_shows_every_variant(study: tuple[Path, list[Row]]) -> None:
    out, rows = study
    page = (out / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 2
    for line in table(rows, "digits"):
        assert f"<td>{line[0]}</td>" in page
    cells = table(rows, "digits")[0]
    zoo = next(r for r in rows if (r["method"], r["metric"]) == ("zoo", "accuracy"))
    assert cells[2] == f"{zoo['value']:.1f} ± {zoo['std']:.1f}"


def test_every_scale_names_its_variants() -> None:
    for scale in ("smoke", "cpu", "paper"):
        settings = config(scale)
        named = {(variant.dataset, variant.name) for variant in settings.variants}
        assert named == {(d, idea) for d, (_, ideas) in DATA.items() for idea in ideas}


def test_the_page_shows_the_committed_figures() -> None:
    rows = read_json(RESULTS)["rows"]
    page = (ROOT / "docs" / "novelty.md").read_text("utf-8")
    for dataset in DATA:
        assert test_docs.table(HEAD, table(rows, dataset)) in page
    prose = re.sub(r"^\|.*\n", "", page.partition("## Fashion-MNIST")[2], flags=re.MULTILINE)
    shown = {f"{row['value']:.{1 if row['value'] > 2 else 2}f}" for row in rows}
    assert [number for number in re.findall(r"\d+\.\d+", prose) if number not in shown] == []
