"""The index of a zoo: one row a checkpoint, one JSON object a line."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from flown.errors import FlownError
from flown.files import write_text


class Row(NamedTuple):
    """One checkpoint. Accuracies are percent, None where unknown; `split` is `train` or `held-out`."""

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
    checksum: int | None = None  # CRC-32 of the weight vector; zoos before 0.2 have none
    grid: dict[str, Any] | None = None  # what the recipe's grid gave this network


def checksum(vector: Tensor) -> int:
    """CRC-32 of a weight vector (D,) in float32."""
    return zlib.crc32(vector.detach().float().cpu().contiguous().numpy().data)


def read_rows(path: Path) -> list[Row]:
    """Reads an index, one JSON object a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FlownError(f"{path}: cannot be read ({error.strerror})") from None
    try:  # at once: a hundred thousand lines in half a second
        return [Row(**row) for row in json.loads(f"[{','.join(lines)}]")]
    except (ValueError, TypeError):
        for number, line in enumerate(lines, 1):
            try:
                Row(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise FlownError(f"{path}, line {number}: not an index row ({error})") from None
        raise


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    write_text(path, "".join(json.dumps(row._asdict()) + "\n" for row in rows))
