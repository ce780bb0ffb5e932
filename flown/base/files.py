"""Files that appear whole or not at all: written beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flown.base.errors import FlownError

_LITTER = {  # of archives, file servers and systems, in lower case
    *("__macosx", "@eadir", "lost+found", "#recycle", "$recycle.bin", "thumbs.db", "desktop.ini"),
    "system volume information",
}
_LONGEST = 2**30  # bytes of a text


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path; on success it becomes `path`, on failure it is removed.

    Raises:
        FlownError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    path = Path(path)
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        scratch = Path(name)
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        scratch.chmod(0o644)
        scratch.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FlownError(f"{path}: cannot be written ({reason}); nothing was changed") from None
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def write_bytes(path: Path | str, content: bytes) -> None:
    """Writes a file whole."""
    with replacing(path) as scratch:
        scratch.write_bytes(content)


def write_text(path: Path | str, text: str) -> None:
    """Writes a text file whole; bytes of a file's name that are no text are written out."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path | str, value: Any) -> None:
    """Writes a JSON file whole; NaN is refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def save_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file whole."""
    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with replacing(path) as scratch:
        # None rather than {}: without tensors, safetensors cannot read back its own empty metadata.
        save_file(whole, scratch, metadata=dict(metadata or {}) or None)


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file: tensors by name and the header's metadata.

    Raises:
        FlownError: the file is missing, truncated, or no safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise FlownError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FlownError(f"{path}: truncated or no safetensors file ({error})") from None


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floats in half precision, for shipping: half the size; loading widens them again."""
    return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Fills a module with all its tensors.

    Raises:
        FlownError: one is missing, too many or of another shape; the message names it and `path`.
    """
    own = module.state_dict()
    if differing := sorted(set(own) ^ set(tensors)):
        fault = "is missing" if differing[0] in own else "is unexpected"
        raise FlownError(f"{path}: tensor '{differing[0]}' {fault}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            got, want = tuple(tensor.shape), tuple(own[name].shape)
            raise FlownError(f"{path}: tensor '{name}' is {got}, expected {want}")
    module.load_state_dict(tensors)


def read_text(path: Path | str) -> str:
    """Reads a text file.

    Raises:
        FlownError: it is missing, larger than a gigabyte, or no text.
    """
    try:
        if Path(path).stat().st_size > _LONGEST:
            raise FlownError(f"{path}: larger than a gigabyte, which no text of ours is")
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise FlownError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise FlownError(
            f"{path}: no text in UTF-8 ({error.reason} at byte {error.start})"
        ) from None


def parse_json(text: str, where: Path | str) -> Any:
    """A JSON value.

    Raises:
        FlownError: it is none, or nested beyond all measure.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise FlownError(f"{where}: no valid JSON ({error})") from None
    except RecursionError:
        raise FlownError(f"{where}: no valid JSON (nested too deeply)") from None


def read_object(path: Path | str) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        FlownError: as `read_json`, or it holds something else.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise FlownError(f"{path}: expected an object, got {type(found).__name__}")
    return found


def read_json(path: Path | str) -> Any:
    """Reads a JSON file, or says which file is missing or broken."""
    return parse_json(read_text(path), path)


def check_finite(tensors: Mapping[str, Tensor], where: Path | str) -> None:
    """Raises FlownError naming the first tensor that holds NaN or Inf."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FlownError(f"{where}: tensor '{name}' holds NaN or Inf")


def walk(folder: Path) -> Iterator[tuple[Path, list[Path], list[Path]]]:
    """A folder and all below it, each with its folders and files; what is hidden is left out.

    So is what archives and file servers leave. Links are followed, as on clusters where runs lie
    elsewhere; a folder that is reached twice is walked once. Order depends on names alone.

    Raises:
        FlownError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise FlownError(f"{error.filename}: cannot be read ({error.strerror})") from None

    seen: set[str] = set()
    for here, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(
            x for x in folders if not x.startswith(".") and x.lower() not in _LITTER
        )
        seen_files = sorted(x for x in files if not x.startswith(".") and x.lower() not in _LITTER)
        yield Path(here), [Path(here, x) for x in folders], [Path(here, x) for x in seen_files]


def file_name(name: str) -> str:
    """A name from outside (a task, a folder of images) as a part of a file's name.

    Different names give different parts, also where a disk takes `A` for `a`: a name that is not
    plain gets a digest. Plain are small letters, digits and `_.-`, up to 80 of them.
    """
    if re.fullmatch(r"[a-z0-9_][a-z0-9_.-]{0,79}", name):
        return name
    readable = re.sub(r"[^a-z0-9_.-]+", "-", name.lower())[:60].strip("-.")
    return f"{readable}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"
