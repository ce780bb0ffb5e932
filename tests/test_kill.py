"""Killed at random moments, training resumes to the bits of an uninterrupted run.

Real processes, really killed (SIGKILL), twenty times for a zoo, ten times each for encoder and flow.
Between kills, every file that is there must be readable.
"""

from __future__ import annotations

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
recipe = Recipe(name="k", dataset="digits", learning_rate=1e-3, batch_size=16, epochs=120, keep=(6, 120))
flown.train_zoo(recipe, 20, sys.argv[1], resume=True)
"""

FIT = """
import sys, flown
from flown.generator.fit import ContextConfig, FlownConfig
from flown.flow import VelocityConfig
from flown.training import TrainConfig
config = FlownConfig(
    encoder_training=TrainConfig(steps={encoder}, batch_size=16, checkpoint_every=20, validate_every=200),
    velocity=VelocityConfig(channels=16, blocks=1), context=ContextConfig(draws=2),
    flow_training=TrainConfig(steps={flow}, batch_size=16, checkpoint_every=20))
flown.Flown.fit(flown.Zoo.open(sys.argv[2]), config, out=sys.argv[1], resume=True)
"""


def start(script: str, *arguments: Path) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], env=env, stderr=subprocess.DEVNULL
    )


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


@pytest.mark.slow
def test_zoo(tmp_path: Path) -> None:
    survives(ZOO, tmp_path / "whole", tmp_path / "killed", times=20)
    one, two = (flown.Zoo.open(tmp_path / name) for name in ("whole", "killed"))
    assert torch.equal(one.batch("digits").vectors, two.batch("digits").vectors)
    assert one.rows == two.rows


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "flow"), [(1500, 1), (1, 2500)], ids=["encoder", "flow"])
def test_fit(tmp_path: Path, zoo: flown.Zoo, encoder: int, flow: int) -> None:
    script = FIT.replace("{encoder}", str(encoder)).replace("{flow}", str(flow))
    survives(script, tmp_path / "whole", tmp_path / "killed", zoo.path)
    one, two = (
        flown.Flown.from_pretrained(tmp_path / name / "model").state_dict()
        for name in ("whole", "killed")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
