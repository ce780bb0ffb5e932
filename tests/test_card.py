"""The report card of a model of three tasks, of ten and of two classes: every section is there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from flown import FlownError, Zoo
from flown.base.provenance import digest, provenance, write_results
from flown.context.tokens import Contexts
from flown.generator.card import Card, _Sampler, _set_apart, report_card
from flown.generator.config import FlownConfig
from flown.generator.model import Flown
from flown.measure.baselines import BASELINES
from flown.measure.evaluate import evaluate
from flown.measure.lookup import Lookup
from tests.examples import TASKS, images, make_zoo

N, TOP = 7, 2


@pytest.fixture(scope="module")
def zoo(three_tasks: Zoo) -> Zoo:
    return three_tasks


@pytest.fixture(scope="module")
def model(model_of_three: Flown) -> Flown:
    return model_of_three


DATA = {task: images(task) for task in TASKS}


@pytest.fixture(scope="module")
def card(model: Flown, zoo: Zoo) -> Card:
    return report_card(model, zoo, DATA, n=N, top=TOP, shots=2, steps=20)


def by(rows: list[dict[str, Any]], **wanted: object) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def test_every_method_is_measured_alike(card: Card) -> None:
    own = {"flown", "zoo", "zoo-held-out", "reconstruction-train", "reconstruction-held-out"}
    own |= {"pixel-centroid", "support-only"}
    for task in card.tasks.values():
        assert set(task.methods) == own | set(BASELINES) | {"recipe-init"}
        for name in ("flown", "recipe-init", *BASELINES):
            assert len(task.methods[name].test) == len(task.methods[name].val) == N
        assert len(task.methods["zoo"].test) == 9 and len(task.methods["zoo-held-out"].test) == 3
        for name, measured in task.methods.items():
            if name == "pixel-centroid":  # no network
                assert measured.ratio is None and len(measured.test) == 5
                continue
            assert measured.ratio is not None and measured.iou is not None
            assert len(measured.ratio) == len(measured.iou) == len(measured.test)


def test_zoo_figures_are_those_of_its_last_epoch(card: Card, zoo: Zoo) -> None:
    for task, data in DATA.items():
        batch = zoo.select(task, "train", [-1]).batch(task)
        expected = evaluate(batch, data.test.images, data.test.labels)
        torch.testing.assert_close(card.tasks[task].methods["zoo"].test, expected)


def test_what_the_support_sets_alone_give(card: Card) -> None:
    """Centroids as scikit-learn computes them; networks that learnt from nothing but the set."""
    _, supports = _set_apart(DATA, 2, 0)
    for task, data in DATA.items():
        methods, test = card.tasks[task].methods, data.test
        for found, (pixels, labels) in zip(
            methods["pixel-centroid"].test.tolist(), supports[task], strict=True
        ):
            flat = pixels.flatten(1).double().numpy()
            means = [flat[labels.numpy() == k].mean(axis=0) for k in range(len(data.classes))]
            nearest = KNeighborsClassifier(1).fit(means, range(len(means)))
            right = nearest.score(test.images.flatten(1).numpy(), test.labels.numpy())
            assert found == pytest.approx(100 * right, abs=0.5)
        chance = 100 / len(data.classes)
        alone = methods["support-only"].test
        assert len(alone) == 5 and chance + 5 < alone.mean() < 95


def test_copies_are_seen_and_strangers_too(card: Card) -> None:
    for task in card.tasks.values():
        ratio = {k: float(m.ratio.mean()) for k, m in task.methods.items() if m.ratio is not None}
        assert ratio["nearest"] < 1e-4
        assert ratio["zoo-held-out"] == pytest.approx(1, abs=1e-5)
        assert ratio["nearest"] < ratio["noise-0.06"] < ratio["noise-0.12"] < ratio["random-init"]
        assert ratio["random-init"] == pytest.approx(1, abs=0.1)
        assert ratio["zoo"] == pytest.approx(1, abs=0.1)  # each against other seeds, not itself
        assert float(task.methods["nearest"].iou.min()) == pytest.approx(1)  # type: ignore[union-attr]


def test_confusion_is_of_all_pairs_with_equal_classes(card: Card) -> None:
    table = dict(zip(card.tasks, card.confusion, strict=True))
    assert table["digits"][2] is table["parity"][0] is table["parity"][1] is None
    own = card.tasks["digits"].methods["flown"].test
    assert table["digits"][0] == pytest.approx(float(own.mean()))
    assert table["digits"][1] is not None and table["turned"][0] is not None
    assert card.tasks["parity"].shuffled is None
    assert len(card.tasks["digits"].shuffled) == N  # type: ignore[arg-type]


def test_trajectory_ends_at_the_samples(card: Card) -> None:
    task = card.tasks["digits"]
    assert task.times is not None and task.along is not None and task.path is not None
    torch.testing.assert_close(task.times, torch.linspace(0, 1, 11))
    share = len(task.along[0])  # the first support set's
    torch.testing.assert_close(task.along[-1], task.methods["flown"].test[:share])
    assert task.path.shape == (21, share, 64)
    torch.testing.assert_close(task.path[-1], task.latents["samples"][:share])


def test_recognition_counts_support_sets(model: Flown, zoo: Zoo) -> None:
    _, supports = _set_apart(DATA, 2, 0)
    assert model.support is not None
    known = list(zoo.tasks.values())
    lookup = Lookup(Contexts(model.support, known, DATA, model.config.context, model.classes))
    sampler = _Sampler(model, supports, {}, 5, 0, "euler", 2, lookup)
    assert sampler.recognised("parity", 2) == 100, "no other task has two classes"
    assert sampler.recognised("digits", 10) == sampler.recognised("turned", 10) == 100
    swapped = supports | {"digits": supports["digits"][:2] + supports["turned"][2:]}
    mixed = replace(sampler, supports=swapped)
    assert mixed.recognised("digits", 10) == 40
    with pytest.raises(FlownError, match="no known task has 3 classes"):
        lookup.task(torch.zeros(10, model.support.width), 3)


def test_support_sets_are_of_images_that_nothing_has_seen() -> None:
    left, supports = _set_apart(DATA, 2, 0)
    for task, data in DATA.items():
        used = {image.numpy().tobytes() for some in supports[task] for image in some.images}
        pixels = {
            part: [image.numpy().tobytes() for image in getattr(data, part).images]
            for part in ("train", "val")
        }
        assert used <= set(pixels["val"]) and not used & set(pixels["train"])
        kept = [image.numpy().tobytes() for image in left[task].val.images]
        assert kept == [image for image in pixels["val"] if image not in used]
        assert left[task].test is data.test and left[task].train is data.train
        for some in supports[task]:
            count = len(data.classes)
            assert some.labels.tolist() == [c for c in range(count) for _ in range(2)]
    with pytest.raises(FlownError, match="none is left to choose networks on"):
        few = replace(DATA["parity"], val=DATA["parity"].val[:4])
        _set_apart({"parity": few}, int(few.val.labels.bincount().min()), 0)


def test_samples_are_shared_out_evenly(model: Flown, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, sample = [], model.sample

    def count(images: object, labels: object, n: int, *more: Any, **about: Any) -> object:
        asked.append((n, id(images)))
        return sample(images, labels, n, *more, **about)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "sample", count)
    sampler = _Sampler(model, _set_apart(DATA, 2, 0)[1], {"digits": 0}, 7, 0, "euler", 2)
    drawn = sampler.draw("digits", "digits", 7)
    assert [n for n, _ in asked] == [2, 2, 1, 1, 1] and len({i for _, i in asked}) == 5
    assert sum(len(s.batch) for s in drawn) == 7


def test_brief_card_leaves_explanations_out(model: Flown, zoo: Zoo) -> None:
    brief = report_card(model, zoo, DATA, n=2, shots=1, steps=2, full=False)
    assert brief.tasks["digits"].times is None and brief.confusion[0][0] is None
    assert json.dumps(brief.rows(), allow_nan=False)


def test_rows_follow_the_schema(card: Card) -> None:
    rows = card.rows()
    keys = {"dataset", "method", "metric", "value", "std", "n", "selection", "epoch", "paper"}
    assert all(keys <= set(row) for row in rows)
    json.dumps(rows, allow_nan=False)
    whole, chosen = by(rows, dataset="digits", method="flown", metric="accuracy")
    assert (whole["n"], whole["selection"]) == (N, "all")
    assert whole["min"] <= whole["median"] <= whole["max"]
    assert (chosen["n"], chosen["selection"]) == (TOP, f"val-top{TOP}-of-{N}")
    for name in BASELINES:
        found = by(rows, dataset="digits", method=name, metric="accuracy")
        assert [row["selection"] for row in found] == ["all", f"val-top{TOP}-of-{N}"]
    assert by(rows, dataset="digits", method="zoo", metric="accuracy")[0]["epoch"] == 2
    for metric in ("l2-ratio", "max-iou", "diversity-iou", "seconds", "nfe", "recognised"):
        assert len(by(rows, dataset="turned", method="flown", metric=metric)) == 1
    assert len(by(rows, dataset="digits", metric="accuracy-along")) == 11
    assert by(rows, dataset="digits", method="flown-shuffled-context")


def test_same_seed_same_card(model: Flown, zoo: Zoo, card: Card) -> None:
    again = report_card(model, zoo, DATA, n=N, top=TOP, shots=2, steps=20)
    first, second = (
        [row for row in some.rows() if row["metric"] != "seconds"] for some in (card, again)
    )
    assert first == second and len(first) == len(card.rows()) - 3


def test_a_zoo_without_held_out_networks_or_other_seeds(model: Flown, tmp_path: Path) -> None:
    lone = Zoo.join(
        [make_zoo(tmp_path / task, (task,), models=1, held_out=0) for task in TASKS],
        tmp_path / "lone",
    )
    card = report_card(model, lone, DATA, n=2, shots=1, steps=2)
    assert card.tasks["digits"].methods["flown"].ratio is None
    assert "zoo-held-out" not in card.tasks["digits"].methods
    json.dumps(card.rows(), allow_nan=False)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"n": 0}, "at least 1"),
        ({"top": 0}, "at least 1"),
        ({"images": {"digits": DATA["digits"]}}, "unknown task 'turned'"),
        ({"shots": 1000}, "1000 are needed"),
    ],
)
def test_bad_input(model: Flown, zoo: Zoo, about: dict[str, Any], message: str) -> None:
    with pytest.raises(FlownError, match=message):
        report_card(model, zoo, **{"images": DATA, **about})


def test_results_file(tmp_path: Path, card: Card) -> None:
    about = provenance(FlownConfig(), card.counts, 1.23, "cpu", command="flown demo")
    assert about["command"] == "flown demo" and about["config_hash"] == digest(FlownConfig())
    assert {"flown", "python", "torch"} <= set(about["versions"])
    assert about["hardware"]["cpu"] and about["hardware"]["cores"] >= 1
    write_results(tmp_path / "results.json", "demo", "smoke", about, card.rows())
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["format"] == "flown-results-1"
    assert set(content) == {"format", "experiment", "scale", "provenance", "rows"}
    assert content["rows"] == card.rows()


def test_a_config_is_known_by_its_values() -> None:
    assert digest(FlownConfig()) == digest(FlownConfig(seed=0)) != digest(FlownConfig(seed=1))
