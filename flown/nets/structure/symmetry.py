"""Which units of a network may change places, or signs, without changing what it computes.

    layer f with permuted units,  P W_f and P b_f,  next layer g with permuted inputs,  W_g P^T

leaves g(s(f(x))) unchanged for any elementwise s, and P may hold signs where s is odd (Hecht-Nielsen
1990; Git Re-Basin, 2209.04836, section 3). The groups are read off the network's own graph: it is
traced, and the axis that holds a layer's units is followed through every operation. Layers whose
outputs are added share their permutation; the network's inputs and outputs have none.

A unit may flip its sign where only odd functions (tanh, average pooling, dropout) lie between its
layer and the next ones. Max-pooling and normalisation are not odd, wherever the tanh stands.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import batchnorm, conv, dropout, instancenorm, pooling
from torch.nn.utils import parametrize

from flown.base.errors import FlownError
from flown.nets.plain import is_altered

_ODD = (
    nn.Identity,
    nn.Tanh,
    nn.Softsign,
    nn.Tanhshrink,
    nn.Hardshrink,
    nn.Softshrink,
    dropout._DropoutNd,
)
_NOT_ODD = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU),
    *(nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
    *(nn.Threshold, nn.Softmax, nn.LogSoftmax),
)
_MEAN_POOLS = pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd
_MAX_POOLS = pooling._MaxPoolNd, pooling._AdaptiveMaxPoolNd

# Functions and, as strings, tensor methods.
_ODD_CALLS = {
    *(torch.tanh, F.tanh, F.softsign, F.tanhshrink, F.hardshrink, F.softshrink, operator.neg),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout),
    *("tanh", "tanh_", "neg", "contiguous", "clone", "float", "to"),
}
_NOT_ODD_CALLS = {
    *(torch.relu, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish),
    *(torch.sigmoid, F.sigmoid, F.logsigmoid, F.softplus, F.hardtanh, F.hardsigmoid, F.hardswish),
    *(F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, torch.abs, torch.exp),
    *("relu", "relu_", "sigmoid", "softmax", "log_softmax", "abs", "exp"),
}
_MEAN_POOL_CALLS = {
    F.avg_pool1d,
    F.avg_pool2d,
    F.avg_pool3d,
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
}
_MAX_POOL_CALLS = {
    F.max_pool1d,
    F.max_pool2d,
    F.max_pool3d,
    F.adaptive_max_pool1d,
    F.adaptive_max_pool2d,
    F.adaptive_max_pool3d,
}
_SUMS = {operator.add, operator.iadd, operator.sub, torch.add, torch.sub, "add", "add_", "sub"}
_PRODUCTS = {operator.mul, operator.imul, operator.truediv, torch.mul, torch.div, "mul", "div"}
_RESHAPES = {torch.flatten, torch.reshape, torch.squeeze, "flatten", "reshape", "view", "squeeze"}
_MEANS = {torch.mean, torch.sum, "mean", "sum"}


@dataclass(frozen=True)
class Group:
    """Units that change places together.

    `axes` lists (tensor, axis, inner): that axis of that state_dict tensor has size * inner entries,
    each unit's `inner` beside each other (channels after `torch.flatten`: one for each position).
    With `signs` every unit may also be multiplied by -1, along all of these axes.
    """

    size: int
    axes: tuple[tuple[str, int, int], ...]
    signs: bool


def groups(net: nn.Module, example: Tensor) -> tuple[Group, ...]:
    """The permutation groups of a network in eval mode, in the order of its graph.

    Args:
        example: an input (B, ...), of which only the shape matters.

    Raises:
        FlownError: the network cannot be traced or run on `example`, shares a tensor between
            two names, or holds an operation whose effect on units is not known.
    """
    names = [name for name, _ in net.named_parameters()]
    for name, _ in net.named_parameters(remove_duplicate=False):
        if name not in names:
            raise FlownError(f"tensor '{name}' has a second name; permuting both is not supported")
    walk = Walk(*trace(net, example))
    for node in walk.graph.nodes:
        walk.visit(node)
    return walk.groups()


def trace(net: nn.Module, example: Tensor) -> tuple[fx.GraphModule, dict[fx.Node, tuple[int, ...]]]:
    """A network's graph in eval mode, and the shape of every tensor in it.

    Raises:
        FlownError: the network cannot be traced, or not run on `example`, or a hook decides what
            it computes: a trace does not see hooks.
    """
    for name, module in net.named_modules():
        if is_altered(module) or parametrize.is_parametrized(module):
            raise FlownError(
                f"{type(net).__name__}: module '{name}' ({type(module).__name__}) has hooks or a "
                "parametrisation, whose effect on units is not known"
            )
    # Nothing is computed on meta tensors, and a copy keeps the caller's training mode as it is.
    bare = copy.deepcopy(net).eval().to("meta")
    try:
        traced = fx.symbolic_trace(bare)
    except Exception as error:  # a forward pass can fail on a proxy in any way
        raise FlownError(
            f"{type(net).__name__} cannot be traced ({error}): its forward pass must not depend on "
            f"values; pass groups written by hand instead"
        ) from None
    try:
        shapes = _Shapes(traced)
        shapes.run(example.to("meta"))
    except Exception as error:
        got = tuple(example.shape)
        reason = str(error).strip().split("\n")[0]
        raise FlownError(f"{type(net).__name__} cannot run on an input {got}: {reason}") from None
    return traced, shapes.found


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shape of every tensor in it."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.found[n] = tuple(result.shape)
        return result


@dataclass(frozen=True)
class Units:
    """Along `axis` of a value lie the units of `space`, each `inner` times."""

    space: int
    axis: int
    inner: int


class Walk:
    """Follows units through a graph. Values without an entry in `units` are never permuted."""

    remedy = "write the groups by hand, or change the network there"

    def __init__(self, traced: fx.GraphModule, shapes: Mapping[fx.Node, tuple[int, ...]]) -> None:
        self.graph = traced.graph
        self.modules: dict[str, nn.Module] = dict(traced.named_modules())
        self.shapes = shapes
        self.units: dict[fx.Node, Units] = {}
        self.parents: list[int] = []  # of the union-find over spaces
        self.sizes: list[int] = []
        self.fixed: set[int] = set()
        self.unsigned: set[int] = set()
        self.uses: dict[tuple[str, int], tuple[int, int]] = {}  # (tensor, axis) -> (space, inner)

    def groups(self) -> tuple[Group, ...]:
        fixed, unsigned = ({self._root(s) for s in some} for some in (self.fixed, self.unsigned))
        axes: dict[int, list[tuple[str, int, int]]] = {}
        for (name, axis), (space, inner) in self.uses.items():
            axes.setdefault(self._root(space), []).append((name, axis, inner))
        found = [
            Group(self.sizes[space], tuple(some), space not in unsigned)
            for space, some in axes.items()
            if space not in fixed
        ]
        return tuple(group for group in found if group.size > 1 or group.signs)

    def visit(self, node: fx.Node) -> None:
        inputs = [n for n in node.all_input_nodes if n in self.units]
        if node.op == "output":
            self.fixed.update(self.units[n].space for n in inputs)
        elif node.op == "call_module":
            self._module(node, self.modules[str(node.target)])
        elif inputs and node in self.shapes:
            self._call(node, inputs)
        elif inputs and node.target not in (getattr, "size", "dim"):
            raise self._refusal(node)

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        parent = next(iter(node.all_input_nodes), None)
        if parent is None:
            return
        if isinstance(module, nn.Linear):
            self._layer(node, parent, len(self.shapes[parent]) - 1, len(self.shapes[node]) - 1)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            self._convolve(node, parent, module)
        elif parent not in self.units:
            return  # units of the input alone: never permuted, whatever is done to them
        elif isinstance(module, nn.Flatten):
            self._reshape(node, parent)
        elif isinstance(module, batchnorm._BatchNorm | instancenorm._InstanceNorm):
            names = "weight", "bias", "running_mean", "running_var"
            self._scale(node, parent, 1, dict.fromkeys(names, 0))
        elif isinstance(module, nn.GroupNorm) and module.num_groups in (1, module.num_channels):
            self._scale(node, parent, 1, {"weight": 0, "bias": 0})
        elif isinstance(module, nn.LayerNorm):
            axis = self.units[parent].axis
            own = axis - len(self.shapes[parent]) + len(module.normalized_shape)
            self._scale(node, parent, axis, {"weight": own, "bias": own} if own >= 0 else {})
        elif isinstance(module, nn.PReLU):
            self._scale(node, parent, 1, {"weight": 0} if module.num_parameters > 1 else {})
        elif isinstance(module, _ODD + _NOT_ODD):
            self._pass(node, parent, odd=isinstance(module, _ODD))
        elif isinstance(module, _MEAN_POOLS + _MAX_POOLS):
            self._pool(node, parent, odd=isinstance(module, _MEAN_POOLS))
        else:
            raise self._refusal(node)

    def _call(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        target = node.target
        if target in _ODD_CALLS or target in _NOT_ODD_CALLS:
            self._pass(node, inputs[0], odd=target in _ODD_CALLS)
        elif target in _MEAN_POOL_CALLS or target in _MAX_POOL_CALLS:
            self._pool(node, inputs[0], odd=target in _MEAN_POOL_CALLS)
        elif target in _RESHAPES:
            self._reshape(node, inputs[0])
        elif target in _MEANS:
            self._mean(node, inputs[0])
        elif target in _SUMS or target in _PRODUCTS:
            self._combine(node, product=target in _PRODUCTS)
        else:
            raise self._refusal(node)

    def _layer(self, node: fx.Node, parent: fx.Node, at: int, out: int) -> None:
        """A layer with all inputs, at axis `at`, to all of its new units, at axis `out`."""
        if (units := self.units.get(parent)) is not None:
            if units.axis != at:
                raise self._refusal(node, "reads along another axis than that of the units")
            self._use(node, "weight", 1, units)
        size = self.shapes[node][out]
        self.parents.append(len(self.parents))
        self.sizes.append(size)
        made = self.units[node] = Units(len(self.parents) - 1, out, 1)
        self._use(node, "weight", 0, made)
        self._use(node, "bias", 0, made)

    def _convolve(self, node: fx.Node, parent: fx.Node, module: conv._ConvNd) -> None:
        at = len(self.shapes[node]) - 1 - len(module.kernel_size)
        if module.groups == 1:
            return self._layer(node, parent, at, at)
        units = self.units.get(parent)
        if units is None:
            return  # groups of input channels: their order is given
        if module.groups != module.in_channels or units.axis != at:
            raise self._refusal(node, "groups its channels; only depthwise groups are supported")
        repeats = module.out_channels // module.in_channels
        made = self.units[node] = Units(units.space, at, units.inner * repeats)
        # A flipped unit would have to leave the kernel as it is and flip the bias.
        self.unsigned.add(made.space)
        self._use(node, "weight", 0, made)
        self._use(node, "bias", 0, made)

    def _scale(self, node: fx.Node, parent: fx.Node, at: int, tensors: dict[str, int]) -> None:
        """A function of all units alike, but for `tensors` with numbers for each along an axis."""
        units = self.units[parent]
        if units.axis != at:
            raise self._refusal(node, "works along another axis than that of the units")
        self._pass(node, parent, odd=False)
        for name, axis in tensors.items():
            self._use(node, name, axis, units)

    def _pass(self, node: fx.Node, parent: fx.Node, odd: bool) -> None:
        self.units[node] = self.units[parent]
        if not odd:
            self.unsigned.add(self.units[parent].space)

    def _pool(self, node: fx.Node, parent: fx.Node, odd: bool) -> None:
        before, after, axis = self.shapes[parent], self.shapes[node], self.units[parent].axis
        if before[: axis + 1] != after[: axis + 1] or axis == len(before) - 1:
            raise self._refusal(node, "pools over units")
        self._pass(node, parent, odd)

    def _reshape(self, node: fx.Node, parent: fx.Node) -> None:
        units, before, after = self.units[parent], self.shapes[parent], self.shapes[node]
        axis = units.axis
        if after[: axis + 1] == before[: axis + 1]:
            self.units[node] = units
        elif after[:axis] == before[:axis] and len(after) == axis + 1:
            self.units[node] = Units(units.space, axis, units.inner * after[-1] // before[axis])
        else:
            raise self._refusal(node, f"makes {after} of {before}, units at axis {axis}")

    def _mean(self, node: fx.Node, parent: fx.Node) -> None:
        units, rank = self.units[parent], len(self.shapes[parent])
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        reduced = [
            int(d) % rank
            for d in (dims if isinstance(dims, list | tuple) else [dims])
            if isinstance(d, int)
        ]
        if not reduced or units.axis in reduced:
            raise self._refusal(node, "takes the mean over units")
        kept = len(self.shapes[node]) == rank
        axis = units.axis - (0 if kept else sum(d < units.axis for d in reduced))
        self.units[node] = Units(units.space, axis, units.inner)

    def _combine(self, node: fx.Node, product: bool) -> None:
        """A sum or product of two values, elementwise: the units of both are the same."""
        both = [a for a in node.args[:2] if isinstance(a, fx.Node) and a in self.shapes]
        known = [self.units[n] for n in both if n in self.units]
        if not known:
            raise self._refusal(node)
        first = known[0]
        if len(both) == 1:
            # c + x is not odd in x, c x and x / c are; c / x is not worth a rule.
            odd = product and node.args[0] is both[0]
        else:
            odd = not product
            if any(n.op == "get_attr" for n in both):
                raise self._refusal(node, "uses a tensor that belongs to no layer")
            alike = {
                (u.axis, u.inner, self.shapes[n][u.axis], len(self.shapes[n]))
                for n, u in ((n, self.units.get(n, first)) for n in both)
            }
            if len(alike) > 1:
                raise self._refusal(node, "combines values whose units do not correspond")
            if len(known) == 2:
                self._join(first.space, known[1].space)
            else:
                self.fixed.add(first.space)
        self.units[node] = first
        if not odd:
            self.unsigned.add(first.space)

    def _use(self, node: fx.Node, name: str, axis: int, units: Units) -> None:
        """Notes that an axis of a layer's tensor, if it has that tensor, is indexed by units."""
        if not isinstance(getattr(self.modules[str(node.target)], name, None), Tensor):
            return
        key = f"{node.target}.{name}", axis
        space, inner = self.uses.setdefault(key, (units.space, units.inner))
        if inner != units.inner:
            raise self._refusal(node, "is used for units of different kinds")
        self._join(space, units.space)

    def _root(self, space: int) -> int:
        while self.parents[space] != space:
            space = self.parents[space]
        return space

    def _join(self, one: int, other: int) -> None:
        self.parents[self._root(other)] = self._root(one)

    def _refusal(self, node: fx.Node, why: str = "") -> FlownError:
        target = node.target if isinstance(node.target, str) else node.target.__name__
        if node.op == "call_module":
            kind = type(self.modules[target]).__name__
            what = f"module '{target}' ({kind})"
        else:
            around = [path for path in node.meta.get("nn_module_stack", {}) if path]
            what = f"operation '{target}'" + (f" in module '{around[-1]}'" if around else "")
        why = why or "is not known to keep units apart"
        return FlownError(f"{what} {why}; {self.remedy}")
