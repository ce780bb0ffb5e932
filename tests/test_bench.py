"""The bench of sampling in small: its rows, and that all candidates sample the same flow."""

from __future__ import annotations

from importlib import import_module

import pytest

from flown.flow import Solution
from tests.examples import images

bench = import_module("flown.bench.sample")  # its package has a function of this name


def test_the_bench_of_sampling_times_the_models_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data sets are not here: digits stand in for each."""
    digits = images("digits")
    monkeypatch.setattr(bench.data, "load", lambda name: digits)
    monkeypatch.setattr(bench, "denoise", lambda net, x0, generator: Solution(x0, 0, x0, None))
    rows = bench.sample("flown-small", 1, networks=3)
    timed = [row for row in rows if row["metric"] == "seconds"]
    assert [row["method"] for row in timed] == [
        "flown-euler-100",
        "flown-euler-4",
        "flown-euler-1",
        "torchdiffeq-euler-100",
        "ddpm-1000",
    ]
    assert timed[0]["ratio"] == 1 and all(row["value"] > 0 for row in timed)
    measured = [row for row in rows if row["metric"] == "accuracy"]
    assert len(measured) == 4 * len(bench.STEPS)
    assert all(0 <= row["value"] <= 100 and row["n"] == 3 for row in measured)
