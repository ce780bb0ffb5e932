"""Functions that numba compiles and keeps between runs, until one that they call changes.

numba keeps what it compiled until the function's own file changes. Where functions of other files are
called, an upgrade would leave the old ones at work, so that what is kept stands under a digest of this
folder's files. Functions elsewhere call compiled functions of their own file and of this folder alone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit

_FILES = sorted(Path(__file__).parent.glob("*.py"))
_DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in _FILES)).hexdigest()[:16]


def compiled(function: Callable[..., Any]) -> Any:
    """The function, compiled when it is called; sums may be reordered, NaN and Inf stay what they are."""
    before = config.CACHE_DIR  # type: ignore[attr-defined]
    beside = Path(function.__code__.co_filename).parent
    folder = Path("~/.cache/numba").expanduser()
    if before:
        folder = Path(before)
    elif os.access(beside, os.W_OK):
        folder = beside / "__pycache__"
    config.CACHE_DIR = str(folder / f"flown-{_DIGEST}")  # type: ignore[attr-defined]
    try:
        return njit(
            nogil=True,
            cache=True,
            error_model="numpy",
            fastmath={"contract", "reassoc", "nsz"},
        )(function)
    finally:
        config.CACHE_DIR = before  # type: ignore[attr-defined]
