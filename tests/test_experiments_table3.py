"""Table 3 from beginning to end on digits, and the ten-way task of Omniglot's test alphabets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import flown
from flown.base.errors import FlownError
from flown.context.tokens import ContextConfig
from flown.experiments import starts, table3, targets
from flown.flow import VelocityConfig
from flown.generator.config import FlownConfig
from flown.measure.finetune import Point, read_points
from flown.report.finetuning import AHEAD, ANY, GAP, LEAD, accuracy_table, bars, curves, through
from flown.training import TrainConfig
from flown.zoo import Recipe
from tests import examples

TINY = Recipe(
    name="tiny",
    dataset="turned",
    learning_rate=5e-3,
    batch_size=16,
    epochs=4,
    keep=(2, 4),
    init="uniform",
)
FIT = FlownConfig(
    encoder_training=TrainConfig(steps=60, batch_size=8, validate_every=60),
    velocity=VelocityConfig(channels=16, blocks=1),
    context=ContextConfig(draws=4),
    flow_training=TrainConfig(steps=60, batch_size=8),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A FLOWN_DATA with digits turned, digits in colour, and ten and more characters."""
    out = tmp_path / "data"
    out.mkdir()
    some, names = examples.images("turned"), np.array(list("0123456789"))
    arrays = {
        f"{part}_{kind}": getattr(getattr(some, part), kind).numpy()
        for part in ("train", "test")
        for kind in ("images", "labels")
    }
    for key in ("train_images", "test_images"):
        arrays[key] = arrays[key][:, 0]
    np.savez(out / "turned.npz", class_names=names, **arrays)
    colour = {
        k: np.stack([v, v // 2, v // 3], -1) if k.endswith("images") else v
        for k, v in arrays.items()
    }
    np.savez(out / "svhn_small.npz", class_names=names, **colour)
    many = np.random.default_rng(0).integers(0, 256, (14 * 20, 12, 12), dtype=np.uint8)
    np.savez(
        out / "omniglot_full.npz",
        images=many,
        labels=np.repeat(np.arange(14), 20),
        class_names=np.array([f"c{i}" for i in range(14)]),
        class_split=np.array(["train", "val", *["test"] * 12]),
    )
    monkeypatch.setenv("FLOWN_DATA", str(out))
    return out


def test_the_ten_way_task(folder: Path) -> None:
    task, again, other = targets.ten_way(0), targets.ten_way(0), targets.ten_way(1)
    assert len(task.classes) == 10 and not {"c0", "c1"} & set(task.classes)
    for part, each in (("train", 10), ("val", 4), ("test", 6)):
        split = getattr(task, part)
        assert torch.bincount(split.labels).tolist() == [each] * 10
        assert torch.equal(split.images, getattr(again, part).images)
    assert task.classes != other.classes
    whole = flown.tasks.load_many("omniglot_full")
    for image, label in zip(task.test.images, task.test.labels, strict=True):
        rows = (whole.images == image).flatten(1).all(dim=1).nonzero().flatten()
        assert whole.classes[int(whole.labels[rows[0]])] == task.classes[int(label)]


def test_targets_are_grey_and_ten_way(folder: Path) -> None:
    grey = targets.target("svhn_small")
    assert grey.train.images.shape[1] == 1 and grey.train.images.dtype == torch.uint8
    many = flown.load_data("svhn_small").train.images[0].float()
    expected = (0.299 * many[0] + 0.587 * many[1] + 0.114 * many[2]).round()
    assert torch.equal(grey.train.images[0, 0].float(), expected)
    np.savez(
        folder / "two.npz",
        train_images=np.arange(80, dtype=np.uint8).repeat(64).reshape(-1, 8, 8),
        train_labels=np.arange(80) % 2,
        test_images=np.full((4, 8, 8), 200, np.uint8),
        test_labels=np.arange(4) % 2,
        class_names=np.array(["a", "b"]),
    )
    with pytest.raises(FlownError, match="two: has 2 classes"):
        targets.target("two")


def test_lookup_takes_the_best_of_the_best_task(tmp_path: Path) -> None:
    zoo, images = (
        examples.make_zoo(tmp_path / "zoo", tasks=("digits", "turned")),
        examples.images("digits"),
    )
    found = starts.best_lookup(zoo, images, 3)
    val = {
        task: flown.evaluate(zoo.batch(task), images.val.images, images.val.labels)
        for task in zoo.tasks
    }
    task = max(val, key=lambda name: float(val[name].max()))
    assert found.task is not None and found.task.id == task
    own = flown.evaluate(found, images.val.images, images.val.labels)
    assert torch.equal(own, val[task].sort(descending=True).values[:3])


def test_from_zoo_to_report(folder: Path, tmp_path: Path) -> None:
    settings = table3.Table3Config(
        recipes=(TINY,),
        models=4,
        fit=FIT,
        trajectory=(-2, -1),
        unseen=("svhn_small", "omniglot_full"),
        epochs=(0, 1, 3),
        samples=2,
        steps=4,
        max_train_images=64,
        rates=(1e-4, 3e-3),
        rate_epochs=1,
        rate_samples=1,
    )
    out = tmp_path / "table3"
    rows = table3.run(settings, out, "smoke", "cpu")
    content = json.loads((out / "results.json").read_text())
    assert content["experiment"] == "table3" and content["rows"] == rows
    assert set(content["provenance"]["seconds_of_stages"]) == {
        "zoo",
        "fit",
        "trajectory",
        "turned",
        "svhn_small",
        "omniglot_full",
    }
    found = {(r["dataset"], r["method"], r["epoch"]): r for r in rows if r["metric"] == "accuracy"}
    methods = {
        "flown",
        table3.TRAJECTORY,
        table3.STOPPED,
        *starts.INITS,
        "checkpoint",
        "zoo-mean",
        "best-lookup",
    }
    every = methods | {ANY}
    assert {key[:2] for key in found} == {
        (d, m) for d in ("turned", "svhn_small", "omniglot_full") for m in every
    } | {("turned", "zoo")}
    for dataset in ("turned", "svhn_small", "omniglot_full"):
        config = json.loads((out / "finetuned" / f"{dataset}-flown.json").read_text())["plan"][
            "config"
        ]
        for method in methods - {"kaiming", table3.STOPPED}:
            file = out / "finetuned" / f"{dataset}-{method}.json"
            assert json.loads(file.read_text())["plan"]["config"] == config, "all are trained alike"
            points = read_points(file)
            row = found[dataset, method, 3]
            assert row["value"] == pytest.approx(float(points[3].test.mean()))  # type: ignore[union-attr]
            assert row["learning_rate"] == config["learning_rate"] and row["n"] == 2
        stops = {}
        for epoch in (2, 4):
            points = read_points(out / "finetuned" / f"{dataset}-stop{epoch}.json")
            stops[epoch] = float(points[-1].val.mean())
        chosen = found[dataset, table3.STOPPED, 0]
        assert (
            stops[chosen["until"]] == max(stops.values())
            and chosen["selection"] == "val-best-of-2-stops"
        )
        last = found[dataset, table3.TRAJECTORY, 0]
        assert last["until"] == 4 and last["selection"] == "all"
        assert (chosen["until"] == 4) <= (chosen["value"] == last["value"])
        by_epoch = {
            method: read_points(out / "finetuned" / f"{dataset}-{method}.json")
            for method in ("flown", table3.TRAJECTORY)
        }
        for row in rows:
            if (row["dataset"], row["metric"], row["method"]) == (
                dataset,
                AHEAD,
                table3.TRAJECTORY,
            ):
                ours, theirs = (by_epoch[m][row["epoch"]].test for m in (row["method"], "flown"))
                assert ours is not None and theirs is not None
                assert row["value"] == pytest.approx(float((ours - theirs).mean()), abs=1e-4)
                assert row["std"] == pytest.approx(float((ours - theirs).std()), abs=1e-4)
        written = [read_points(out / "finetuned" / f"{dataset}-{ANY}-{i}.json") for i in range(2)]
        alone = [float(points[1].test[0]) for points in written]  # type: ignore[index]
        row = found[dataset, ANY, 1]
        assert row["value"] == pytest.approx(sum(alone) / 2) and row["n"] == 2
        inits = {init: found[dataset, init, 1]["value"] for init in starts.INITS}
        leads = [
            r for r in rows if r["dataset"] == dataset and r["metric"] == LEAD and r["epoch"] == 1
        ]
        assert [lead["method"] for lead in leads] == ["flown", ANY]
        for lead in leads:
            assert lead["value"] == pytest.approx(
                found[dataset, lead["method"], 1]["value"] - max(inits.values())
            )
    assert (
        found["svhn_small", "flown", 0]["note"]
        and found["omniglot_full", "flown", 0]["batch_size"] == 6
    )
    page = (out / "report.html").read_text()
    _, judged = bars(rows)
    assert [line[0] for line in judged] == ["turned"] * 7 + [
        *["svhn_small (unseen)"] * 4,
        *["omniglot_full (unseen)"] * 4,
    ]
    for line in judged:
        assert f"<td>{line[3]}</td><td>{line[4]}</td>" in page
    assert "generated, trajectory" in page and "(val-best-of-2-stops)" in page
    assert "data:image/png" in page and "not the official one" in page
    before = {p.name: p.stat().st_mtime_ns for p in (out / "finetuned").iterdir()}
    again = table3.run(settings, out, "smoke", "cpu")
    assert again == rows
    assert before == {p.name: p.stat().st_mtime_ns for p in (out / "finetuned").iterdir()}


def test_the_table_says_where_a_bar_is_missed() -> None:
    def row(
        dataset: str, metric: str, epoch: int, value: float, method: str = "flown"
    ) -> dict[str, object]:
        return {
            "dataset": dataset,
            "method": method,
            "metric": metric,
            "epoch": epoch,
            "value": value,
            "over": "kaiming",
        }

    rows = [
        row("a", GAP, 0, -2.9),
        row("a", LEAD, 0, 4.0),
        row("a", LEAD, 5, -0.1),
        row("a", LEAD, 25, -9.0),
        row("b", LEAD, 0, -1.0),
        row("b", LEAD, 1, 2.0),
        row("b", LEAD, 25, 1.0, "flown-any"),
        row("b", LEAD, 50, -1.0, "flown-any"),
    ]
    _, body = bars(rows)
    assert [(line[0], line[1], line[-1]) for line in body] == [
        ("a", "0", "held"),
        ("a", "0", "held"),
        ("a", "5", "missed"),
        ("b (unseen)", "1", "held"),
        ("b (unseen)", "25", "held"),
    ]
    head, body = accuracy_table(
        [
            {
                "dataset": "a",
                "metric": "accuracy",
                "method": "flown",
                "epoch": 1,
                "value": 50.04,
                "std": 1.0,
                "paper": 84.49,
            }
        ],
        "a",
    )
    assert head[1:] == ["epoch 1"] and body[0][1] == "50.0 ± 1.0 (84.5)"


def test_the_flow_through_the_epochs_is_set_against_the_other_in_pairs() -> None:
    """Networks of one support set rise and fall together: only their differences tell."""

    def row(method: str, epoch: int, ahead: list[float], until: float) -> dict[str, object]:
        values = torch.tensor(ahead)
        return {
            "dataset": "a",
            "metric": AHEAD,
            "method": method,
            "epoch": epoch,
            "value": float(values.mean()),
            "std": float(values.std()) if len(ahead) > 1 else None,
            "n": len(ahead),
            "until": until,
        }

    rows = [
        row(table3.TRAJECTORY, 0, [7.0, 9.0, 7.0, 9.0], 5.0),
        row(table3.TRAJECTORY, 1, [-2.0], 5.0),
        row(table3.STOPPED, 0, [12.0, 12.0], 3.0),
        row(table3.STOPPED, 1, [1.0, 3.0], 3.0),
    ]
    head, body = through(rows)
    assert head[2:] == ["stop", "epoch 0", "epoch 1"]
    assert [line[2:] for line in body] == [
        ["5", "+8.0 ± 0.6", "-2.0"],
        ["3", "+12.0 ± 0.0", "+2.0 ± 1.0"],
    ]


def test_curves_are_the_means() -> None:
    points = [Point(e, torch.tensor([10.0 * e, 10.0 * e + 2])) for e in range(3)]
    page = curves({"a": {"flown": points}, "b": {"kaiming": [Point(0, torch.tensor([5.0]))]}})
    line = page.axes[0].get_lines()[0]
    assert list(line.get_xdata()) == [0, 1, 2] and list(line.get_ydata()) == [1, 11, 21]


def test_scales() -> None:
    for scale in ("smoke", "cpu", "paper"):
        settings = table3.config(scale)
        for recipe in settings.recipes:
            assert recipe.keep[-1] == recipe.epochs  # nothing is trained beyond what is kept
            recipe.check()
        assert settings.through.flow.path == "spline"
        assert settings.through.model_dump(exclude={"epochs", "flow"}) == settings.fit.model_dump(
            exclude={"epochs", "flow"}
        )
    assert [x.keep for x in table3.config("cpu").recipes] == 3 * [(2, 3, 4, 5)] + [(4, 6, 8, 10)]
    assert table3.config("paper").fit.epochs == (21, 22, 23, 24, 25)
    assert table3.PAPER["stl10", "flown", 0] == 35.16
    assert table3.PAPER["kmnist", "recipe-init", 50] == 64.32
