"""Controls against independent implementations, unseen tasks, and the study on digits end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestCentroid
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import flown
from flown.anytask.writer import architecture
from flown.experiments import anytask
from flown.experiments.anytask import AnyTaskStudy, measure
from flown.experiments.unseen import ROWS, VALIDATION, Unseen
from flown.measure.fromsupport import fresh, nearest_centroid, own_logits, trained
from flown.report import anytask as report
from flown.tasks import load
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout
from tests.test_cli import call

DIGITS = Unseen(set="digits", tasks=3)


def test_networks_are_trained_as_a_loop_over_modules_trains_them() -> None:
    kind = architecture("cnn-small", 1, 3)
    generator = torch.Generator().manual_seed(0)
    modules = [kind.build() for _ in range(12)]  # more than are trained at a time
    for module in modules:
        for p in module.parameters():
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    vectors = torch.stack([parameters_to_vector(m.parameters()).detach() for m in modules])
    starts = WeightBatch(WeightLayout.of(modules[0], kind), vectors)
    images = torch.randn(12, 6, 1, 28, 28, generator=generator)
    labels = torch.arange(6).expand(12, -1) % 3
    two, five = trained(starts, images, labels, 1e-3, [2, 5])
    for i, module in enumerate(modules):
        optimizer = torch.optim.Adam(module.parameters(), 1e-3)
        for step in range(5):
            loss = F.cross_entropy(module(images[i]), labels[i], reduction="sum")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step == 1:
                wanted = parameters_to_vector(module.parameters()).detach()
                assert torch.allclose(two[i], wanted, atol=2e-4)
        wanted = parameters_to_vector(module.parameters()).detach()
        assert torch.allclose(five[i], wanted, atol=1e-3)
    logits = own_logits(starts, five, images)
    copy = kind.build()
    vector_to_parameters(five[7], copy.parameters())
    assert isinstance(copy, nn.Module) and torch.allclose(logits[7], copy(images[7]), atol=1e-3)


def test_the_nearest_centroid_is_scikit_learns() -> None:
    images, tasks = DIGITS.draw(seed=0)
    floats = images + torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    found = nearest_centroid(tasks.gather(floats))
    for i in range(3):
        model = NearestCentroid().fit(
            floats[tasks.support[i]].flatten(1).numpy(), tasks.labels[i].numpy()
        )
        right = model.score(floats[tasks.query[i]].flatten(1).numpy(), tasks.targets[i].numpy())
        assert found[i] == pytest.approx(100 * right, abs=1e-3)


def test_equal_rates_share_a_training() -> None:
    """What comes out is what a training for each number of steps gives."""
    tasks = anytask._standard(*DIGITS.draw(seed=0))
    starts = fresh(architecture("cnn-small", 1, 10), len(tasks.labels), seed=0)
    rates = {"4": 3e-3, "1": 1e-2, "2": 3e-3}
    found = anytask._moved(starts, tasks, rates)
    assert list(found) == [1, 2, 4]
    for steps, rate in rates.items():
        (alone,) = anytask._after(starts, tasks, rate, [int(steps)])
        assert torch.equal(found[int(steps)], alone)
    assert not torch.equal(found[1], found[4])


def test_supports_are_of_the_training_part_and_queries_of_the_test_part() -> None:
    images, tasks = DIGITS.draw(seed=0, queries=4)
    digits = load("digits")
    known = torch.cat([digits.train.labels, digits.test.labels])
    for i in range(3):
        classes = tasks.classes[i]
        assert sorted(classes.tolist()) == list(range(10))
        assert torch.equal(known[tasks.support[i]], classes[tasks.labels[i]])
        assert torch.equal(known[tasks.query[i]], classes[tasks.targets[i]])
    assert tasks.support.max() < len(digits.train) <= tasks.query.min()
    assert torch.equal(DIGITS.draw(seed=0, queries=4)[1].query, tasks.query)
    assert images.dtype == torch.uint8


def test_nothing_that_is_measured_on_is_trained_on() -> None:
    from flown.tasks.stream import StreamConfig

    config = StreamConfig()
    measured = {(row.set, row.part) for row in (*ROWS, *VALIDATION)}
    assert not {(name, part) for name in config.pools for part in (config.part, "all")} & measured


def test_the_study_on_digits(tmp_path: Path) -> None:
    """`flown-any` never saw a digit: it beats the controls of its support set, and reads it."""
    study = AnyTaskStudy(nets=("conv4-32", "cnn-small"), trained_nets=("cnn-small",), samples=4)
    settings = {"scratch": ("cnn-small", 0.01), "base": {"cnn-small": {"1": 1e-3}}}
    model = flown.Flown.from_pretrained("flown-any")
    rows = measure(model, None, DIGITS, study, settings)
    found = {row["method"]: row["accuracy"] for row in rows}
    assert found["flown-any conv4-32"] > found["nearest centroid of pixels"] > 60
    assert found["flown-any conv4-32"] > found["scratch cnn-small"]
    for name in ("another task's support", "shuffled labels", "no support"):
        assert found[f"{name} conv4-32"] < 30
    vote = next(row for row in rows if row["method"] == "flown-any conv4-32")
    assert vote["vote"] >= vote["accuracy"] - 1 and 0 < vote["overlap"] < 1
    assert vote["networks"] == 4
    head, body = report.populations(rows)
    scratch = next(row for row in rows if row["method"] == "scratch cnn-small")
    assert head[6] == "trained ones" and body[0][6] == f"{scratch['overlap']:.2f}"
    head, body = report.leads(rows)
    best = max(value for method, value in found.items() if not method.startswith("flown-any"))
    ahead = f"{found['flown-any conv4-32'] - best:+.1f}"
    assert head[0] == "row" and body[0][1].startswith("conv4-32") and body[0][3] == ahead
    report.write_study(tmp_path / "study.html", rows, {"command": "flown <reproduce>"})
    page = (tmp_path / "study.html").read_text()
    assert "nearest centroid of pixels" in page and "flown &lt;reproduce&gt;" in page


def test_from_pools_to_networks_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {
        "nets": {"cnn-small": 1.0},
        "numbers": 8,
        "width": 16,
        "depth": 1,
        "tasks": {"ways": 10, "images": 60, "queries": 10},
        "base": {"images": 60, "training": {"steps": 2, "warmup": 1}},
        "training": {"steps": 2, "warmup": 1},
    }
    config = tmp_path / "small.json"
    config.write_text(json.dumps(small))
    run, nets = tmp_path / "run", tmp_path / "nets.safetensors"
    assert call(monkeypatch, "fit", config, "--tasks", "glyphs", "--out", run) == 0
    arguments = ["generate", run / "model", "--support", "digits", "--out", nets, "-n", 3]
    assert call(monkeypatch, *arguments) == 0
    assert call(monkeypatch, "evaluate", nets, "--data", "digits") == 0
    assert "cnn-small" in capsys.readouterr().out
    for extra, message in (
        (["--solver", "heun"], "--solver"),
        (["--net", "conv4-32"], "unknown network 'conv4-32'"),
        (["--layout", "0"], "--layout"),
    ):
        assert call(monkeypatch, *arguments, "--overwrite", *extra) == 2
        assert message in capsys.readouterr().err
    assert call(monkeypatch, "fit", "--out", tmp_path / "no") == 2
    assert "--zoo" in capsys.readouterr().err
    assert call(monkeypatch, "fit", config, "--tasks", "omniglot_full", "--out", run) == 2
    assert "FLOWN_DATA" in capsys.readouterr().err
