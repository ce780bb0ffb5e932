"""What all benches share: timings in turn, rows, and their file."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flown.base.config import Config
from flown.base.provenance import Row, hardware, provenance, write_results
from flown.base.terminal import print_table, say


class BenchConfig(Config):
    """The settings of a bench."""

    what: str
    repeats: int
    model: str | None = None
    networks: int = 100
    device: str = "cpu"


def medians(candidates: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each candidate, run in turn so that the machine's drift affects all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()  # warm-up
    for _ in range(repeats):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation of repeated timings; None for one."""
    return statistics.stdev(values) if len(values) > 1 else None


def timed_rows(seconds: Mapping[str, list[float]], ours: str, n: int) -> list[Row]:
    """A row for each candidate, with its ratio to `ours`."""
    base = statistics.median(seconds[ours])
    rows: list[Row] = []
    for name, values in seconds.items():
        median = statistics.median(values)
        rows.append(
            {
                "dataset": None,
                "method": name,
                "metric": "seconds",
                "value": median,
                "std": spread(values),
                "n": n,
                "selection": f"median of {len(values)}",
                "epoch": None,
                "paper": None,
                "ratio": median / base,
            }
        )
    return rows


def show(rows: list[Row], console: Console, device: str = "cpu") -> None:
    """Prints the rows, and the machine that they were measured on."""
    body = [
        [
            row["method"],
            row.get("net") or row["dataset"] or "",
            row["metric"],
            f"{row['value']:.3f}" + ("" if row["std"] is None else f" ± {row['std']:.3f}"),
            f"{row['ratio']:.2f} x" if "ratio" in row else "",
        ]
        for row in rows
    ]
    print_table(console, "", (["what", "of", "metric", "value", "against ours"], body))
    machine = {key: value for key, value in hardware(device).items() if value is not None}
    say(console, ", ".join(f"{key} {value}" for key, value in machine.items()), "dim")


def write(path: Path, config: BenchConfig, seconds: float, rows: list[Row]) -> None:
    """Writes the rows with their provenance."""
    about: dict[str, Any] = provenance(config, {}, seconds, config.device)
    write_results(path, f"bench-{config.what}", "cpu", about, rows)
