"""A file's tensors in the order of a network's: prefixes, other names, buffers, tied weights.

Messages of this module do not name the file that is wrong; the caller knows the file and adds its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.nets.architecture import Architecture
from flown.weights import construction
from flown.weights.layout import WeightLayout

PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
State = Mapping[str, Any]


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
    left: tuple[str, ...]  # not the network's: without its prefix, or no tensors


class _Names(NamedTuple):
    ours: dict[str, str]  # our names to the file's, in the file's order
    left: list[str]


@dataclass(frozen=True)
class Naming:
    """Translates the names in a file to those of a network.

    What stands before most of the network's names is stripped (`module.`, `net.`); entries without
    it, and entries that are no tensors, are left and named. Then `mapping` (theirs: ours, or None to
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

    def of_subset(self, state: State) -> Naming:
        """As this one, for files that hold only those of the network's tensors that a state dict has.

        Raises:
            FlownError: it has none of them, or all.
        """
        names = [name for name in self._names(state).ours if name in self.layout.names]
        if not names:
            raise FlownError("none of its names is the network's; map them")
        if len(names) == len(self.layout.names):
            raise FlownError("holds the whole network, which needs no rest")
        module = self.layout.architecture.build()
        layout = WeightLayout.of(
            module, self.layout.architecture, subset=list(map(_literal, names))
        )
        return replace(self, layout=layout, drawn=frozenset())

    def choose(self, states: Mapping[str, State], usual: Sequence[str]) -> str:
        """Where in a file the network's state dict lies, of the several that it may have.

        Args:
            states: by where they lie, in the order of preference.
            usual: the keys under which one is preferred to others that fit as well.

        Raises:
            FlownError: several fit, and none or more than one lies in a usual place.
        """
        if len(states) == 1:
            return next(iter(states))
        found = {where: self._present(state) for where, state in states.items()}
        most = max(found.values())
        best = [where for where, count in found.items() if count == most]
        if most < len(self.layout.names) or len(best) == 1:
            return best[0]
        preferred = [where for where in best if where.rpartition(".")[2] in (*usual, "")]
        if len(preferred) != 1:
            places = ", ".join(repr(where) for where in best[:5])
            raise FlownError(f"holds the network several times, at {places}; name one with --key")
        return preferred[0]

    def _present(self, state: State) -> int:
        """How many of the network's tensors a state dict holds, in their shapes."""
        try:
            ours = self._names(state).ours
        except FlownError:
            return 0
        shapes = {name: getattr(state[old], "shape", None) for name, old in ours.items()}
        named = zip(self.layout.names, self.layout.shapes, strict=True)
        return sum(shapes.get(name) == shape for name, shape in named)

    def fit(self, entries: Mapping[str, Any]) -> Fitted:
        """A state dict's weights as a vector (D,).

        Raises:
            FlownError: a tensor is missing, unexpected, given twice, of another shape, not of
                floating-point numbers, or holds NaN or Inf; names of one tied weight hold two
                tensors; a buffer is missing that the constructor draws at random.
        """
        sources, left = self._names(entries)
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
            left=tuple(left),
        )

    def statistics(self, entries: State) -> dict[str, Tensor]:
        """Buffers that a state dict holds, by the network's names.

        Raises:
            FlownError: one holds NaN or Inf.
        """
        ours = self._names(entries).ours
        found = {name: entries[ours[name]] for name in ours if name in self.buffers}
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor) or not torch.isfinite(tensor).all():
                raise FlownError(f"buffer '{name}' holds NaN or Inf")
        return found

    def _names(self, entries: State) -> _Names:
        prefix = self._prefix(list(entries))
        found: dict[str, str] = {}
        left: list[str] = []
        ours = {*self.layout.names, *self.second_names, *self.buffers}
        for old, entry in entries.items():
            bare = old.removeprefix(prefix)
            new = self.mapping[old] if old in self.mapping else self.mapping.get(bare, bare)
            if new is None:
                continue
            astray = not old.startswith(prefix) and old not in self.mapping
            if astray or (new not in ours and not isinstance(entry, Tensor)):
                left.append(old)
            elif new in found:
                raise FlownError(f"tensors {found[new]!r} and {old!r} both become '{new}'")
            else:
                found[new] = old
        return _Names(found, left)

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

    def _prefix(self, names: Sequence[str]) -> str:
        """What a file puts before the network's names.

        Raises:
            FlownError: the network is there twice, each under a prefix of its own.
        """
        known = {*self.layout.names, *(k for k, v in self.mapping.items() if v is not None)}
        found = Counter(
            name[:start]
            for name in names
            for start in (0, *(i + 1 for i, letter in enumerate(name) if letter == "."))
            if name[start:] in known
        )
        most = max(found.values(), default=0)
        if 2 * most <= len(self.layout.names):
            return self._wrappers(names)  # theirs are others; wrappers can be told all the same
        best = [prefix for prefix, count in found.items() if count == most]
        if "" in best:
            return ""
        if len(best) > 1:
            raise FlownError(
                f"holds the network's names under {best[0]!r} and {best[1]!r}; name one with --key"
            )
        return best[0]

    def _wrappers(self, names: Sequence[str]) -> str:
        """The prefixes that wrappers, nested in any order, put before every name."""
        for prefix in self.prefixes:
            if all(name.startswith(prefix) for name in names):
                return prefix + self._wrappers([name.removeprefix(prefix) for name in names])
        return ""

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


def _literal(name: str) -> str:
    """A pattern that matches a name alone."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)


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
