"""Killed at random moments, training resumes to the bits of an uninterrupted run.

Real processes, really killed (SIGKILL): in the short form a moment after a checkpoint was written, two
times for a zoo and for a fit; in the long one at any moment, twenty times for a zoo, ten times each
for encoder and flow, six times for an experiment. Between kills, every file that is there must be readable.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flown

ZOO = """
import sys, flown
from flown.zoo import Recipe
epochs = {epochs}
recipe = Recipe(
    name="k", dataset="digits", learning_rate=1e-3, batch_size=16, epochs=epochs, keep=(6, epochs))
flown.train_zoo(recipe, {networks}, sys.argv[1], resume=True)
"""

FIT = """
import sys, flown
from flown.generator.config import FlownConfig
from flown.context.tokens import ContextConfig
from flown.flow import VelocityConfig
from flown.training import TrainConfig
config = FlownConfig(
    encoder_training=TrainConfig(steps={encoder}, batch_size=16, checkpoint_every=20, validate_every=200),
    velocity=VelocityConfig(channels=16, blocks=1), context=ContextConfig(draws=1),
    flow_training=TrainConfig(steps={flow}, batch_size=16, checkpoint_every=20))
flown.Flown.fit(flown.Zoo.open(sys.argv[2]), config, out=sys.argv[1], resume=True)
"""

REPRODUCE = """
import sys
from flown.cli import main
sys.argv = ["flown", "reproduce", "trajectory", "--scale", "smoke", "--out", sys.argv[1], "--resume"]
main()
"""


def fill(script: str, **sizes: int) -> str:
    """A script with its sizes in place."""
    for name, size in sizes.items():
        script = script.replace(f"{{{name}}}", str(size))
    return script


def start(script: str, *arguments: Path) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], env=env, stderr=subprocess.DEVNULL
    )


def stamps(folder: Path) -> set[tuple[Path, int]]:
    """The checkpoints that are in a folder, and when each was written."""
    found = set()
    for path in folder.rglob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # it was renamed, or its training has ended
            if not path.name.startswith("."):
                found.add((path, path.stat().st_mtime_ns))
    return found


def kill_after(process: subprocess.Popen[bytes], folder: Path, writes: int, delay: float) -> None:
    """Kills a process some seconds after it has written so many checkpoints more."""
    known, written = stamps(folder), 0
    while written < writes:
        assert process.poll() is None, "done before the kill"
        now = stamps(folder)
        written, known = written + len(now - known), now
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "done before the kill"


def readable(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.name.startswith("."):
            continue  # a scratch file that the kill left behind, never read by anyone
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().splitlines()]


def survives(script: str, whole: Path, killed: Path, *more: Path, times: int = 10) -> None:
    """Runs the script whole, then killed at random moments of its training and resumed."""
    begun = time.monotonic()
    assert start(script, whole, *more).wait() == 0
    duration = time.monotonic() - begun
    begun = time.monotonic()
    assert start(script, whole, *more).wait() == 0
    startup = time.monotonic() - begun  # a finished run has nothing left but to start
    chance = random.Random(0)
    kills = 0
    for _ in range(times):
        process = start(script, killed, *more)
        try:
            assert process.wait(startup + chance.uniform(0, 1 / times) * (duration - startup)) == 0
            break  # done before the kill
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            readable(killed)
    assert kills == times
    assert start(script, killed, *more).wait() == 0


def same_zoos(folder: Path) -> None:
    one, two = (flown.Zoo.open(folder / name) for name in ("whole", "killed"))
    assert torch.equal(one.batch("digits").vectors, two.batch("digits").vectors)
    assert one.rows == two.rows


def same_models(folder: Path) -> None:
    one, two = (
        flown.Flown.from_pretrained(folder / name / "model").state_dict()
        for name in ("whole", "killed")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small zoo trained at once, and of the same zoo killed twice."""
    folder, script = tmp_path_factory.mktemp("zoos"), fill(ZOO, epochs=12, networks=4)
    assert start(script, folder / "whole").wait() == 0
    for writes in (2, 4):
        kill_after(start(script, folder / "killed"), folder / "killed", writes, 0.01)
        readable(folder / "killed")
    assert start(script, folder / "killed").wait() == 0
    return folder


def test_a_zoo_killed_twice(zoos: Path) -> None:
    same_zoos(zoos)


def test_a_fit_killed_in_encoder_and_flow(zoos: Path, tmp_path: Path) -> None:
    """Two checkpoints are written of the encoder, four of the flow."""
    script = fill(FIT, encoder=40, flow=80)
    assert start(script, tmp_path / "whole", zoos / "whole").wait() == 0
    for writes in (1, 3):
        process = start(script, tmp_path / "killed", zoos / "whole")
        kill_after(process, tmp_path / "killed", writes, 0.01)
        readable(tmp_path / "killed")
    assert start(script, tmp_path / "killed", zoos / "whole").wait() == 0
    same_models(tmp_path)


@pytest.mark.slow
def test_zoo(tmp_path: Path) -> None:
    script = fill(ZOO, epochs=120, networks=20)
    survives(script, tmp_path / "whole", tmp_path / "killed", times=20)
    same_zoos(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "flow"), [(1500, 1), (1, 2500)], ids=["encoder", "flow"])
def test_fit(tmp_path: Path, zoo: flown.Zoo, encoder: int, flow: int) -> None:
    script = fill(FIT, encoder=encoder, flow=flow)
    survives(script, tmp_path / "whole", tmp_path / "killed", zoo.path)
    same_models(tmp_path)


@pytest.mark.slow
def test_an_experiment(tmp_path: Path) -> None:
    survives(REPRODUCE, tmp_path / "whole", tmp_path / "killed", times=6)
    whole, killed = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "killed")
    )
    assert whole["rows"] == killed["rows"]
