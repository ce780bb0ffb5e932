"""What lies in others' files: opened without running anything, the network found in it, the rest named."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flown.base.errors import FlownError
from flown.zoo.imports.checkpoints import from_checkpoints
from flown.zoo.imports.statefiles import open_states
from tests.test_imports import DIGITS, TASK, State, reason, report, same, save, source, state

__all__ = ["source"]  # a fixture


def under(prefix: str, seed: int) -> State:
    return {prefix + name: value for name, value in state(seed).items()}


def imported(path: Path, value: Any, **options: Any) -> Any:
    """The record of an import of one file; its weights are those of `state(1)`."""
    save(value, path / "source" / "a.pt")
    zoo, skipped = from_checkpoints(path / "source", DIGITS, TASK, path / "zoo", **options)
    assert skipped == [] and same(zoo, 0, state(1))
    return report(zoo.path)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod."])
def test_wrappers_are_taken_off(tmp_path: Path, key: str, prefix: str) -> None:
    tensors = {prefix + name: nn.Parameter(value) for name, value in state(1).items()}
    save({"epoch": 3, "optimizer": {"state": {}}, key: tensors}, tmp_path / "source" / "a.pt")
    zoo, _ = from_checkpoints(tmp_path / "source", DIGITS, TASK, tmp_path / "zoo")
    assert same(zoo, 0, state(1))


@pytest.mark.parametrize("key", ["net", "params", "ema", "a.b.c", "module.state_dict"])
def test_the_dict_that_holds_the_network_is_found(tmp_path: Path, key: str) -> None:
    value: Any = state(1)
    for part in reversed(key.split(".")):
        value = {part: value, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    assert imported(tmp_path, value)["weights taken from"] == {key: 1}


def test_of_several_that_fit_the_usual_one_or_the_named_one_is_taken(tmp_path: Path) -> None:
    both = {"ema": state(2), "model": state(1)}
    assert imported(tmp_path / "a", both)["weights taken from"] == {"model": 1}
    both = {"ema": state(1), "model": state(2)}
    imported(tmp_path / "b", both, key="ema")
    imported(tmp_path / "c", {"students": both}, key="students.ema")
    save({"ema": state(1), "raw": state(2)}, tmp_path / "d" / "a.pt")
    with pytest.raises(FlownError, match="several times, at 'ema', 'raw'; name one with --key"):
        from_checkpoints(tmp_path / "d", DIGITS, TASK, tmp_path / "zoo")
    with pytest.raises(FlownError, match="unknown entry 'emma'"):
        from_checkpoints(tmp_path / "d", DIGITS, TASK, tmp_path / "zoo", key="emma")


@pytest.mark.parametrize("prefix", ["model.", "_fsdp_wrapped_module.", "net.encoder.", "module."])
def test_prefixes_of_most_names_are_taken_off(tmp_path: Path, prefix: str) -> None:
    more = {"n_averaged": torch.tensor(5), "criterion.weight": torch.ones(10), "epoch": 3}
    about = imported(tmp_path, {"state_dict": {**under(prefix, 1), **more}})
    assert about["entries not used"] == dict.fromkeys(sorted(more), 1)


def test_a_network_that_is_there_twice_must_be_named(tmp_path: Path) -> None:
    both = under("student.", 1) | under("teacher.", 2)
    imported(tmp_path / "a", both, key="student")
    with pytest.raises(FlownError, match=r"under 'student\.' and 'teacher\.'; name one with --key"):
        from_checkpoints(tmp_path / "a" / "source", DIGITS, TASK, tmp_path / "zoo")


class Config(dict):  # type: ignore[type-arg]
    """As configuration libraries have them: a dict with a state of its own."""


class Listed(list):  # type: ignore[type-arg]
    pass


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class whose module nobody else has."""
    module = types.ModuleType("theirs")
    made = type("Settings", (Config,), {"__module__": "theirs"})
    module.Settings = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "theirs", module)
    return made


def bookkeeping(gone: type) -> dict[str, Any]:
    settings = gone(rate=0.1)
    settings.parent = None
    return {
        "numpy scalar": np.float64(93.1),
        "numpy array": np.arange(3.0),
        "namespace": argparse.Namespace(rate=0.1, layers=[1, 2]),
        "settings": settings,
        "path": PurePosixPath("a/b"),
        "defaultdict": defaultdict(list, a=[1]),
        "function": torch.nn.functional.relu,
        "list": Listed([1]),
    }


NAMES = [
    *("numpy scalar", "numpy array", "namespace", "settings", "path", "defaultdict", "function"),
    "list",
]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_values_beside_weights_are_stood_in_for(
    tmp_path: Path, gone: type, name: str, zipped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = {"state_dict": state(1), "more": bookkeeping(gone)[name]}
    save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "theirs")
    opened = open_states(tmp_path / "a.pt")
    assert all(torch.equal(opened.states["state_dict"][k], v) for k, v in state(1).items())
    assert bool(opened.stand_ins) == (name != "function"), "one that is only named is not made"


def test_stand_ins_are_named(tmp_path: Path) -> None:
    about = imported(tmp_path, {"model": state(1), "args": argparse.Namespace(rate=0.1)})
    assert about["entries not used"] == {"argparse.Namespace": 1}


def test_a_stand_in_is_no_weight(source: Path) -> None:
    save({**state(2), "0.bias": argparse.Namespace()}, source / "other.pt")
    assert "expected a tensor" in reason(source).reason


class Touch:
    """What a hostile pickle does: calls something when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("how", ["torch", "old torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused(source: Path, how: str, protocol: int) -> None:
    touched = source.parent / "touched"
    hostile = {**state(2), "more": Touch(touched)}
    if how == "pickle":
        (source / "evil.pt").write_bytes(pickle.dumps(hostile["more"], protocol=protocol))
    else:
        save(
            hostile,
            source / "evil.pt",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=how == "torch",
        )
    skipped = reason(source)
    assert skipped.path == "evil.pt"
    assert "refused" in skipped.reason and f"'{os.system.__module__}.system'" in skipped.reason
    assert not touched.exists()
    pickle.loads(pickle.dumps(Touch(touched)))
    assert touched.exists(), "the pickle is hostile indeed"


def test_a_protocol_that_is_not_opened_safely_accuses_nobody(source: Path) -> None:
    save(state(2), source / "new.pt", pickle_protocol=4)
    assert "refused" not in (said := reason(source).reason) and "save it again" in said


def test_a_whole_module_is_refused_with_the_way_out(source: Path) -> None:
    save(nn.Linear(2, 2), source / "module.pth")
    assert "torch.nn.modules.linear.Linear" in reason(source).reason
    assert "save the state_dict() alone" in report(source.parent / "zoo")["skipped"][0]["reason"]
