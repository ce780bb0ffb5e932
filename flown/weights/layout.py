"""What a weight vector means: the task it serves, and which tensors lie where in it.

A network's parameters w = (w_1, ..., w_T), in the order of `named_parameters()`, are flattened and
concatenated to one vector of D numbers (FLoWN, A.2.1). The layout is the key that undoes it, and it
carries what weights alone do not say: activation, preprocessing, class names.

Axes, here and everywhere: n networks, D weights, N images, C classes.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from flown import nets
from flown.base import trust
from flown.base.config import Config
from flown.base.errors import FlownError

_LUMA = (0.299, 0.587, 0.114)


class Task(Config):
    """What a network is for: the images it sees and the classes it names."""

    name: str
    channels: int
    size: int
    mean: float
    std: float
    classes: tuple[str, ...]
    activation: str

    def preprocess(self, images: Tensor) -> Tensor:
        """Turns uint8 images (N, c, H, W) into the network's input (N, channels, size, size).

        Grey images are repeated for a three-channel network, colour ones reduced to luminance for
        a one-channel network, so that any network can be asked about any images.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise FlownError(f"images: expected (N, 1 or 3, H, W), got {tuple(images.shape)}")
        x = images.float() / 255
        if images.shape[1] == 3 and self.channels == 1:
            x = torch.einsum("nchw,c->nhw", x, torch.tensor(_LUMA, device=x.device))[:, None]
        if x.shape[-2:] != (self.size, self.size):
            side = (self.size, self.size)
            x = F.interpolate(x, side, mode="bilinear", antialias=True, align_corners=False)
        return ((x - self.mean) / self.std).expand(-1, self.channels, -1, -1)


class WeightLayout(Config):
    """The tensors of one network, or a subset of them, as slices of a vector of `size` numbers."""

    net: str
    task: Task
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

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
        cls, module: nn.Module, net: str, task: Task, subset: Sequence[str] | None = None
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
                    f"subset of '{net}': no tensor matches '{pattern}'; "
                    f"the nearest names: {', '.join(near or list(shapes)[-3:])}"
                )
        names = [
            name
            for name in shapes
            if subset is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in subset)
        ]
        return cls(net=net, task=task, names=tuple(names), shapes=tuple(shapes[n] for n in names))

    def build(self) -> nn.Module:
        """A network of this layout, freshly initialised."""
        task = self.task
        return nets.build(self.net, task.channels, len(task.classes), task.activation, task.size)

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
        return torch.cat([tensors[name].flatten(1) for name in self.names], dim=1)

    def unpack(self, vectors: Tensor) -> dict[str, Tensor]:
        """Vectors (n, D) to stacked state dicts, name -> (n, *shape): views, no copies."""
        if vectors.ndim != 2 or vectors.shape[1] != self.size:
            raise FlownError(
                f"{self.net}: expected vectors (n, {self.size}), got {tuple(vectors.shape)}"
            )
        parts = vectors.split(self.numels, dim=1)
        named = zip(self.names, self.shapes, parts, strict=True)
        return {name: part.unflatten(1, shape) for name, shape, part in named}

    def check_same_weights(self, other: WeightLayout, where: str) -> None:
        """Raises FlownError when `other` has another network, tensor or shape."""
        mine = (self.net, self.names, self.shapes)
        if mine != (other.net, other.names, other.shapes):
            raise FlownError(
                f"{where}: weights of '{other.net}' ({other.size} numbers), "
                f"expected '{self.net}' ({self.size})"
            )


class JointLayout(Config):
    """Several layouts of one network family in one vector space, padded tensor by tensor.

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
                    f"'{other.net}' of task '{other.task.name}' cannot share a vector space with "
                    f"'{first.net}' of task '{first.task.name}': other tensors"
                )
        return cls(layouts=tuple(layouts))

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Each tensor's slot: the largest extent along each axis."""
        stacked = zip(*(layout.shapes for layout in self.layouts), strict=True)
        return tuple(tuple(map(max, zip(*shapes, strict=True))) for shapes in stacked)

    @property
    def size(self) -> int:
        """D of the joint space."""
        return sum(math.prod(shape) for shape in self.shapes)

    @cached_property
    def indices(self) -> tuple[Tensor, ...]:
        """For each layout, where its weights lie in the joint vector, (D_task,)."""
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
        """True where a task's networks have a weight, (tasks, D)."""
        masks = torch.zeros(len(self.layouts), self.size, dtype=torch.bool)
        for mask, index in zip(masks, self.indices, strict=True):
            mask[index] = True
        return masks

    def embed(self, vectors: Tensor, task: int) -> Tensor:
        """Vectors (n, D_task) of one task to the joint space (n, D), zeros elsewhere."""
        joint = vectors.new_zeros(len(vectors), self.size)
        joint[:, self.indices[task].to(vectors.device)] = vectors
        return joint

    def extract(self, joint: Tensor, task: int) -> Tensor:
        """The inverse of `embed`: (n, D) to (n, D_task)."""
        return joint[:, self.indices[task].to(joint.device)]


class Standardizer(nn.Module):
    """Mean and standard deviation of each tensor of each task, fitted on training networks only.

    s = (w - mean_{task, tensor}) / std_{task, tensor},   padding stays zero

    One pair for all tasks would drown those whose weights are small: with networks started from
    U(0, 1) beside He-initialised ones, the latter's variation is a few percent of the pooled one,
    and an encoder trained on it reconstructs them at chance.
    """

    mean: Tensor
    std: Tensor
    masks: Tensor

    def __init__(self, joint: JointLayout) -> None:
        super().__init__()
        shape = len(joint.layouts), joint.size
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.register_buffer("masks", joint.masks, persistent=False)
        self.slots = [math.prod(slot) for slot in joint.shapes]

    def fit(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Fits on blocks of training vectors (n, D) with their task indices (n,), read once."""
        shape = len(self.mean), len(self.slots)
        count, mean, square = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
        for vectors, tasks in blocks:
            for task in tasks.unique().tolist():
                parts = vectors[tasks == task].double().split(self.slots, dim=1)
                masks = self.masks[task].split(self.slots)
                for slot, (part, mask) in enumerate(zip(parts, masks, strict=True)):
                    values = part[:, mask]
                    more, centre = values.numel(), values.mean()
                    # Moments of two sets join exactly (Chan et al. 1979).
                    total, apart = count[task, slot] + more, centre - mean[task, slot]
                    square[task, slot] += (values - centre).square().sum()
                    square[task, slot] += apart.square() * count[task, slot] * more / total
                    mean[task, slot] += apart * more / total
                    count[task, slot] = total
        spread = (square / count.clamp_min(1)).sqrt()
        spread[spread <= 1e-8] = (
            1  # a tensor that never varies (a frozen bias) would divide by zero
        )
        sizes = torch.tensor(self.slots)
        self.mean.copy_(mean.repeat_interleave(sizes, dim=1))
        self.std.copy_(spread.repeat_interleave(sizes, dim=1))

    def forward(self, vectors: Tensor, tasks: Tensor) -> Tensor:
        """Standardises vectors (n, D) of tasks (n,)."""
        standard = (vectors - self.mean[tasks]) / self.std[tasks]
        return torch.where(self.masks[tasks], standard, 0)

    def invert(self, standard: Tensor, tasks: Tensor) -> Tensor:
        """The inverse of `forward`."""
        return torch.where(self.masks[tasks], standard * self.std[tasks] + self.mean[tasks], 0)
