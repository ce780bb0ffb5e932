"""A zoo's shards as tasks of a Ray cluster: the same files as in one process, bit for bit.

The plan alone decides a shard's bits, so it may be trained anywhere, and again if a worker is lost.
Workers share no folder: each trains in its own and sends back its files; this process alone writes
the zoo.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from flown.base import trust
from flown.base.errors import FlownError, TrainingError
from flown.base.files import write_bytes
from flown.tasks import ImageData, ManyClass
from flown.weights.layout import WeightLayout
from flown.zoo.train.shard import Plan, Shard, index_file

RETRIES = 8  # of a shard whose worker was lost
_AHEAD = 2  # shards in flight a processor: enough to keep all busy, few enough to hold


def train_shards(
    plan: Plan,
    layout: WeightLayout,
    images: ImageData | ManyClass,
    out: Path,
    address: str,
    device: str,
    update: Callable[[int, str], None],
) -> None:
    """Trains the shards of a zoo that are not on disk yet.

    Args:
        address: `auto` starts a cluster on this machine; otherwise the address of a cluster.
        update: called with the number of finished shards and a note.

    Raises:
        FlownError: Ray is not installed, there is no cluster at the address, or a shard's worker was
            lost again and again.
        TrainingError: a network diverged.
    """
    missing = [i for i in range(len(plan.shards)) if not index_file(out, i).exists()]
    done = len(plan.shards) - len(missing)
    update(done, "")
    with _cluster(address) as ray:
        cpus = _processors(layout)
        given = {
            path.name: path.read_bytes()
            for path in out.glob("*.safetensors")
            if path.name.startswith(("base", "rest"))
        }
        shared = ray.put((plan, layout, images, given))
        task = ray.remote(num_cpus=cpus, num_gpus=float(device == "cuda"), max_retries=RETRIES)(
            _task
        )
        ahead = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)) // cpus)
        running: dict[Any, int] = {}
        while missing or running:
            while missing and len(running) < ahead:
                index = missing.pop(0)
                running[task.remote(shared, index, device, cpus)] = index
            (ready,), _ = ray.wait(list(running), num_returns=1)
            files, note = _result(ray, ready, running.pop(ready))
            for name, content in files.items():  # the index last: it means that all is there
                write_bytes(out / name, content)
            update(done := done + 1, note)


def _task(
    shared: tuple[Plan, WeightLayout, ImageData, dict[str, bytes]],
    index: int,
    device: str,
    threads: int,
) -> tuple[dict[str, bytes], str]:
    """Trains one shard; its files by name, the index last."""
    plan, layout, images, given = shared
    trust.allow(plan.recipe.net)  # as in the process that sent the plan
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for name, content in given.items():
            (out / name).write_bytes(content)
        shard = Shard(plan, layout, images, out, index, device)
        for _ in shard.epochs():
            pass
        return {path.name: path.read_bytes() for path in (shard.weights, shard.index)}, shard.note


def _processors(layout: WeightLayout) -> int:
    """One thread for compiled networks, as many as here for others, whose bits depend on it."""
    from flown.nets.batched.program import Program

    architecture = layout.architecture
    program = Program.of(architecture.build(), architecture.input_shape)
    return torch.get_num_threads() if program is None else 1


def _result(ray: Any, ready: Any, index: int) -> tuple[dict[str, bytes], str]:
    try:
        found: tuple[dict[str, bytes], str] = ray.get(ready)
        return found
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, FlownError):
            raise cause from None
        raise TrainingError(f"shard {index}: {error}") from None
    except ray.exceptions.RayError as error:
        raise FlownError(
            f"shard {index}: its worker was lost {RETRIES + 1} times ({type(error).__name__}); "
            "what is done is kept: add --resume"
        ) from None


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Any]:
    try:
        import ray
    except ImportError:
        raise FlownError("--ray: ray is missing; pip install 'flown[ray]'") from None
    begun = not ray.is_initialized()
    if begun:
        try:
            _check_reachable(address)
            where = "local" if address == "auto" else address
            ray.init(address=where, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise FlownError(f"--ray {address}: no cluster there ({error})") from None
    try:
        yield ray
    finally:
        if begun:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises OSError or ValueError if nobody answers; Ray itself tries for minutes."""
    if address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5):
            pass
