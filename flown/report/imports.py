"""What an import did and did not use, in a few lines; all of it stands in `import.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_LISTED = 5
_NEIGHBOURS = (
    "warning: held-out networks lie far nearer to training ones than these lie to each other, as "
    "epochs of one run do; nothing measured on them is about new networks. Say which files are one "
    "model: --pattern '(?P<model>run[0-9]+)/(?P<epoch>[0-9]+)'"
)


def import_lines(about: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal from the content of `import.json`."""
    lines = [f"skipped {one['path']}: {one['reason']}" for one in about["skipped"][: 2 * _LISTED]]
    if (more := len(about["skipped"]) - len(lines)) > 0:
        lines.append(f"and {more} more that were skipped")
    for what in ("weights taken from", "entries not used"):
        if about[what]:
            counted = [f"{name} ({_files(count)})" for name, count in about[what].items()]
            lines.append(f"{what}: {_some(counted)}")
    if others := about["files not used"]:
        lines.append(f"{_files(len(others))} not used: {_some(others)}")
    if about["held-out networks are neighbours"]:
        lines.append(_NEIGHBOURS)
    return lines


def _files(count: int) -> str:
    return f"{count:,} file{'s' if count != 1 else ''}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more:,} more" if more > 0 else "")
