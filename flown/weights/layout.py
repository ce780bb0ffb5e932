"""What a weight vector means: the architecture it completes, and which tensors lie where in it.

A network's parameters w = (w_1, ..., w_T), in the order of `named_parameters()`, are flattened and
concatenated to one vector of D numbers (FLoWN, A.2.1). The layout is the key that undoes it.

Axes, here and everywhere: n networks, D weights, A layouts, N images, C classes.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from flown.base import trust
from flown.base.config import Config
from flown.base.errors import FlownError
from flown.nets.architecture import Architecture

_MOST = 2**40  # weights of a network


class WeightLayout(Config):
    """The tensors of one network, or a subset of them, as slices of a vector of `size` numbers."""

    architecture: Architecture
    names: tuple[str, ...]
    shapes: tuple[tuple[Annotated[int, Field(ge=0)], ...], ...]

    @model_validator(mode="after")
    def _check_tensors(self) -> Self:
        if len(self.names) != len(self.shapes):
            raise ValueError(f"{len(self.names)} names of tensors, {len(self.shapes)} shapes")
        if len(set(self.names)) < len(self.names):
            raise ValueError("two tensors have one name")
        if self.size > _MOST:
            raise ValueError(f"tensors of {self.size:,} numbers, more than any network here has")
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """The layout in a file.

        Raises:
            FlownError: as any record, or its network is code that the user did not allow.
        """
        layout = super().parse(values, where)
        trust.check(layout.net, where)
        return layout

    @classmethod
    def of(
        cls, module: nn.Module, architecture: Architecture, subset: Sequence[str] | None = None
    ) -> WeightLayout:
        """The layout of a module's parameters, in the order of `named_parameters()`.

        Args:
            subset: glob patterns of the names to take (`layer4.*`); by default all.

        Raises:
            FlownError: a pattern that no parameter's name matches.
        """
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        for pattern in () if subset is None else subset:
            if not fnmatch.filter(shapes, pattern):
                near = difflib.get_close_matches(pattern, shapes, n=3, cutoff=0.3)
                raise FlownError(
                    f"subset of '{architecture.net}': no tensor matches '{pattern}'; "
                    f"the nearest names: {', '.join(near or list(shapes)[-3:])}"
                )
        names = [
            name
            for name in shapes
            if subset is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in subset)
        ]
        return cls(
            architecture=architecture, names=tuple(names), shapes=tuple(shapes[n] for n in names)
        )

    @property
    def net(self) -> str:
        return self.architecture.net

    @cached_property
    def numels(self) -> tuple[int, ...]:
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """D, the number of weights."""
        return sum(self.numels)

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises FlownError when a stacked tensor is missing, superfluous or of another shape."""
        if extra := sorted(set(tensors) - set(self.names)):
            raise FlownError(f"{self.net}: unexpected tensor '{extra[0]}'")
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in tensors:
                raise FlownError(f"{self.net}: tensor '{name}' is missing")
            if tuple(tensors[name].shape[1:]) != shape:
                got = tuple(tensors[name].shape[1:])
                raise FlownError(f"{self.net}: tensor '{name}' is {got}, expected {shape}")

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Stacked state dicts, name -> (n, *shape), to vectors (n, D).

        Raises:
            FlownError: as `check`.
        """
        self.check(tensors)
        parts = [
            tensors[name].reshape(len(tensors[name]), numel)
            for name, numel in zip(self.names, self.numels, strict=True)
        ]
        return torch.cat(parts, dim=1)

    def unpack(self, vectors: Tensor) -> dict[str, Tensor]:
        """Vectors (n, D) to stacked state dicts, name -> (n, *shape): views, no copies."""
        if vectors.ndim != 2 or vectors.shape[1] != self.size:
            raise FlownError(
                f"{self.net}: expected vectors (n, {self.size}), got {tuple(vectors.shape)}"
            )
        parts = vectors.split(self.numels, dim=1)
        named = zip(self.names, self.shapes, parts, strict=True)
        return {
            name: part.unflatten(1, shape) if shape else part.squeeze(1)
            for name, shape, part in named
        }

    def check_same_weights(self, other: WeightLayout, where: str) -> None:
        """Raises FlownError when `other` has another network, tensor or shape."""
        mine = (self.net, self.names, self.shapes)
        if mine != (other.net, other.names, other.shapes):
            raise FlownError(
                f"{where}: weights of '{other.net}' ({other.size} numbers), "
                f"expected '{self.net}' ({self.size})"
            )


class JointLayout(Config):
    """The layouts of one network family in one vector space, padded tensor by tensor.

    The networks differ in the shape of some tensors (conv1's input channels, the head's classes);
    each tensor's slot has the largest shape, smaller ones fill its leading corner and leave zeros,
    so that one position means the same thing in every network (unlike padding at the vector's end).
    """

    layouts: tuple[WeightLayout, ...]

    @classmethod
    def of(cls, layouts: Sequence[WeightLayout]) -> JointLayout:
        """Raises FlownError when the networks are not of one family."""
        if not layouts:
            raise FlownError("no layout given")
        first = layouts[0]
        for other in layouts[1:]:
            ranks = [len(shape) for shape in first.shapes], [len(s) for s in other.shapes]
            if (other.net, other.names) != (first.net, first.names) or ranks[0] != ranks[1]:
                raise FlownError(
                    f"'{other.net}' ({other.size} numbers) cannot share a vector space with "
                    f"'{first.net}' ({first.size}): other tensors"
                )
        return cls(layouts=tuple(layouts))

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Each tensor's slot: the largest extent along each axis."""
        stacked = zip(*(layout.shapes for layout in self.layouts), strict=True)
        return tuple(tuple(map(max, zip(*shapes, strict=True))) for shapes in stacked)

    @property
    def outputs(self) -> int:
        """The largest number of outputs of a layout's networks."""
        return max(layout.architecture.outputs for layout in self.layouts)

    @property
    def size(self) -> int:
        """D of the joint space."""
        return sum(math.prod(shape) for shape in self.shapes)

    @cached_property
    def indices(self) -> tuple[Tensor, ...]:
        """For each layout, where its weights lie in the joint vector, (D_a,)."""
        return tuple(self._index(layout) for layout in self.layouts)

    def _index(self, layout: WeightLayout) -> Tensor:
        places, start = [], 0
        for slot, shape in zip(self.shapes, layout.shapes, strict=True):
            grid = torch.arange(math.prod(slot)).reshape(slot)
            places.append(start + grid[tuple(slice(extent) for extent in shape)].flatten())
            start += math.prod(slot)
        return torch.cat(places)

    @cached_property
    def masks(self) -> Tensor:
        """True where a layout's networks have a weight, (A, D)."""
        masks = torch.zeros(len(self.layouts), self.size, dtype=torch.bool)
        for mask, index in zip(masks, self.indices, strict=True):
            mask[index] = True
        return masks

    def embed(self, vectors: Tensor, layout: int) -> Tensor:
        """Vectors (n, D_a) of the layout of that index to the joint space (n, D), else zeros."""
        joint = vectors.new_zeros(len(vectors), self.size)
        joint[:, self.indices[layout].to(vectors.device)] = vectors
        return joint

    def extract(self, joint: Tensor, layout: int) -> Tensor:
        """The inverse of `embed`: (n, D) to (n, D_a)."""
        return joint[:, self.indices[layout].to(joint.device)]

    @cached_property
    def head_rows(self) -> Tensor:
        """Where the last layer's rows lie in the joint vector, one an output: (C, numbers).

        Raises:
            FlownError: the last layer has no row for each output, or is not among the tensors.
        """
        layer = self.layouts[0].names[-1].rpartition(".")[0]
        rows, start = [], 0
        for place, slot in enumerate(self.shapes):
            grid = torch.arange(start, start + math.prod(slot)).reshape(slot[0], -1)
            if self.layouts[0].names[place].rpartition(".")[0] == layer:
                for layout in self.layouts:
                    if layout.shapes[place][0] != layout.architecture.outputs:
                        raise FlownError(
                            f"{layout.net}: its last layer '{layer}' has no row for each of its "
                            f"{layout.architecture.outputs} outputs; classes cannot change places"
                        )
                rows.append(grid)
            start += math.prod(slot)
        return torch.cat(rows, dim=1)

    def permute_classes(self, vectors: Tensor, orders: Tensor) -> Tensor:
        """Networks whose k-th output is the given ones' orders[k]-th.

        Args:
            vectors: (n, D) of the joint space.
            orders: permutations (n, C) that leave outputs which a network does not have in place.
        """
        rows = self.head_rows.to(vectors.device)
        sources = rows[orders].flatten(1)  # (n, C numbers)
        permuted = vectors.clone()
        permuted[:, rows.flatten()] = vectors.gather(1, sources)
        return permuted


def layouts_in(about: Mapping[str, Any], where: Path | str) -> list[WeightLayout]:
    """The layouts that a manifest lists.

    Raises:
        FlownError: it lists none, or as `WeightLayout.parse`.
    """
    found = about.get("layouts")
    if not isinstance(found, list) or not found:
        raise FlownError(f"{where}: layouts: expected one or more")
    return [WeightLayout.parse(value, str(where)) for value in found]
