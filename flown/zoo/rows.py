"""The index of a zoo: one row a checkpoint, one JSON object a line."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Optional

from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from flown.base.errors import FlownError
from flown.base.files import read_text, write_text

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
    train_accuracy: Optional[float]
    val_accuracy: Optional[float]
    shard: Annotated[
        str, Field(pattern=r"^[\w.-]+\.safetensors$")
    ]  # in the zoo's folder, nowhere else
    offset: Annotated[int, Field(ge=0, lt=2**63)]
    layout: Annotated[int, Field(ge=0)] = 0
    checksum: Optional[int] = None  # CRC-32 of the weight vector; zoos before 0.2 have none
    grid: Optional[dict[str, Any]] = None  # the settings that the recipe's grid gave this network


_ROWS = TypeAdapter(list[Row])


def checksum(vector: Tensor) -> int:
    """CRC-32 of a weight vector (D,) in float32."""
    return zlib.crc32(vector.detach().float().cpu().contiguous().numpy().data)


def read_rows(path: Path) -> list[Row]:
    """Reads an index, one JSON object a line.

    Raises:
        FlownError: a line that is no row (it is named).
    """
    lines = read_text(path).splitlines()
    rows: list[Row] = []
    for start in range(0, len(lines), _BLOCK):  # many at once: four times as fast as one by one
        block = lines[start : start + _BLOCK]
        try:
            found = _ROWS.validate_json(f"[{','.join(block)}]")
        except ValidationError:
            raise FlownError(f"{path}, {_fault(block, start)}") from None
        rows += map(_sharing, found)
    return rows


def _sharing(row: Row) -> Row:
    # A hundred thousand rows share these strings.
    intern = sys.intern
    return row._replace(task=intern(row.task), split=intern(row.split), shard=intern(row.shard))


def _fault(lines: Sequence[str], before: int) -> str:
    """The number of the first line that is no row; `before` lines precede these."""
    for number, line in enumerate(lines, before + 1):
        try:
            _ROWS.validate_json(f"[{line}]")
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"][1:])
            return f"line {number}: not an index row ({key + ': ' if key else ''}{first['msg']})"
    return f"lines {before + 1} to {before + len(lines)}: not index rows, one a line"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    write_text(path, "".join(json.dumps(row._asdict()) + "\n" for row in rows))
