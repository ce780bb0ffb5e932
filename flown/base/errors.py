"""Errors a user can mend: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlownError(Exception):
    """Wrong input, usage or environment. The command line prints it alone and exits with `exit_code`."""

    exit_code = 2


class TrainingError(FlownError):
    """A run that went wrong through its own numbers: NaN, Inf, divergence."""

    exit_code = 1


class FlownWarning(UserWarning):
    """What a user should know and need not mend; the command line prints it as a line."""


_SHOWN = 100  # known names that a message lists


def unknown(kind: str, name: object, known: Iterable[str]) -> FlownError:
    """The error for a name that is not in `known`, with the nearest known one suggested."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    shown = ", ".join(names[:_SHOWN]) or "none"
    beyond = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return FlownError(f"unknown {kind} '{name}'.{hint} Known: {shown}{beyond}")
