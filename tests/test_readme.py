"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flown
from flown.generator.files import SHIPPED, shipped_zoo
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
    assert "20 x cnn-small for support set" in capsys.readouterr().out
    assert float(names["accuracies"].mean()) > 75  # type: ignore[attr-defined]
    assert len(flown.WeightBatch.load("nets.safetensors")) == 20


def test_what_ships_is_whole() -> None:
    for name in SHIPPED:
        model, zoo = flown.Flown.from_pretrained(name), Zoo.open(shipped_zoo(name))
        assert model.tasks == zoo.tasks
        assert zoo.verify() == [] and len(zoo) >= 60 * len(zoo.tasks)
        assert model.card["rows"], "it carries its report card"
