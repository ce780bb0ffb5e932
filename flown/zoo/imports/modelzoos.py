"""Model Zoos on disk: Ray Tune's trial folders (Schürholt et al. 2022, 2209.14764).

    <zoo>/NN_tune_zoo_.../<trial>/params.json                  the trial's configuration
                                  result.json                  a JSON object a line, one an epoch
                                  checkpoint_000012/checkpoints    a state dict; also checkpoint_12

Accuracies in `result.json` are fractions; `training_iteration` is the checkpoint's number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flown.base.errors import FlownError
from flown.base.files import parse_json, read_json, walk
from flown.zoo.imports.discover import Found, Skipped

PREFIX = "module_list."  # before every tensor's name
_FOLDER = re.compile(r"checkpoint_(\d+)")


def trials(
    path: Path, activation: str, epochs: Sequence[int] | None
) -> tuple[list[Found], list[Skipped], list[str]]:
    """Every checkpoint of every trial below a folder, the unusable ones, and notes on the others.

    Raises:
        FlownError: no trial.
    """
    folders: set[Path] = set()
    for here, _, files in walk(path):
        if here.name.startswith("checkpoint_"):
            folders.add(here.parent)
        if any(file.name in ("params.json", "result.json") for file in files):
            folders.add(here)
    if not folders:
        raise FlownError(
            f"{path}: no trial of Model Zoos in it (a folder with params.json, result.json and "
            "checkpoint_000012/checkpoints)"
        )
    found: list[Found] = []
    skipped: list[Skipped] = []
    notes: list[str] = []
    for folder in sorted(folders):
        try:
            found += _trial(path, folder, activation, epochs, skipped, notes)
        except FlownError as error:
            skipped.append(Skipped(folder.relative_to(path).as_posix(), str(error)))
    return found, skipped, notes


def _trial(
    root: Path,
    folder: Path,
    activation: str,
    epochs: Sequence[int] | None,
    skipped: list[Skipped],
    notes: list[str],
) -> list[Found]:
    name = folder.relative_to(root).as_posix()
    params = _params(folder / "params.json", name, notes)
    stated = params.get("model::nlin")
    if isinstance(stated, str) and _plain(stated) != _plain(activation):
        raise FlownError(f"its activation is {stated!r}, '{activation}' was given")
    seed = params.get("seed")
    files = _files(root, folder, skipped)
    if epochs is not None:
        for epoch in sorted(set(epochs) - set(files)):
            skipped.append(Skipped(name, f"has no checkpoint of epoch {epoch}"))
        files = {epoch: file for epoch, file in files.items() if epoch in epochs}
    elif not files:
        raise FlownError("has no checkpoint")
    results = _results(folder / "result.json", name, notes)
    found = []
    for epoch, file in sorted(files.items()):
        result = results.get(epoch, {})
        val = _percent(result, "validation_acc", "val_acc")
        found.append(
            Found(
                path=file,
                name=file.relative_to(root).as_posix(),
                model=name,
                epoch=epoch,
                seed=seed if type(seed) is int else None,
                train_accuracy=_percent(result, "train_acc"),
                val_accuracy=val,
                test_only=val is None and "test_acc" in result,
            )
        )
    return found


def _plain(activation: str) -> str:
    """Theirs is `leakyrelu`, ours `leaky-relu`."""
    return re.sub("[-_]", "", activation).lower()


def _files(root: Path, folder: Path, skipped: list[Skipped]) -> dict[int, Path]:
    """A trial's checkpoints by epoch."""
    files: dict[int, Path] = {}
    for place in sorted(folder.iterdir()):
        number = _FOLDER.fullmatch(place.name)
        if number is None:
            continue
        file, epoch, reason = place / "checkpoints", int(number[1]), ""
        if not file.is_file():
            reason = "holds no file `checkpoints`"
        elif epoch in files:
            reason = f"the same epoch as {files[epoch].parent.name}"
        if reason:
            skipped.append(Skipped(place.relative_to(root).as_posix(), reason))
        else:
            files[epoch] = file
    return files


def _params(path: Path, name: str, notes: list[str]) -> dict[str, Any]:
    try:
        params = read_json(path)
    except FlownError:
        params = None
    if not isinstance(params, dict):
        notes.append(f"{name}: no readable params.json; activation and seed are taken on trust")
        return {}
    return params


def _results(path: Path, name: str, notes: list[str]) -> dict[int, dict[str, Any]]:
    """A trial's results by epoch; the last where a restarted trial has two for one epoch."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        notes.append(f"{name}: no readable result.json; accuracies are unknown")
        return {}
    results: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        try:
            result = parse_json(line, path)
            results[int(result["training_iteration"])] = result
        except (FlownError, ValueError, TypeError, KeyError, OverflowError):
            if line.strip():  # a killed trial ends in half a line
                notes.append(f"{name}: result.json, line {number}: not a result")
    return results


def _percent(result: dict[str, Any], *keys: str) -> float | None:
    """The first fraction that is present and not NaN, in percent."""
    for key in keys:
        value = result.get(key)
        if isinstance(value, int | float) and type(value) is not bool and 0 <= value <= 1:
            return round(100 * value, 3)
    return None
