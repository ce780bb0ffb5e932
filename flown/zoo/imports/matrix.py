"""A zoo as one matrix: a row of numbers a network, and a table of where each tensor lies in it.

    weights.npy        (networks, D)
    layout.csv         varname, start_idx, end_idx, shape: "(8, 1, 5, 5)"
    metrics.csv[.gz]   optional, a line a network: modelid, step, train_accuracy, val_accuracy, ...

Unterthiner et al. (2002.11448) publish theirs so. Accuracies are fractions; `test_accuracy` is not taken.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flown.base.errors import FlownError
from flown.zoo.imports.discover import Found
from flown.zoo.imports.statefiles import Opened

WEIGHTS = "weights.npy"
_TRAIN, _VAL = ("train_accuracy", "train_acc"), ("val_accuracy", "validation_accuracy", "val_acc")


class _Slot(NamedTuple):
    name: str
    start: int
    end: int
    shape: tuple[int, ...]


def rows_of(path: Path) -> tuple[list[Found], Callable[[Found], Opened]]:
    """The networks of a folder, and how one of them is read.

    Raises:
        FlownError: a file is missing or damaged, or they do not fit together.
    """
    try:
        matrix = np.load(path / WEIGHTS, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python: errors of many types
        raise FlownError(f"{path / WEIGHTS}: cannot be read ({error})") from None
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise FlownError(
            f"{path / WEIGHTS}: {matrix.dtype} {matrix.shape}, expected floats (networks, D)"
        )
    slots = _slots(path / "layout.csv", matrix.shape[1])
    metrics = next(
        (path / x for x in ("metrics.csv", "metrics.csv.gz") if (path / x).is_file()), None
    )
    known = _table(metrics) if metrics else [{} for _ in matrix]
    if len(known) != len(matrix):
        raise FlownError(f"{metrics}: {len(known)} lines for {len(matrix)} networks")

    def read(found: Found) -> Opened:
        row = torch.from_numpy(np.array(matrix[int(found.name.rpartition("[")[2][:-1])]))
        state: dict[str, Any] = {s.name: row[s.start : s.end].view(s.shape) for s in slots}
        return Opened({"": state}, ())

    return [_found(path / WEIGHTS, i, line) for i, line in enumerate(known)], read


def _found(path: Path, row: int, line: dict[str, str]) -> Found:
    val = _percent(line, _VAL)
    return Found(
        path=path,
        name=f"{path.name}[{row}]",
        model=line.get("modelid") or str(row),
        epoch=int(step) if (step := line.get("step", "").partition(".")[0]).isdecimal() else 0,
        train_accuracy=_percent(line, _TRAIN),
        val_accuracy=val,
        test_only=val is None and "test_accuracy" in line,
    )


def _slots(path: Path, width: int) -> list[_Slot]:
    found = []
    for number, line in enumerate(_table(path), 2):
        try:
            start, end = int(line["start_idx"]), int(line["end_idx"])
            shape = tuple(int(n) for n in re.findall(r"\d+", line["shape"]))
            name = line["varname"]
        except (KeyError, ValueError):
            raise FlownError(
                f"{path}, line {number}: expected varname, start_idx, end_idx, shape, got "
                f"{', '.join(line)}"
            ) from None
        if not 0 <= start <= end <= width or math.prod(shape) != end - start:
            raise FlownError(
                f"{path}, line {number}: '{name}' {shape} does not lie at {start} to {end} of {width} "
                "numbers"
            )
        found.append(_Slot(name, start, end, shape))
    return found


def _table(path: Path) -> list[dict[str, str]]:
    """The lines of a table by the names of its columns."""
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        lines = csv.DictReader(io.StringIO(text.decode("utf-8-sig")), restkey="", restval="")
        return [{k: v for k, v in line.items() if k} for line in lines]
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise FlownError(f"{path}: cannot be read ({error})") from None


def _percent(line: dict[str, str], names: tuple[str, ...]) -> float | None:
    for name in names:
        try:
            value = float(line.get(name, ""))
        except ValueError:
            continue
        if 0 <= value <= 1:
            return round(100 * value, 3)
    return None
