"""State dicts as others save them: opened without running anything, and named as our networks are.

    file -> entries (name -> tensor) -> names without wrappers' prefixes -> mapping -> vector (D,)

A pickle can call any function when it is opened. `torch.load(weights_only=True)` refuses everything
but tensors and plain containers; no pickle is opened in another way here. Files are not trusted:
type, shape and numbers of tensors are checked before anything is copied.

Errors raised here say what is wrong; the caller knows the file and adds its name.
"""

from __future__ import annotations

import io
import itertools
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.base.files import load_tensors, read_json
from flown.nets.architecture import Architecture
from flown.weights import construction
from flown.weights.layout import WeightLayout

SUFFIXES = (".bin", ".pt", ".pth", ".safetensors")
INDEX_SUFFIXES = (".bin.index.json", ".safetensors.index.json")  # Hugging Face's sharded files
WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which state dicts are nested
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
_MOST = 2**20  # bytes of a refused pickle that are searched for the names in it
_HARMLESS = re.compile(r"torch\._utils\._rebuild\w+|torch\.\w+Storage|collections\.OrderedDict")


def open_state(path: Path) -> dict[str, Any]:
    """A file's state dict, name -> tensor; other values saved beside tensors stay.

    Args:
        path: `*.safetensors`, the index of a sharded file (`INDEX_SUFFIXES`), or a pickle of
            `torch.save`, whatever its suffix; dicts nested under one of `WRAPPERS` are unwrapped.

    Raises:
        FlownError: truncated, no state dict, a part that is missing or elsewhere, or a pickle that
            asks for anything but tensors and plain values: the global is named, nothing is run.
    """
    value = _open_sharded(path) if path.name.endswith(INDEX_SUFFIXES) else _open(path)
    for _ in range(3):  # a pickle may hold itself
        if isinstance(value, dict):
            value = next((value[k] for k in WRAPPERS if isinstance(value.get(k), dict)), value)
    if not isinstance(value, dict):
        raise FlownError(f"no state dict: holds a {type(value).__name__}")
    if not any(isinstance(entry, Tensor) for entry in value.values()):
        keys = ", ".join(repr(key) for key in itertools.islice(value, 5))
        raise FlownError(f"no state dict: no tensor among its keys ({keys or 'it has none'})")
    return {str(name): entry for name, entry in value.items()}


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
        if not isinstance(part, str) or part in ("", "..") or re.search(r"[/\\]", part):
            raise FlownError(f"its part {part!r} is not a file beside it")
    return parts


def _open_sharded(index: Path) -> dict[str, Any]:
    parts, state = parts_of(index), {}
    for part in sorted(set(parts.values())):
        if not (index.parent / part).is_file():
            raise FlownError(f"its part {part!r} is missing")
        held = _open(index.parent / part)
        for name in (name for name, where in parts.items() if where == part):
            if not isinstance(held, dict) or name not in held:
                raise FlownError(f"its part {part!r} does not hold {name!r}")
            state[name] = held[name]
    return state


def _open(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old protocols and TorchScript: read, or refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.findall(r"GLOBAL (\S+)", str(error)) or _globals(path)
        if not found:
            raise FlownError(
                "truncated, or of a pickle protocol that cannot be opened safely; save it again by "
                "torch.save's own, or as safetensors"
            ) from None
        raise FlownError(
            f"refused, nothing of it was run: it asks for {found[0]!r}, and only tensors and plain "
            "values are unpickled; save the state_dict() alone, or as safetensors"
        ) from None
    except Exception as error:  # a damaged file may raise anything
        text = str(error).strip().partition("\n")[0][:160]
        kind = type(error).__name__
        raise FlownError(f"truncated, or not written by torch.save ({kind}: {text})") from None


def _globals(path: Path) -> list[str]:
    """The globals that a pickle names, read from its opcodes for messages; nothing is unpickled.

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
    return [name for name in found if not _HARMLESS.fullmatch(name)]


class Fitted(NamedTuple):
    """A file's weights in the network's order, and how its names were changed."""

    vector: Tensor  # (D,) in float32
    renamed: dict[str, str]  # theirs: ours, where they differ
    by_order: bool  # matched by the order of shapes, not by name
    buffers: tuple[
        str, ...
    ]  # dropped: BatchNorm's statistics, and buffers that a fresh network has too
    constants: dict[str, Tensor]  # other buffers, by the network's names
    dtypes: tuple[str, ...]  # other than float32


@dataclass(frozen=True)
class Naming:
    """Translates the names in a file to those of a network.

    Prefixes that all names of a file share are stripped, then `mapping` (theirs: ours, or None to
    drop) is applied; its keys may be written with or without the prefix. With `by_order`, a file
    whose names still differ is taken in its own order, if the shapes in that order are the network's.
    """

    layout: WeightLayout
    buffers: frozenset[str]
    constants: Mapping[str, Tensor]  # buffers other than BatchNorm's, of a fresh network
    drawn: frozenset[str]  # those that differ each time a network is built
    second_names: Mapping[str, str]  # of tied weights, to the layout's
    mapping: Mapping[str, str | None] = field(default_factory=dict)
    prefixes: tuple[str, ...] = PREFIXES
    by_order: bool = False

    @classmethod
    def of(cls, architecture: Architecture, **options: Any) -> Naming:
        """For the networks of an architecture.

        Raises:
            FlownError: no such network, or one without parameters.
        """
        module = architecture.build()
        layout = WeightLayout.of(module, architecture)
        if not layout.size:
            raise FlownError(f"network '{architecture.net}': has no parameters")
        return cls(
            layout,
            frozenset(name for name, _ in module.named_buffers(remove_duplicate=False)),
            construction.constants(module),
            construction.drawn(architecture),
            construction.second_names(module),
            **options,
        )

    def fit(self, entries: Mapping[str, Any]) -> Fitted:
        """A state dict's weights as a vector (D,).

        Raises:
            FlownError: a tensor is missing, unexpected, given twice, of another shape, not of
                floating-point numbers, or holds NaN or Inf; names of one tied weight hold two
                tensors; a buffer is missing that the constructor draws at random.
        """
        sources = self._names(entries)
        buffers = tuple(name for name in sources if self._is_buffer(name))
        constants = self._constants({name: entries[sources[name]] for name in buffers})
        sources = self._tied(sources, entries)
        sources = {name: old for name, old in sources.items() if name not in buffers}
        for old in sources.values():
            _check_plain(old, entries[old])
        known = self.layout.names
        ordered = self.by_order and set(sources) != set(known)
        if ordered:
            shapes = tuple(tuple(entries[old].shape) for old in sources.values())
            ordered = shapes == self.layout.shapes
        if ordered:
            sources = dict(zip(known, sources.values(), strict=True))
        self._check(sources, entries)
        tensors = {name: entries[old].detach().float() for name, old in sources.items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise FlownError(f"tensor {sources[name]!r} holds NaN or Inf")
        types = {str(entries[old].dtype).removeprefix("torch.") for old in sources.values()}
        return Fitted(
            vector=self.layout.pack({name: tensor[None] for name, tensor in tensors.items()})[0],
            renamed={old: name for name, old in sources.items() if old != name},
            by_order=ordered,
            buffers=tuple(name for name in buffers if name not in constants),
            constants=constants,
            dtypes=tuple(sorted(types - {"float32"})),
        )

    def _names(self, entries: Mapping[str, Any]) -> dict[str, str]:
        """Our names to the file's, in the file's order."""
        found: dict[str, str] = {}
        for old, bare in zip(entries, self._stripped(list(entries)), strict=True):
            new = self.mapping[old] if old in self.mapping else self.mapping.get(bare, bare)
            if new is None:
                continue
            if new in found:
                raise FlownError(f"tensors {found[new]!r} and {old!r} both become '{new}'")
            found[new] = old
        return found

    def _constants(self, found: Mapping[str, Any]) -> dict[str, Tensor]:
        """A file's buffers that a fresh network does not have."""
        kept: dict[str, Tensor] = {}
        for name, fresh in self.constants.items():
            if name not in found:
                if name in self.drawn:
                    raise FlownError(
                        f"buffer '{name}' is missing, and the network's constructor draws another "
                        "each time"
                    )
                continue
            held = found[name]
            if not isinstance(held, Tensor) or held.shape != fresh.shape:
                got = tuple(held.shape) if isinstance(held, Tensor) else type(held).__name__
                raise FlownError(f"buffer '{name}' is {got}, expected {tuple(fresh.shape)}")
            held = held.detach().to(fresh)
            if held.is_floating_point() and held.isnan().any():
                raise FlownError(f"buffer '{name}' holds NaN")
            if name in self.drawn or not torch.equal(held, fresh):
                kept[name] = held
        return kept

    def _tied(self, sources: dict[str, str], entries: Mapping[str, Any]) -> dict[str, str]:
        """One name for each tied weight, whether the file has one of them or all."""
        found = dict(sources)
        for second, first in self.second_names.items():
            if second not in found:
                continue
            old = found.pop(second)
            kept = entries[found.setdefault(first, old)]
            if kept is not entries[old] and not _equal(kept, entries[old]):
                raise FlownError(
                    f"tensors '{first}' and '{second}' are one tied weight in the network, and differ "
                    "in the file"
                )
        return found

    def _stripped(self, names: Sequence[str]) -> Sequence[str]:
        for prefix in self.prefixes:
            prefixed = any(name.startswith(prefix) for name in self.layout.names)
            if not prefixed and all(name.startswith(prefix) for name in names):
                # Wrappers may be nested in any order.
                return self._stripped([name.removeprefix(prefix) for name in names])
        return names

    def _is_buffer(self, name: str) -> bool:
        if not self.by_order:
            return name in self.buffers
        leaves = {buffer.rpartition(".")[2] for buffer in self.buffers}
        return name.rpartition(".")[2] in leaves

    def _check(self, sources: Mapping[str, str], entries: Mapping[str, Any]) -> None:
        missing = [name for name in self.layout.names if name not in sources]
        unexpected = [old for name, old in sources.items() if name not in self.layout.names]
        if unexpected:
            missed = f", whose '{missing[0]}' is missing" if missing else ""
            raise FlownError(f"tensor {unexpected[0]!r} is not the network's{missed}; map its name")
        if missing:
            raise FlownError(f"tensor '{missing[0]}' is missing")
        classes = self.layout.architecture.outputs
        for name, shape in zip(self.layout.names, self.layout.shapes, strict=True):
            got = tuple(entries[sources[name]].shape)
            if got == shape:
                continue
            head = got[1:] == shape[1:] and shape[0] == classes
            hint = f": a network of {got[0]} classes, the task has {classes}" if head else ""
            raise FlownError(f"tensor {sources[name]!r} is {got}, expected {shape}{hint}")


def _equal(a: Any, b: Any) -> bool:
    tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
    return tensors and a.shape == b.shape and torch.equal(a, b)


def _check_plain(name: str, entry: Any) -> None:
    """Raises FlownError for anything but a dense tensor of real floating-point numbers."""
    if type(entry) not in (Tensor, nn.Parameter):
        raise FlownError(f"entry {name!r} is of type {type(entry).__name__}, expected a tensor")
    if entry.layout != torch.strided or entry.is_meta:
        raise FlownError(f"tensor {name!r} is sparse or has no data")
    if not entry.is_floating_point():
        kind = str(entry.dtype).removeprefix("torch.")
        raise FlownError(f"tensor {name!r} holds {kind}, expected floating-point numbers")
