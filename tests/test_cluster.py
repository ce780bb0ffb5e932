"""A zoo trained on a real Ray cluster is the one trained here; a lost worker costs its shard."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flown.base.errors import FlownError, TrainingError
from flown.zoo import Recipe, Zoo
from flown.zoo.train.train import train_zoo

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

RECIPE = Recipe(
    name="r", dataset="digits", learning_rate=1e-3, batch_size=32, epochs=4, keep=(2, 4)
)
MODELS = 40  # three shards


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A head and a second node, one processor each."""
    pytest.importorskip("ray")
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    start = [*ray, "start", "--num-cpus=1", "--disable-usage-stats"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = [*start, "--head", f"--port={port}", "--include-dashboard=false"]
    for command in (head, [*start, f"--address=127.0.0.1:{port}"]):
        subprocess.run(command, check=True, env=env, capture_output=True)
    yield f"127.0.0.1:{port}"
    subprocess.run([*ray, "stop", "--force"], check=False, capture_output=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return train_zoo(RECIPE, MODELS, tmp_path_factory.mktemp("alone") / "zoo")


def files(zoo: Zoo) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(zoo.path.iterdir())}


def test_same_files_from_a_cluster(alone: Zoo, address: str, tmp_path: Path) -> None:
    import ray

    ray.init(address=address, log_to_driver=False)
    assert len(ray.nodes()) == 2, "two workers"
    ray.shutdown()
    assert files(train_zoo(RECIPE, MODELS, tmp_path / "zoo", ray=address)) == files(alone)


def _workers() -> list[int]:
    """Processes that are training a shard: Ray names them after their task."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_task"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_a_killed_worker_costs_its_shard(alone: Zoo, address: str, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        for _ in range(2000):
            if workers := _workers():
                time.sleep(0.3)  # into its training
                os.kill(workers[0], signal.SIGKILL)
                killed.append(workers[0])
                return
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one)
    thread.start()
    made = train_zoo(RECIPE, MODELS, tmp_path / "zoo", ray=address)
    thread.join()
    assert killed, "no worker was killed"
    assert files(made) == files(alone)


def test_divergence_is_told_as_it_is_here(address: str, tmp_path: Path) -> None:
    wild = RECIPE.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(TrainingError, match=r"seed \d+ diverged in epoch 1"):
        train_zoo(wild, 2, tmp_path / "zoo", ray=address)


def test_what_was_done_is_kept(alone: Zoo, address: str, tmp_path: Path) -> None:
    """A zoo begun here goes on over there."""

    class Stop(Exception):
        pass

    from flown.zoo.train.shard import Shard

    finish, done = Shard._finish, []

    def once(self: Shard, kept: object) -> None:
        if done:
            raise Stop
        finish(self, kept)  # type: ignore[arg-type]
        done.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shard, "_finish", once)
        with pytest.raises(Stop):
            train_zoo(RECIPE, MODELS, tmp_path / "zoo")
    assert files(train_zoo(RECIPE, MODELS, tmp_path / "zoo", ray=address, resume=True)) == files(
        alone
    )


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_no_cluster_is_said(address: str, tmp_path: Path) -> None:
    with pytest.raises(FlownError, match=rf"--ray {address}: no cluster there"):
        train_zoo(RECIPE, MODELS, tmp_path / "zoo", ray=address)
