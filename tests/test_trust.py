"""A file never names code: what a header says is not imported unless the user said so too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import flown
from flown.base import trust
from flown.base.errors import FlownError
from flown.base.files import load_tensors, read_json, save_tensors, write_json
from flown.heads.features import load_backbone

ROOT = Path(__file__).parents[1]


def rename_network(path: Path, net: str) -> None:
    """Makes a file of weights say that it is of another network."""
    tensors, header = load_tensors(path)
    layout = json.loads(header["layout"])
    layout["architecture"]["net"] = net
    save_tensors(path, tensors, header | {"layout": json.dumps(layout)})


def rename_networks(manifest: Path, net: str) -> None:
    """Makes a zoo's or a model's manifest say so."""
    content = read_json(manifest)
    for layout in content["layouts"]:
        layout["architecture"]["net"] = net
    write_json(manifest, content)


def command(arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The command line in `folder`, whose modules can be imported."""
    paths = os.pathsep.join((str(folder), str(ROOT)))
    return subprocess.run(
        [sys.executable, "-m", "flown", *arguments],
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def planted(tmp_path: Path, zoo: flown.Zoo, run: Path) -> Path:
    """A folder with weights, a zoo and a model, and a module that leaves a mark when imported."""
    (tmp_path / "planted.py").write_text(
        "from pathlib import Path\n"
        "from flown.nets.cnn import cnn_small\n"
        "Path(__file__).with_name('ran').touch()\n"
        "def net(channels, classes, activation):\n"
        "    return cnn_small(channels, classes, activation)\n"
    )
    shutil.copytree(zoo.path, tmp_path / "zoo")
    shutil.copytree(run / "model", tmp_path / "model")
    zoo.batch("digits").save(tmp_path / "nets.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["os:abort", "planted:net"])
@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        (("evaluate", "nets.safetensors", "--data", "digits"), "nets.safetensors"),
        (("zoo", "inspect", "zoo"), "zoo/zoo.json"),
        (
            ("generate", "model", "--support", "digits", "--out", "new.safetensors"),
            "model/config.json",
        ),
    ],
)
def test_a_file_does_not_name_code(
    planted: Path, name: str, arguments: Sequence[str], file: str
) -> None:
    if file == "nets.safetensors":
        rename_network(planted / file, name)
    else:
        rename_networks(planted / file, name)
    done = command(arguments, planted)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"flown: {file} names code, '{name}', and a file's word is not enough to run it; if you "
        f"trust it, add --trust {name}, or call flown.trust('{name}') in Python\n"
    )
    assert not (planted / "ran").exists()


def test_the_user_can_trust_it(planted: Path) -> None:
    rename_network(planted / "nets.safetensors", "planted:net")
    arguments = ("evaluate", "nets.safetensors", "--data", "digits", "--trust", "planted:net")
    done = command(arguments, planted)
    assert done.returncode == 0, done.stderr
    assert "test images" in done.stdout and (planted / "ran").exists()


def test_in_python_as_well(planted: Path) -> None:
    rename_network(planted / "nets.safetensors", "planted:net")
    with pytest.raises(FlownError, match=r"call flown\.trust\('planted:net'\)"):
        flown.WeightBatch.load(planted / "nets.safetensors")
    assert "planted" not in sys.modules


def test_a_name_that_nobody_allowed_is_not_imported() -> None:
    for build in (
        lambda: flown.nets.build("antigravity:fly", 1, 10, "tanh"),
        lambda: load_backbone("antigravity:fly"),
        lambda: trust.load_code("antigravity:fly", "reward"),
    ):
        with pytest.raises(FlownError, match="names code, 'antigravity:fly'"):
            build()
    assert "antigravity" not in sys.modules


def test_only_functions_can_be_named() -> None:
    assert flown.trust("flown.measure.novelty:mutual_iou") == "flown.measure.novelty:mutual_iou"
    found = trust.load_code("flown.measure.novelty:mutual_iou", "reward")
    assert found.__name__ == "mutual_iou"
    for name, message in (
        ("flown.nowhere:reward", "cannot be imported"),
        ("flown.version:__version__", "is str, expected a function"),
        (":x", "both parts are needed"),
        ("torch", "both parts are needed"),
    ):
        flown.trust(name)
        with pytest.raises(FlownError, match=message):
            trust.load_code(name, "reward")
