"""The index of a zoo: one row a checkpoint, one JSON object a line."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from flown.base.errors import FlownError
from flown.base.files import write_text

_BLOCK = 4096  # lines parsed together


class Row(NamedTuple):
    """One checkpoint of a network for `task`, an id of the zoo's table.

    Accuracies are percent, None where unknown; `split` is `train` or `held-out`; `layout` the place of
    its layout among the zoo's.
    """

    task: str
    model: int
    seed: int
    epoch: float
    step: int
    split: str
    train_accuracy: float | None
    val_accuracy: float | None
    shard: str
    offset: int
    layout: int = 0
    checksum: int | None = None  # CRC-32 of the weight vector; zoos before 0.2 have none
    grid: dict[str, Any] | None = None  # the settings that the recipe's grid gave this network


def checksum(vector: Tensor) -> int:
    """CRC-32 of a weight vector (D,) in float32."""
    return zlib.crc32(vector.detach().float().cpu().contiguous().numpy().data)


def read_rows(path: Path) -> list[Row]:
    """Reads an index, one JSON object a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FlownError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for start in range(0, len(lines), _BLOCK):  # many at once: four times as fast as one by one
        block = lines[start : start + _BLOCK]
        try:
            rows += [_row(**values) for values in json.loads(f"[{','.join(block)}]")]
        except (ValueError, TypeError):
            raise FlownError(f"{path}, {_fault(block, start)}") from None
    return rows


def _row(task: str, split: str, shard: str, **values: Any) -> Row:
    # A hundred thousand rows share these strings.
    return Row(task=sys.intern(task), split=sys.intern(split), shard=sys.intern(shard), **values)


def _fault(lines: Sequence[str], before: int) -> str:
    """The number of the first line that is no row; `before` lines precede these."""
    for number, line in enumerate(lines, before + 1):
        try:
            _row(**json.loads(line))
        except (ValueError, TypeError) as error:
            return f"line {number}: not an index row ({error})"
    return f"lines {before + 1} to {before + len(lines)}: not index rows, one a line"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    write_text(path, "".join(json.dumps(row._asdict()) + "\n" for row in rows))
