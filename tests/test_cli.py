"""The command line: what it prints, writes and refuses, and with which exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import flown
from flown import cli
from flown.tasks import load
from tests import examples
from tests.conftest import DIGITS


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs the command line in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["flown", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Checks that a command ends with one clear message, exit code 2 and no traceback."""

    def check(message: str, *arguments: object) -> None:
        assert call(monkeypatch, *arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("flown: ") and message in said, said
        assert "Traceback" not in said and said.count("\n") <= 2, said

    return check


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of digits, one sub-folder a class, three images each."""
    train = load("digits").train
    for label in range(10):
        folder = tmp_path / "photos" / f"digit {label} é"
        folder.mkdir(parents=True)
        for i, image in enumerate(train.images[train.labels == label][:3]):
            Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_the_module_is_the_command() -> None:
    words = [sys.executable, "-m", "flown", "data", "show", "nothing"]
    done = subprocess.run(words, text=True, capture_output=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("flown: ")


def test_generate_and_evaluate(
    run: Path,
    zoo: flown.Zoo,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "nets.safetensors"
    common = ["generate", run / "model", "--support", photos, "-n", 6, "--steps", 10, "--out", out]
    assert call(monkeypatch, *common) == 0
    assert "NFE 10" in capsys.readouterr().out
    assert len(flown.WeightBatch.load(out)) == 6
    assert call(monkeypatch, "evaluate", out, "--data", "digits", "--zoo", zoo.path) == 0
    said = capsys.readouterr().out
    assert "all 6:" in said and "top 5 of 6 by validation" in said and "L2" in said
    assert call(monkeypatch, *common) == 2, "an output that exists is not replaced unasked"
    assert "--overwrite" in capsys.readouterr().err
    assert call(monkeypatch, *common, "--overwrite") == 0


def test_zoo_and_fit(
    tmp_path: Path,
    zoo: flown.Zoo,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: mine\ndataset: digits\nepochs: 1\nkeep: [1]\nbatch_size: 64\n")
    made = tmp_path / "zoo"
    assert call(monkeypatch, "zoo", "train", recipe, "--models", 4, "--out", made) == 0
    assert call(monkeypatch, "zoo", "inspect", made, "--verify") == 0
    assert "4 checkpoints read, all finite" in capsys.readouterr().out
    quick = ["--set", "encoder_training.steps=3", "--set", "flow_training.steps=3"]
    common = ["fit", "--zoo", made, *quick, "--set", "context.draws=1", "--out", tmp_path / "run"]
    assert call(monkeypatch, *common) == 0
    assert "held-out reconstructed" in capsys.readouterr().out
    assert list(flown.Flown.from_pretrained(tmp_path / "run" / "model").tasks) == ["digits"]


def test_a_fit_on_several_zoos_goes_on(
    zoo: flown.Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused
) -> None:
    other = flown.train_zoo(
        DIGITS.model_copy(update={"dataset": "parity", "epochs": 1, "keep": (1,)}),
        2,
        tmp_path / "parity",
        images=examples.images("parity"),
    )
    lone = flown.Zoo.join([zoo.select(epochs=(10,))], tmp_path / "digits")
    out = tmp_path / "run"
    capsys.readouterr()  # the training's progress
    command = ["fit", "--zoo", lone.path, "--zoo", other.path, "--out", out]
    refused("unknown dataset 'parity'", *command)
    assert (tmp_path / "run-zoo" / "zoo.json").exists() and not out.exists()
    refused("exists already", *command)
    refused("unknown dataset 'parity'", *command, "--resume")
    third = ["fit", "--zoo", other.path, "--zoo", lone.path, "--out", out, "--resume"]
    refused("run-zoo: holds a run with another joined", *third)


def test_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "data", "list") == 0
    assert "scikit-learn" in capsys.readouterr().out
    assert call(monkeypatch, "data", "show", "digits") == 0
    assert "test: 3" in capsys.readouterr().out


def test_unknown_names(refused, tmp_path: Path, run: Path) -> None:
    refused("Did you mean 'digits'", "data", "show", "digit")
    refused("Did you mean 'mnist-small'", "zoo", "train", "mnist-smal", "--out", tmp_path / "z")
    refused(
        "Did you mean 'flown-small'",
        "generate",
        "flown-smal",
        "--support",
        "digits",
        "--out",
        tmp_path / "a",
    )
    refused("No such command 'generat'", "generat")
    refused("No such option", "generate", "--sed", "1")
    refused(
        "Did you mean 'heun'",
        "generate",
        run / "model",
        "--support",
        "digits",
        "--solver",
        "huen",
        "--out",
        tmp_path / "a",
    )
    refused("choose auto, cpu, cuda", "demo", "--device", "tpu", "--out", tmp_path / "d")
    assert not list(tmp_path.iterdir())


def test_config_keys(refused, tmp_path: Path, zoo: flown.Zoo) -> None:
    refused(
        "Did you mean 'flow_training'",
        "fit",
        "--zoo",
        zoo.path,
        "--out",
        tmp_path / "r",
        "--set",
        "flow_trainin.steps=3",
    )
    (tmp_path / "c.yaml").write_text("velocity: {chanels: 3}\n")
    refused(
        "Did you mean 'channels'",
        "fit",
        tmp_path / "c.yaml",
        "--zoo",
        zoo.path,
        "--out",
        tmp_path / "r",
    )
    assert not (tmp_path / "r").exists()


def test_support_folders(refused, photos: Path, run: Path, tmp_path: Path) -> None:
    def generate(message: str) -> None:
        refused(message, "generate", run / "model", "--support", photos, "--out", tmp_path / "x")
        assert not (tmp_path / "x").exists()

    spoiled = photos / "digit 3 é" / "0.png"
    whole = spoiled.read_bytes()
    spoiled.write_bytes(whole[:40])
    generate("0.png")
    spoiled.write_bytes(whole)
    np.save(photos / "digit 3 é" / "nan.npy", np.full((8, 8), np.nan))
    generate("nan.npy")
    (photos / "digit 3 é" / "nan.npy").unlink()
    for file in (photos / "digit 4 é").iterdir():
        file.unlink()
    generate("digit 4 é")
    (photos / "digit 4 é").rmdir()
    generate("9 classes")


def test_weights_and_zoos(refused, tmp_path: Path, zoo: flown.Zoo, run: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    refused(
        "without flown's layout", "evaluate", tmp_path / "foreign.safetensors", "--data", "digits"
    )
    refused("no such file", "evaluate", tmp_path / "none", "--data", "digits")
    refused("zoo.json is missing", "zoo", "inspect", tmp_path)
    refused("zoo.json is missing", "fit", "--zoo", tmp_path, "--out", tmp_path / "r")
    refused(
        "Invalid value for '-n'",
        "generate",
        run / "model",
        "--support",
        "digits",
        "-n",
        0,
        "--out",
        tmp_path / "x",
    )
    refused(
        "config.json is missing",
        "generate",
        tmp_path,
        "--support",
        "digits",
        "--out",
        tmp_path / "x",
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign.safetensors"]


def test_interruption_is_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flown.zoo.train_zoo", interrupted)
    assert call(monkeypatch, "zoo", "train", "mnist-small", "--out", tmp_path / "z") == 130
    assert "--resume" in capsys.readouterr().err
