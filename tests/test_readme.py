"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flown
from flown.generator.files import shipped, shipped_zoo
from flown.zoo import Zoo

README = Path(__file__).parent.parent / "README.md"


def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code) == 1
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code[0], "README.md", "exec"), names)
    assert "20 x conv4-32 for support set" in capsys.readouterr().out
    assert float(names["accuracies"].mean()) > 80  # type: ignore[attr-defined]
    assert len(flown.WeightBatch.load("nets.safetensors")) == 20


def test_what_ships_is_whole() -> None:
    for name in ("flown-small",):
        model, zoo = flown.Flown.from_pretrained(name), Zoo.open(shipped_zoo(name))
        assert model.tasks == zoo.tasks
        assert zoo.verify() == [] and len(zoo) >= 60 * len(zoo.tasks)
        assert model.card["rows"], "it carries its report card"


def test_a_model_ships_with_the_zoo_that_it_was_fitted_on() -> None:
    """An encoder gives back the networks that it learned from, and no others so well."""
    model, zoo = flown.Flown.from_pretrained("flown-small"), Zoo.open(shipped_zoo("flown-small"))
    images = flown.load_data("mnist5k").test
    for task in ("mnist", "cifar10"):
        batch = zoo.select(split="train").batch(task)[:20]
        far = (model.reconstruct(batch).vectors - batch.vectors).norm() / batch.vectors.norm()
        assert far < 0.1, task
    batch = zoo.select(split="train").batch("mnist")[:20]
    before, after = (
        flown.evaluate(some, images.images, images.labels).mean()
        for some in (batch, model.reconstruct(batch))
    )
    assert abs(before - after) < 1


def test_the_generator_for_any_task_ships_small_and_says_what_it_saw() -> None:
    model = flown.Flown.from_pretrained("flown-any")
    folder = shipped("flown-any")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    assert set(model.card["pools"]) == set(model.config.tasks.pools)
    assert "glyphs" in (folder / "README.md").read_text("utf-8")
    assert {"cnn-small", "cnn-medium", "conv4-8", "conv4-16", "conv4-32"} == set(model.config.nets)
