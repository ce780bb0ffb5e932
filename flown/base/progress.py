"""Progress on long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flown.base.text import plain

_LOG_EVERY = 20.0  # seconds


@contextlib.contextmanager
def bar(label: str, total: int, start: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Yields `update(done, note)`; written to stderr so that results can be piped."""
    console, label = Console(file=sys.stderr), plain(label)
    if not console.is_terminal:
        yield _logger(label, total)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total, completed=start, note="")

        def update(done: int, note: str = "") -> None:
            progress.update(task, completed=done, note=plain(note))

        yield update


def _logger(label: str, total: int) -> Callable[[int, str], None]:
    last = time.monotonic()

    def update(done: int, note: str = "") -> None:
        nonlocal last
        if done < total and time.monotonic() - last < _LOG_EVERY:
            return
        last = time.monotonic()
        print(f"{label}: {done}/{total} {plain(note)}".rstrip(), file=sys.stderr, flush=True)

    return update
