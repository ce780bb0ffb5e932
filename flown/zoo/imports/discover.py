"""What lies in a folder of checkpoints: files with weights, which of them are one model, and the rest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from flown.base.errors import FlownError
from flown.base.files import walk
from flown.zoo.imports import statefiles

_NUMBER = re.compile(r"(?<![a-z])(epoch|ep|checkpoint|ckpt|step|iter)[-_=]?(\d+)", re.IGNORECASE)
_FIGURE = re.compile(r"\d+\.\d+(e[-+]?\d+)?", re.IGNORECASE)  # a loss, an accuracy


class Skipped(NamedTuple):
    """A file that was not imported: its path, relative to the imported folder, and the reason."""

    path: str
    reason: str


class Found(NamedTuple):
    """A checkpoint to be read. Accuracies are percent, None where unknown."""

    path: Path
    name: str  # the path, relative to the imported folder
    model: str  # the same for all checkpoints of a model
    epoch: int
    seed: int | None = None
    train_accuracy: float | None = None
    val_accuracy: float | None = None
    test_only: bool = False  # a test accuracy is known, a validation accuracy is not


class Discovered(NamedTuple):
    """Checkpoints in the order in which they are read, and names of all other files."""

    checkpoints: list[Found]
    others: list[str]


def discover(path: Path, pattern: re.Pattern[str] | None = None) -> Discovered:
    """Every state dict in a folder, the epochs of one model together, those models first.

    Args:
        pattern: as `compile_pattern` gives it; names of which it finds nothing are others.

    Raises:
        FlownError: no file of weights.
    """
    files = [file for _, _, files in walk(path) for file in files]
    parts: set[Path] = set()
    for file in files:
        if statefiles.is_index(file):
            try:
                parts |= {file.parent / part for part in statefiles.parts_of(file).values()}
            except FlownError:
                continue  # the error comes when the file is opened
    found: list[Found] = []
    others: list[str] = []
    for file in files:
        name = file.relative_to(path)
        if file in parts:
            continue
        told = _model(name, pattern) if statefiles.has_weights(file) and file.is_file() else None
        if told is None:
            others.append(name.as_posix())
        else:
            found.append(Found(file, name.as_posix(), *told))
    if not found:
        raise FlownError(f"{path}: {_nothing(others, pattern)}")
    if pattern is None:
        found = _figures_apart(found)
    sizes = Counter(one.model for one in found)
    # The first of two files with equal weights stays; an epoch of a model comes before a `best.pt`.
    found.sort(key=lambda one: (sizes[one.model] == 1, one.model, one.epoch, one.name))
    return Discovered(found, others)


def compile_pattern(text: str) -> re.Pattern[str]:
    """A regular expression of paths whose groups `model` and `epoch` say what a file is.

    Raises:
        FlownError: it is none, or has no group `model`.
    """
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise FlownError(f"pattern {text!r}: no regular expression ({error})") from None
    if "model" not in pattern.groupindex:
        raise FlownError(
            f"pattern {text!r}: names no model; put what a run's files share in (?P<model>...), and "
            "their numbers in (?P<epoch>...)"
        )
    return pattern


def _model(name: Path, pattern: re.Pattern[str] | None) -> tuple[str, int] | None:
    """A key of the file's model, and its epoch, by the rule of `from_checkpoints`."""
    if pattern is not None:
        match = pattern.search(name.as_posix())
        if match is None or match["model"] is None:
            return None
        epoch = match.groupdict().get("epoch") or "0"
        if not epoch.isdecimal() or len(epoch) > 15:
            raise FlownError(f"{name}: the pattern's epoch is {epoch!r}, expected a number")
        return match["model"], int(epoch)
    stem, folder = statefiles.stem(name), name.parent
    numbers = _NUMBER.findall(stem)
    if not numbers:
        numbers = _NUMBER.findall(folder.name)
        folder = folder.with_name(_NUMBER.sub("*", folder.name)) if numbers else folder
    epochs = [int(number) for kind, number in numbers if kind.lower() in ("epoch", "ep")]
    epochs += [int(number) for _, number in numbers]
    return (folder / _NUMBER.sub("*", stem)).as_posix(), epochs[0] if epochs else 0


def _figures_apart(found: list[Found]) -> list[Found]:
    """Takes figures out of models' keys, where each epoch of the model is then one file."""
    plain = [
        one._replace(model=_FIGURE.sub("*", one.model)) if "*" in one.model else one
        for one in found
    ]
    twice = Counter((one.model, one.epoch) for one in plain)
    clash = {model for (model, _), count in twice.items() if count > 1}
    return [one if new.model in clash else new for one, new in zip(found, plain, strict=True)]


def _nothing(others: Iterable[str], pattern: re.Pattern[str] | None) -> str:
    others = list(others)
    if pattern is not None and any(statefiles.has_weights(Path(name)) for name in others):
        return f"--pattern {pattern.pattern!r} finds nothing in its files' paths, as {others[0]!r}"
    said = f"no {', '.join(statefiles.SUFFIXES)} file in it"
    if any(re.search(r"(^|/)checkpoint_\d+/checkpoints$", name) for name in others):
        return f"{said}; these look like Model Zoos' trials: add --format modelzoos"
    if any(name.endswith("weights.npy") for name in others):
        return f"{said}; weights.npy looks like a zoo in one matrix: add --format matrix"
    return said
