"""The study of few steps in small: its flows, its rows, its page, its resumption."""

from __future__ import annotations

from pathlib import Path

import pytest

import flown
from flown.base.files import file_name, read_json
from flown.base.provenance import Row
from flown.experiments.steps import REFLOW, StepsStudy, run
from flown.report.steps import by_flow
from flown.tasks import load
from flown.training import TrainConfig

TINY = StepsStudy(
    training=TrainConfig(steps=4, batch_size=16),
    solvers=(("euler", 1), ("heun", 2)),
    pairs=6,
    samples=5,
)


@pytest.fixture(scope="module")
def done(
    model: flown.Flown, zoo: flown.Zoo, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Row]]:
    out = tmp_path_factory.mktemp("steps")
    return out, run(TINY, model, zoo, {"digits": load("digits")}, out, "smoke").rows


def test_every_flow_is_measured_by_every_solver(done: tuple[Path, list[Row]]) -> None:
    out, rows = done
    flows = [*TINY.flows, REFLOW]
    accuracies = [r for r in rows if r["metric"] == "accuracy"]
    assert [r["method"] for r in accuracies] == [
        f"{name}, {solver}" for name in flows for solver in ("euler 1", "heun 2")
    ]
    assert {(r["solver"], r["nfe"]) for r in rows} == {("euler", 1), ("heun", 4)}
    assert all(0 <= r["value"] <= 100 and r["n"] == 5 for r in rows)
    head, body = by_flow(rows)
    assert head[-1] == "digits" and len(body) == 2 * len(flows)
    assert "Few steps" in (out / "report.html").read_text("utf-8")
    assert read_json(out / "results.json")["rows"] == rows


def test_what_is_trained_differs_and_begins_where_it_should(done: tuple[Path, list[Row]]) -> None:
    out, _ = done
    names = ("independent", REFLOW)
    models = [flown.Flown.from_pretrained(out / file_name(name) / "model") for name in names]
    first, reflow = (m.velocity.state_dict()["stem.weight"] for m in models)
    rate = TINY.training.learning_rate
    # It begins with the first flow: a few steps of Adam apart.
    assert 0 < float((reflow - first).abs().max()) < 5 * rate


def test_a_rerun_trains_nothing(
    done: tuple[Path, list[Row]],
    model: flown.Flown,
    zoo: flown.Zoo,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, rows = done

    def stepped(*_: object) -> None:
        raise AssertionError("a step of training")

    monkeypatch.setattr("flown.training._Run.advance", stepped)
    monkeypatch.setattr("flown.experiments.steps._followed", stepped)
    again = run(TINY, model, zoo, {"digits": load("digits")}, out, "smoke").rows
    assert again == rows
