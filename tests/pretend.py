"""A second device for machines that have none: CPU tensors that carry a mark and refuse to mix.

Inside `Pretend()`, whatever is moved to or made on `DEVICE` is marked, and so is whatever torch
computes from it. Marked and unmarked tensors meet as a GPU's and a CPU's do: with an error, but for
what torch allows (numbers without dimensions, indices from the CPU, copies). Moving copies, as to a
GPU, so that a module that is moved no longer shares memory with what stayed behind. The arithmetic is
the CPU's: a run on `DEVICE` must give what a run on the CPU gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda:1")  # never `cuda:0`, where code that drops the index would end up
CPU = torch.device("cpu")

_DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_MOVES = {Tensor.to, Tensor.cpu}
_TO_NUMPY = {Tensor.numpy, Tensor.__array__}
_READS, _WRITES = {Tensor.__getitem__}, {Tensor.__setitem__}
_OF_THE_FIRST = {*_READS, *_WRITES, Tensor.__deepcopy__}
_MAY_MIX = {
    Tensor.copy_,
    Tensor.__deepcopy__,
    Tensor.backward,
    torch.autograd.backward,
    torch._has_compatible_shallow_copy_type,
}
_NO_NUMBERS = {torch.cat, torch.stack}  # even numbers without dimensions must lie together

# Whether the transform of torch.func that runs now is on `DEVICE`: its inner tensors carry no marks.
_within = [False]


class MixedDevices(RuntimeError):
    """What torch would say of tensors on two devices."""


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


def marked(value: Any) -> bool:
    """Whether any tensor in it lies on `DEVICE`."""
    return any(
        _within[-1] if is_functorch_wrapped_tensor(tensor) else getattr(tensor, "pretended", False)
        for tensor in tensors(value)
    )


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (
        isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda")
    )


class Generator(torch.Generator):
    """A CPU generator that says where it is."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls, device="cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


_copy_parameter = nn.Parameter.__deepcopy__


def _copied(parameter: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    """A parameter's copy, which torch makes out of the mode's sight, lies where the parameter lies."""
    made: nn.Parameter = _copy_parameter(parameter, memo)
    made.pretended = marked(parameter)  # type: ignore[attr-defined]
    return made


class Pretend(TorchFunctionMode):
    """The second device exists inside."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()

    def __enter__(self) -> Pretend:
        self.patches.setattr(torch, "Generator", Generator)
        for module, name in ((torch, "vmap"), (torch.func, "vmap"), (torch.func, "jvp")):
            self.patches.setattr(module, name, self._opaque(getattr(module, name)))
        self.patches.setattr(nn.Parameter, "__deepcopy__", _copied)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.undo()

    def _opaque(self, transform: Callable[..., Any]) -> Callable[..., Any]:
        """A transform of torch.func, whose inner tensors lie where what is given to it lies."""

        def run(call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            self._check(transform, args, kwargs)
            there = marked((args, kwargs))
            _within.append(there)
            try:
                return self._mark(call(*args, **kwargs), there, ())
            finally:
                _within.pop()

        def replaced(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if transform.__name__ == "jvp":
                return run(lambda *a, **k: transform(function, *a, **k), args, kwargs)
            mapped = transform(function, *args, **kwargs)
            return lambda *a, **k: run(mapped, a, k)

        return replaced

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == _DEVICE:
            return DEVICE if marked(args[0]) else func(*args)
        if func == _SET_DATA:
            args[0].pretended = marked(args[1])
            return func(*args)
        if func in _MOVES:
            return self._move(func, args, kwargs)
        if func in _TO_NUMPY and marked(args[0]):
            raise MixedDevices(f"can't convert {DEVICE} tensor to numpy; use Tensor.cpu() first")
        self._check(func, args, kwargs)
        there = marked(args[0] if func in _OF_THE_FIRST else (args, kwargs))
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]) == DEVICE
            kwargs["device"] = CPU if there else kwargs["device"]
        self._check_generator(func, args, kwargs, there)
        return self._mark(func(*args, **kwargs), there, args)

    def _mark(self, out: Any, there: bool, args: tuple[Any, ...]) -> Any:
        given = {id(tensor) for tensor in tensors(args)}
        for tensor in tensors(out):
            if id(tensor) not in given:
                tensor.pretended = there  # type: ignore[attr-defined]
        return out

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tensor, rest = args[0], list(args[1:])
        there = marked(tensor)
        goal = None if func == Tensor.to else CPU
        for i, value in enumerate(rest):
            if isinstance(value, Tensor):
                goal = DEVICE if marked(value) else CPU
            elif _is_device(value):
                goal = torch.device(value)
                rest[i] = CPU if goal == DEVICE else goal
        if kwargs.get("device") is not None:
            goal = torch.device(kwargs["device"])
            kwargs["device"] = CPU if goal == DEVICE else goal
        moves = goal is not None and (goal == DEVICE) != there
        out: Tensor = func(tensor, *rest, **kwargs)
        if moves and out.data_ptr() == tensor.data_ptr():
            out = out.clone()
        if out is not tensor:
            out.pretended = there if goal is None else goal == DEVICE  # type: ignore[attr-defined]
        return out

    def _check(self, func: Any, args: Any, kwargs: Any) -> None:
        if func in _MAY_MIX or torch._C._current_graph_task_id() != -1:  # gradients carry no mark
            return
        found = list(tensors((args, kwargs)))
        if func in _READS | _WRITES:
            found = [args[0], *(t for t in tensors(args[1:2]) if marked(t))]
        here = [t for t in found if not marked(t) and (t.ndim or func in _NO_NUMBERS)]
        if here and marked(found):
            shapes = tuple(here[0].shape), next(tuple(t.shape) for t in found if marked(t))
            raise MixedDevices(
                f"{getattr(func, '__name__', func)}: expected all tensors to be on the same device, "
                f"but found {shapes[0]} on cpu and {shapes[1]} on {DEVICE}"
            )

    def _check_generator(self, func: Any, args: Any, kwargs: Any, there: bool) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Generator):
                place = getattr(value, "place", CPU)
                if (place == DEVICE) != there:
                    raise MixedDevices(f"{func.__name__}: the generator is on {place}")
