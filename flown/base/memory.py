"""Work that cannot fit into memory is refused before it begins."""

from __future__ import annotations

import os

from flown.base.errors import FlownError


def check_fits(rows: int, numbers: int, what: str) -> None:
    """Refuses so many rows of so many float32 numbers, if the machine's memory holds less.

    Args:
        what: the rows, for the message: what there are too many of.

    Raises:
        FlownError: they need more than there is.
    """
    needed, there = 4 * rows * numbers, _memory()
    if there and needed > there:
        raise FlownError(
            f"{rows:,} {what} need at least {_gigabytes(needed)} of memory, this machine has "
            f"{_gigabytes(there)}; ask for fewer"
        )


def _memory() -> int:
    """Bytes of this machine's memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return 0


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:,.1f} GB"
