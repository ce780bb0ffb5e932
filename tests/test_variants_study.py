"""The study of variants in small: what is fitted, its rows, its resumption, its page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flown.base.files import load_tensors, read_json
from flown.base.provenance import Row
from flown.experiments.unseen import Unseen
from flown.experiments.variants import VariantsStudy, fits, run, study
from flown.report import variants as report
from flown.training import LoopConfig
from tests.test_ways import SMALL

BRIEF = LoopConfig(steps=1, warmup=1)
TINY = VariantsStudy(
    fit=SMALL.model_copy(
        update={
            "features": 16,
            "base": SMALL.base.model_copy(update={"training": BRIEF}),
            "training": BRIEF,
        }
    ),
    ways=("end-point", "matching", "point"),
    counts=(5,),
    sizes=((8, 1), (16, 1)),
    rows=(Unseen(set="digits", ways=5, shots=1, tasks=3),),
    samples=2,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    out = tmp_path_factory.mktemp("variants")
    return out, run(TINY, out, "smoke").rows


def test_every_variant_is_measured_beside_the_base_networks(done: tuple[Path, list[Row]]) -> None:
    _, rows = done
    names = ["end-point", "matching", "point", "5 tasks", "width 8, depth 1"]
    wanted = [(name, net) for name in (report.BASE, *names) for net in ("cnn-small", "conv4-8")]
    assert [(r["method"], r["net"]) for r in rows] == wanted
    assert all(0 <= r["accuracy"] <= 100 and r["tasks"] == 3 for r in rows)
    for r in rows:
        assert "of_tasks" not in r and (r["method"] != report.FIRST or r["ahead"] == 0)
        if r["method"] == "point":
            assert (r["overlap"], r["vote"]) == (1.0, pytest.approx(r["accuracy"], abs=0.01))


def test_points_ahead_are_of_the_same_tasks(done: tuple[Path, list[Row]]) -> None:
    out, rows = done
    kept = {name: read_json(out / f"variant-{name}.json") for name in ("end-point", "matching")}
    for i in range(2):
        first, other = (torch.tensor(kept[name][i]["of_tasks"]) for name in kept)
        row = next(
            r for r in rows if r["method"] == "matching" and r["net"] == kept["matching"][i]["net"]
        )
        assert row["ahead"] == pytest.approx(float((other - first).mean()), abs=0.006)
        assert row["ahead_interval"] == pytest.approx(
            1.96 * float((other - first).std()) / 3**0.5, abs=0.006
        )


def test_all_variants_but_those_of_few_tasks_begin_with_the_same_base_networks(
    done: tuple[Path, list[Row]],
) -> None:
    out, _ = done
    file = "bases.checkpoint.safetensors"
    tensors, _ = load_tensors(out / "bases" / file)
    copies = {path.parent.name: load_tensors(path)[0] for path in out.glob(f"fits/*/{file}")}
    assert len(copies) == 5
    few = next(name for name in copies if "tasks" in name)
    for name, copy in copies.items():
        assert copy.keys() == tensors.keys()
        same = [torch.equal(copy[key], tensors[key]) for key in tensors]
        assert all(same) == (name != few)
    plans = {path.parent.name: read_json(path) for path in out.glob("fits/*/run.json")}
    assert plans.pop(few)["bases"] is None
    (shared,) = {plan["bases"] for plan in plans.values()}
    assert shared


def test_it_goes_on_where_it_was(done: tuple[Path, list[Row]]) -> None:
    out, rows = done
    (out / "variant-point.json").unlink()
    again = run(TINY, out, "smoke").rows
    timeless = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in part] for part in (again, rows)
    ]
    assert timeless[0] == timeless[1]
    assert read_json(out / "results.json")["rows"] == again


def test_the_page_shows_ways_and_both_curves(done: tuple[Path, list[Row]]) -> None:
    out, rows = done
    page = (out / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 2
    head, body = report.accuracies(report.by_way(rows))
    assert head[2:] == [report.BASE, "end-point", "matching", "point"]
    assert all(f"<td>{cell}</td>" in page for cell in body[0])
    assert list(report.by_count(rows)) == ["5", "no end"]
    assert list(report.by_size(rows)) == ["width 8, depth 1", "width 16, depth 1"]


def test_what_a_scale_measures() -> None:
    """Validation classes alone; every fit has as many steps."""
    for scale in ("smoke", "cpu"):
        whole = study(scale, 3)
        assert {(row.set, row.part) for row in whole.rows} == {
            ("omniglot_full", "val"),
            ("mini_imagenet", "val"),
        }
        chosen = fits(whole)
        assert len(chosen) == 10
        assert len({config.training.steps for config in chosen.values()}) == 1
        assert all(config.seed == 3 and config.features == 128 for config in chosen.values())
