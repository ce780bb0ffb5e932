"""Lending torch's global generators: parameters and dropout draw from them, nothing else here does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, the global generators of the CPU and of `device` begin at `seed`; restored after.

    Without a seed they begin where they are.
    """
    device = torch.device(device)
    devices: list[int] = []
    if device.type == "cuda" and torch.cuda.is_available():
        devices = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed every GPU
            for index in devices:
                torch.cuda.default_generators[index].manual_seed(seed)
        yield
