"""The report card over held-out tasks of a zoo of random ones; a zoo of named tasks keeps its own."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

import flown
from flown.base.errors import FlownError
from flown.experiments.evaluation import evaluate_model
from flown.generator import heldout
from flown.generator.card import Card
from flown.generator.heldout import HeldOutCard, held_out_card, held_out_tasks, holds_out_tasks
from flown.report import print_card, tables
from flown.tasks import ManyClass, TaskDraw
from flown.zoo import Zoo
from tests.conftest import RANDOM
from tests.examples import TASKS, images
from tests.test_cli import call

METHODS = {
    "flown",
    "flown-shuffled-context",
    "pixel-centroid",
    "nearest",
    "zoo-mean",
    "support-only",
}


@pytest.fixture(scope="module")
def zoo(random_tasks: Zoo) -> Zoo:
    return random_tasks


@pytest.fixture(scope="module")
def model(model_of_random_tasks: flown.Flown) -> flown.Flown:
    return model_of_random_tasks


@pytest.fixture(scope="module")
def card(model: flown.Flown, zoo: Zoo, glyphs: ManyClass) -> HeldOutCard:
    return held_out_card(model, zoo, {"glyphs": glyphs}, n=3, steps=4)


def test_every_method_has_the_same_tasks(card: HeldOutCard, zoo: Zoo) -> None:
    held_out = [task for task in zoo.tasks.values() if task.split == "val"]
    assert card.tasks == held_out and 2 < len(held_out) < 15
    assert set(card.accuracies) == METHODS | {"zoo-held-out"}
    for method, values in card.accuracies.items():
        assert values.shape == (len(held_out),)
        assert values.isnan().tolist() == [
            method == "flown-shuffled-context" and i == 0 for i in range(len(held_out))
        ]
    assert card.counts == {
        "tasks": len(held_out),
        "training tasks": 24 - len(held_out),
        "queries": 3 * 15 * len(held_out),
    }
    mean = {method: card.mean(method).mean for method in card.accuracies}
    assert mean["zoo-held-out"] > 70 and mean["pixel-centroid"] > 70
    for method in METHODS - {"pixel-centroid", "support-only", "nearest"}:
        assert mean[method] < 60, "40 steps of training, or a network of another task"


def test_figures_are_those_of_networks_on_the_tasks_own_queries(
    card: HeldOutCard, zoo: Zoo, glyphs: ManyClass
) -> None:
    generator = torch.Generator().manual_seed(0)
    train = zoo.select(split="train")
    mean = train.read(range(len(train))).mean(dim=0)
    for place, task in enumerate(card.tasks):
        images = task.images(glyphs)
        episode = heldout._episode(images, 3, generator)
        known = {image.numpy().tobytes() for image in images.train.images}
        drawn = torch.cat([episode.support[0], episode.query[0]])
        assert not known & {image.numpy().tobytes() for image in drawn}
        own = zoo.batch(task.id)
        for method, batch in {"zoo-held-out": own, "zoo-mean": own.on(mean[None])}.items():
            wanted = flown.evaluate(batch, episode.query[0], episode.targets[0]).mean()
            assert float(card.accuracies[method][place]) == pytest.approx(float(wanted), abs=1e-4)


def test_differences_are_paired(card: HeldOutCard) -> None:
    rows = {row["method"]: row for row in card.rows()}
    json.dumps(list(rows.values()), allow_nan=False)
    ours = card.accuracies["flown"].double()
    for method, row in rows.items():
        theirs = card.accuracies[method].double()
        d = (ours - theirs)[~theirs.isnan()].numpy()
        assert row["n"] == len(d) and row["dataset"] == "glyphs"
        if method == "flown":
            assert "difference" not in row
            continue
        assert row["difference"] == pytest.approx(d.mean(), abs=1e-4)
        half = 1.96 * d.std(ddof=1) / len(d) ** 0.5
        assert row["difference_interval"] == pytest.approx(half, abs=1e-3)


def test_tasks_are_drawn_anew_where_none_is_held_out(
    glyphs: ManyClass, three_tasks: Zoo, tmp_path: Path
) -> None:
    draw = TaskDraw(ways=3, held_out=0)
    recipe = RANDOM.model_copy(update={"tasks": draw, "epochs": 1, "keep": (1,)})
    all_seen = flown.train_zoo(recipe, 4, tmp_path / "zoo", seed=5, images=glyphs)
    assert holds_out_tasks(all_seen) and not holds_out_tasks(three_tasks)
    new = held_out_tasks(all_seen, {"glyphs": glyphs}, 3)
    assert new == [draw.task(glyphs, 4 + i, seed=5) for i in range(3)]
    assert not {task.id for task in new} & set(all_seen.tasks)
    with pytest.raises(FlownError, match="all of its tasks were trained on"):
        held_out_tasks(three_tasks, {"digits": glyphs}, 3)


def test_what_cannot_be_measured_is_refused(
    model: flown.Flown, zoo: Zoo, glyphs: ManyClass
) -> None:
    known_images = {"glyphs": glyphs}
    known = next(task for task in zoo.tasks.values() if task.split == "train")
    for about, message in (
        ({"tasks": [known]}, f"'{known.id}' was trained on"),
        ({"tasks": 0}, "for 0 tasks"),
        ({"n": 0}, "0 networks"),
        ({"shots": 18}, "has 18 images that no training saw, support sets take 18"),
    ):
        with pytest.raises(FlownError, match=message):
            held_out_card(model, zoo, known_images, **about)  # type: ignore[arg-type]


def test_tasks_of_unseen_classes_have_no_networks_of_the_zoo(
    model: flown.Flown, zoo: Zoo, glyphs: ManyClass
) -> None:
    others = ManyClass(**{**vars(glyphs), "class_split": {"test": torch.tensor([3, 8, 9])}})
    tasks = [TaskDraw(ways=3, part="test").task(others, 100 + i) for i in range(2)]
    found = held_out_card(model, zoo, {"glyphs": glyphs}, tasks=tasks, n=1, steps=1)
    assert set(found.accuracies) == METHODS


def test_a_zoo_of_random_tasks_gets_it_everywhere(
    model: flown.Flown, zoo: Zoo, glyphs: ManyClass, tmp_path: Path
) -> None:
    """On the page, on the terminal and in the model's own card."""
    folder = tmp_path / "model"
    model.save_pretrained(str(folder))
    made = evaluate_model(folder, zoo.path, tmp_path / "card", images={"glyphs": glyphs})
    assert isinstance(made, HeldOutCard) and made.n == 10 and made.shots == 3
    head, body = tables.held_out(made)
    assert {len(line) for line in body} == {len(head)}
    page = (tmp_path / "card" / "report.html").read_text("utf-8")
    console = Console(width=80, record=True, file=io.StringIO())
    print_card(made, console)
    text = console.export_text()
    for line in body:
        for cell in line:
            assert cell in text and cell.replace("'", "&#39;") in page
    assert "generated minus it" in text and "confusion" not in page.lower()
    kept = flown.Flown.from_pretrained(folder).card["rows"]
    assert kept == made.rows() == json.loads((tmp_path / "card/results.json").read_text())["rows"]
    readme, ahead = (folder / "README.md").read_text("utf-8"), made.ahead("pixel-centroid")
    assert f"| {ahead.mean:+.1f} ± {ahead.half:.1f} | {len(made.tasks)} |" in readme


def test_a_zoo_of_named_tasks_keeps_its_card(
    model_of_three: flown.Flown, three_tasks: Zoo, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    model_of_three.save_pretrained(str(folder))
    data = {task: images(task) for task in TASKS}
    made = evaluate_model(folder, three_tasks.path, tmp_path / "card", images=data)
    assert isinstance(made, Card) and list(made.tasks) == list(TASKS) and made.compares_tasks
    assert "Does the context decide?" in (tmp_path / "card" / "report.html").read_text("utf-8")
    (line,) = [
        x
        for x in (folder / "README.md").read_text("utf-8").splitlines()
        if x.startswith("| digits | flown |") and "| all |" in x
    ]
    measured = made.tasks["digits"].methods["flown"]
    assert measured.ratio is not None and measured.iou is not None
    assert line.split(" | ")[-3:] == [
        f"{float(measured.ratio.mean()):.2f}",
        f"{float(measured.iou.mean()):.2f}",
        f"{measured.diversity:.2f} |",
    ]


def test_the_command_tells_networks_from_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nets = tmp_path / "nets.safetensors"
    nets.touch()
    for arguments, message in (
        ((tmp_path / "none", "--zoo", tmp_path), "no such file"),
        ((tmp_path,), "give --zoo alone"),
        ((tmp_path, "--zoo", tmp_path, "--data", "digits"), "give --zoo alone"),
        ((nets,), "measured on images (--data)"),
        ((nets, "--data", "digits", "--out", tmp_path / "card"), "no --out"),
    ):
        assert call(monkeypatch, "evaluate", *arguments) == 2
        assert message in capsys.readouterr().err
