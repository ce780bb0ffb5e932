"""State dicts in files, opened without running anything.

Messages of this module do not name the file that is wrong; the caller knows the file and adds its name.
"""

from __future__ import annotations

import io
import itertools
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flown.base.errors import FlownError, unknown
from flown.base.files import load_tensors, read_json

SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".tar", ".th")
INDEX_SUFFIXES = (".bin.index.json", ".safetensors.index.json")  # Hugging Face's sharded files
WRAPPERS = ("state_dict", "model_state_dict", "model")  # where state dicts usually are nested
_DEPTH, _STATES = 4, 64  # how deep state dicts are looked for, and how many
_MOST = 2**26  # bytes of a refused pickle that are searched for the names in it
_HARMLESS = re.compile(r"torch\._utils\._rebuild\w+|torch\.\w+Storage|collections\.OrderedDict")
# What nobody keeps beside weights, and what runs something where it is called.
_HOSTILE = re.compile(
    r"(builtins|os|nt|posix|sys|subprocess|commands|shutil|socket|pty|runpy|importlib|imp|"
    r"ctypes|_?pickle|code|codeop|webbrowser|multiprocessing|asyncio|torch\.hub|torch\.serialization)"
    r"\..*"
)
_PLAIN = re.compile(
    r"builtins\.(object|set|frozenset|list|dict|tuple|int|float|bool|complex|str|bytes|"
    r"bytearray|slice|range)"
)


class Opened(NamedTuple):
    """The state dicts of a file by where they lie in it ("" is the file itself)."""

    states: dict[str, dict[str, Any]]
    stand_ins: tuple[str, ...]  # classes of what lies beside the tensors; nothing of them was run


def has_weights(path: Path) -> bool:
    """Whether a file's name says that it holds weights."""
    return path.name.lower().endswith(SUFFIXES) or is_index(path)


def is_index(path: Path) -> bool:
    """Whether a file's name says that it is the index of a sharded file."""
    return path.name.lower().endswith(INDEX_SUFFIXES)


def stem(path: Path) -> str:
    """A file's name without the suffixes that say that it holds weights."""
    name = path.name
    for suffix in (*INDEX_SUFFIXES, ".pth.tar", ".pt.tar", *SUFFIXES):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def open_states(path: Path, key: str | None = None) -> Opened:
    """A file's state dicts, name -> tensor; other values saved beside tensors stay.

    Args:
        path: `*.safetensors`, the index of a sharded file (`INDEX_SUFFIXES`), or a pickle of
            `torch.save`, whatever its suffix.
        key: where in the file the weights lie: an entry (`ema`), an entry of an entry
            (`teacher.net`), or what all their names begin with. By default every dict that holds
            tensors is given, those of `WRAPPERS` first.

    Raises:
        FlownError: truncated, no state dict, a part that is missing or elsewhere, or a pickle that
            asks for what runs something: it is named, nothing is run.
    """
    value, stand_ins = _open_sharded(path) if is_index(path) else _open(path)
    if key is not None:
        value = _entry(value, key)
    if not isinstance(value, dict) or hasattr(value, "stands_for"):
        raise FlownError(f"no state dict: holds {_kind(value)}")
    states = dict(itertools.islice(_states(value, "", 0), _STATES))
    if not states:
        keys = ", ".join(repr(key) for key in itertools.islice(value, 5))
        raise FlownError(f"no state dict: no tensor among its keys ({keys or 'it has none'})")
    return Opened(states, stand_ins)


def parts_of(index: Path) -> dict[str, str]:
    """The part in which each tensor of a sharded file lies, by the names in its index.

    Raises:
        FlownError: no index, or a part that is not beside it: a path could lead anywhere.
    """
    content = read_json(index)
    parts = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not parts:
        raise FlownError("no index of a sharded file: `weight_map` is missing")
    for part in parts.values():
        if not isinstance(part, str) or part in ("", ".", "..") or re.search(r"[/\\]", part):
            raise FlownError(f"its part {part!r} is not a file beside it")
    return parts


def _states(value: dict[Any, Any], where: str, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Dicts that hold tensors, the usual places first; a pickle may hold itself."""
    inner = [(key, entry) for key, entry in value.items() if isinstance(entry, dict)]
    inner.sort(key=lambda pair: WRAPPERS.index(pair[0]) if pair[0] in WRAPPERS else len(WRAPPERS))
    for key, entry in inner if depth < _DEPTH else ():
        yield from _states(entry, f"{where}.{key}".lstrip("."), depth + 1)
    if any(isinstance(entry, Tensor) for entry in value.values()):
        yield where, {str(name): entry for name, entry in value.items()}


def _entry(value: Any, key: str) -> Any:
    """What lies at a key in nested dicts; keys may hold dots themselves."""
    if not isinstance(value, dict):
        raise FlownError(f"has no entry {key!r}: holds {_kind(value)}")
    if key in value:
        return value[key]
    for name in value:
        if isinstance(name, str) and key.startswith(f"{name}.") and isinstance(value[name], dict):
            return _entry(value[name], key[len(name) + 1 :])
    begin = f"{key.rstrip('.')}."
    found = {n[len(begin) :]: v for n, v in value.items() if str(n).startswith(begin)}
    if not found:
        raise FlownError(f"--key: {unknown('entry', key, [str(name) for name in value])}")
    return found


def _kind(value: Any) -> str:
    if hasattr(value, "stands_for"):
        return f"{value.stands_for}, of which nothing was run; save the state_dict() alone"
    return f"a {type(value).__name__}"


def _open_sharded(index: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    parts, state = parts_of(index), {}
    stand_ins: set[str] = set()
    for part in sorted(set(parts.values())):
        if not (index.parent / part).is_file():
            raise FlownError(f"its part {part!r} is missing")
        held, stood = _open(index.parent / part)
        stand_ins.update(stood)
        for name in (name for name, where in parts.items() if where == part):
            if not isinstance(held, dict) or name not in held:
                raise FlownError(f"its part {part!r} does not hold {name!r}")
            state[name] = held[name]
    return state, tuple(sorted(stand_ins))


def _open(path: Path) -> tuple[Any, tuple[str, ...]]:
    if path.name.lower().endswith(".safetensors"):
        return load_tensors(path)[0], ()
    try:
        return _load(path, []), ()
    except pickle.UnpicklingError as error:
        first = re.findall(r"GLOBAL (\S+)", str(error))
    names = sorted({*first, *_globals(path)})
    if not names:
        raise FlownError(
            "truncated, or of a pickle protocol that cannot be opened safely; save it again by "
            "torch.save's own, or as safetensors"
        )
    hostile = [x for x in names if _HOSTILE.fullmatch(x) and not _PLAIN.fullmatch(x)]
    if not hostile:
        for filled in (r"(?!numpy\.)", r".*(dict|config|counter)", r"(?!)"):
            made: set[str] = set()
            stand_ins = [
                (_stand_in(x, made, bool(re.match(filled, x, re.IGNORECASE))), x) for x in names
            ]
            try:
                return _load(path, stand_ins), tuple(sorted(made))
            except pickle.UnpicklingError:
                continue
    raise FlownError(
        f"refused, nothing of it was run: it asks for {(hostile or names)[0]!r}, and only tensors and "
        "plain values are unpickled; save the state_dict() alone, or as safetensors"
    )


def _load(path: Path, stand_ins: Sequence[tuple[Any, str]]) -> Any:
    """What a pickle holds, as weights only.

    Raises:
        pickle.UnpicklingError: it asks for anything but tensors, plain values and `stand_ins`.
        FlownError: damaged.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(stand_ins)):
            warnings.simplefilter("ignore")  # on old protocols and TorchScript: read, or refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged file may raise anything
        if stand_ins:
            raise pickle.UnpicklingError(str(error)) from None
        text = str(error).strip().partition("\n")[0][:160]
        raise FlownError(f"truncated, or not written by torch.save ({text or 'it ends'})") from None


def _stand_in(name: str, made: set[str], filled: bool) -> type:
    """A class in the place of another: takes anything, does nothing, notes in `made` that it was asked.

    Args:
        filled: its instances are OrderedDicts, the one kind of dict that torch fills; otherwise they
            take any state, and what is appended.
    """

    class StandIn(list[Any]):
        stands_for = name

        def __new__(cls, *_: Any) -> Any:
            made.add(name)
            if not filled:
                return super().__new__(cls)
            mapping: Any = OrderedDict()
            mapping.stands_for = name
            return mapping

        def __init__(self, *_: Any) -> None:
            pass

        def __setstate__(self, _: Any) -> None:
            pass

    return StandIn


def _globals(path: Path) -> list[str]:
    """The globals that a pickle names, read from its opcodes; nothing is unpickled.

    torch does not name them for pickles of protocol 4 and above, which it refuses as a whole.
    """
    found: list[str] = []
    try:
        with path.open("rb") as file:
            data = file.read(_MOST)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inner = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                data = archive.open(inner).read(_MOST)
        strings: list[str] = []
        stream = io.BytesIO(data)
        pickles = iter(
            lambda: pickletools.genops(stream), None
        )  # old versions of torch wrote several pickles in a row
        for opcode, argument, _ in itertools.chain.from_iterable(pickles):
            if opcode.name == "GLOBAL":
                found.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                found.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except Exception:  # a damaged file may raise anything; names found before count
        pass
    for old, new in (("__builtin__.", "builtins."), ("copy_reg.", "copyreg.")):  # as torch has them
        found = [new + name.removeprefix(old) if name.startswith(old) else name for name in found]
    return [name for name in found if not _HARMLESS.fullmatch(name)]
