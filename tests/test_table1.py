"""Unconditional generation, flow beside diffusion, and the table made of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from flown import cli
from flown.context.tokens import ContextConfig
from flown.encoders import PDiffConfig, VAEConfig
from flown.experiments import table1
from flown.experiments.unconditional import Cell, UnconditionalConfig, run
from flown.flow import VelocityConfig
from flown.generator.config import FlownConfig
from flown.training import TrainConfig
from flown.zoo import Recipe

pytest.importorskip("diffusers")

RECIPE = Recipe(
    name="tiny",
    dataset="digits",
    learning_rate=5e-3,
    batch_size=32,
    epochs=8,
    keep=(),
    keep_steps=tuple(range(250, 281, 10)),
)


def settings() -> UnconditionalConfig:
    """Four trainings of four checkpoints on digits, two encoders."""
    cells = [
        Cell(
            recipe=RECIPE,
            models=4,
            fit=FlownConfig(
                epochs=(-4, -3, -2, -1),
                encoder=encoder,
                context=ContextConfig(mode="none"),
                encoder_training=TrainConfig(steps=100, batch_size=12, learning_rate=4e-3),
                velocity=VelocityConfig(channels=16, blocks=1, attention=False),
                flow_training=TrainConfig(steps=120, batch_size=32),
            ),
            samples=8,
            images=200,
        )
        for encoder in (VAEConfig(), PDiffConfig(channels=(8, 8)))
    ]
    return UnconditionalConfig(cells=tuple(cells), steps=10, ddpm_steps=50)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished table."""
    folder = tmp_path_factory.mktemp("table1") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table1, "config", lambda scale, seed: settings())
        table1.table1(folder, "smoke")
    return folder


def test_the_table(out: Path) -> None:
    found = json.loads((out / "results.json").read_text())
    assert (found["experiment"], found["scale"]) == ("table1", "smoke")
    rows = {(r["encoder"], r["method"], r["metric"], r["selection"]): r for r in found["rows"]}
    for encoder in ("vae", "pdiff"):
        for method, n in (("zoo", 12), ("flown", 8), ("p-diff", 8)):
            every = rows[encoder, method, "accuracy", "all"]
            best = rows[encoder, method, "accuracy", f"val-best-of-{n}"]
            assert (every["n"], best["n"]) == (n, 1) and every["min"] <= best["value"] <= every[
                "max"
            ]
        zoo = rows["vae", "zoo", "accuracy", "all"]
        assert rows[encoder, "zoo", "accuracy", "all"]["value"] == zoo["value"]
        assert rows["vae", "reconstruction-train", "accuracy", "all"]["value"] > zoo["value"] - 15
        assert rows["vae", "flown", "accuracy", "all"]["value"] > 50, "chance is 10 %"
        assert rows[encoder, "flown", "nfe", "all"]["value"] == 10
        assert rows[encoder, "p-diff", "nfe", "all"]["value"] == 50
        assert rows[encoder, "p-diff", "seconds", "all"]["value"] > 0
        assert rows[encoder, "zoo", "l2-ratio", "all"]["value"] == pytest.approx(1, abs=0.1)
        assert {m for e, m, *_ in rows if e == encoder} >= {
            "gaussian",
            "random-init",
            "zoo-held-out",
        }
    assert found["provenance"]["data"]["tiny"]["test"] == 200
    assert found["provenance"]["config"]["cells"][1]["fit"]["encoder"]["kind"] == "pdiff"
    page = (out / "report.html").read_text()
    assert "cnn-small (pdiff), digits" in page and "unconditionally" in page


def test_both_generators_share_the_latent(out: Path) -> None:
    from safetensors.torch import load_file

    for kind in ("vae", "pdiff"):
        flow, diffusion = (
            load_file(out / "runs" / f"tiny-{kind}" / method / "model" / "encoder.safetensors")
            for method in ("flown", "p-diff")
        )
        assert flow.keys() == diffusion.keys()
        assert all(torch.equal(flow[name], diffusion[name]) for name in flow)
    config = json.loads((out / "runs/tiny-vae/p-diff/model/config.json").read_text())["config"]
    assert config["flow"]["process"] == "diffusion" and config["context"]["mode"] == "none"


def test_it_goes_on_where_it_was_cut_off(out: Path, tmp_path: Path) -> None:
    """Without the second encoder's models and the first's diffusion: the same networks again."""
    again = tmp_path / "out"
    shutil.copytree(out, again)
    shutil.rmtree(again / "runs" / "tiny-vae" / "p-diff")
    shutil.rmtree(again / "runs" / "tiny-pdiff" / "flown" / "model")
    results = run(settings(), again, device="cpu").results
    rows = json.loads((out / "results.json").read_text())["rows"]
    before = [r["value"] for r in rows if r["metric"] == "accuracy"]
    assert [r["value"] for x in results for r in x.rows() if r["metric"] == "accuracy"] == before


def test_the_command_refuses_to_go_on_with_another_scale(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for more, message in (
        ("--resume", "another scale"),
        ("--seed=0", "--overwrite"),
    ):
        words = ("flown", "reproduce", "table1", "--scale", "cpu", "--out", str(out), more)
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
def test_every_scale_has_its_cells(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"mnist", "cifar10", "cifar100", "stl10", "natural10"}
    monkeypatch.setattr(table1, "present", lambda: here)
    cells = table1.config(scale).cells
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for cell in cells:
        assert cell.fit.context.mode == "none" and cell.fit.flow.process == "flow"
        assert len(cell.fit.epochs) == len(cell.recipe.keep) + len(cell.recipe.keep_steps)
    if scale != "smoke":
        whole = [c for c in cells if c.recipe.subset is None]
        assert all(c.models * len(c.fit.epochs) == 250 for c in whole), "200 of them to learn from"
        known = {(n, e, d) for n, e, d, _ in table1.PAPER}
        lost = [
            c.name
            for c in cells
            if c.fit.encoder.kind == "vae" and (c.recipe.net, "vae", c.recipe.dataset) not in known
        ]
        assert lost == []


def test_the_papers_figures_stand_beside_the_best() -> None:
    row = {
        "net": "cnn-medium",
        "encoder": "vae",
        "dataset": "cifar10",
        "method": "flown",
        "metric": "accuracy",
        "selection": "val-best-of-200",
        "paper": None,
    }
    assert table1._beside_paper(row)["paper"] == 69.97
    assert table1._beside_paper({**row, "selection": "all"})["paper"] is None
    assert table1._beside_paper({**row, "dataset": "natural10"})["paper"] is None


def test_a_subset_of_one_training(tmp_path: Path) -> None:
    """p-diff's recipe: one trajectory, the last checkpoints held out, controls beside."""
    brief = TrainConfig(steps=40, batch_size=8)
    how = Recipe(
        name="tiny-norms",
        dataset="digits",
        net="tests.examples:ConvNorm",
        size=10,
        activation="relu",
        subset="last-2-norms",
        base_epochs=2,
        learning_rate=3e-3,
        batch_size=16,
        epochs=1,
        keep=(),
        keep_steps=tuple(range(2, 17, 2)),
    )
    fit = FlownConfig(
        epochs=tuple(range(-8, 0)),
        context=ContextConfig(mode="none"),
        encoder_training=brief,
        flow_training=brief,
        velocity=VelocityConfig(channels=8, blocks=1),
    )
    cell = Cell(recipe=how, models=1, fit=fit, samples=3, images=50)
    once = run(UnconditionalConfig(cells=(cell,), steps=4, ddpm_steps=20), tmp_path, device="cpu")
    methods = once.results[0].methods
    assert methods["zoo"].ratio is None, "there is no other training to compare with"
    assert {"subset-default", "subset-shuffled", "subset-mean", "zoo-held-out"} <= set(methods)
    assert len(methods["flown"].test) == len(methods["p-diff"].test) == 3
