"""One forward pass through n networks of the same architecture at once.

Convolutions of n networks are one grouped convolution over n * channels in channels-last memory:
on CPUs this is where the time goes, and small groups of networks stay in cache. Anything that is
not a plain sequence of known layers goes through `torch.vmap`, correct and slower, or network by
network where `vmap` cannot run it. With a subset of tensors, what comes before the first of them is
computed once for all networks. On shared images plain networks run as compiled loops
(`compiled`), with gradients of first order for their weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flown.nets import plain

if TYPE_CHECKING:
    from flown.nets.batched.program import Program

# Networks per grouped convolution: 8 to 16 is the flat optimum on CPUs, 64 leaves the cache.
GROUP = 16
# Networks that `vmap` cannot run, such as those that look at values.
_LOOPED: WeakSet[nn.Module] = WeakSet()
# Numbers that the output of a layer may have, over networks and images, without gradients: 1 GB on a
# GPU. On a CPU only what goes through `vmap` is limited, by its images' copies for all networks.
_NUMBERS, _GPU_NUMBERS = 1 << 24, 1 << 28
_HALVES = nn.MaxPool2d(2).extra_repr()
_IMAGES = 64  # at a time: at most through `vmap` on a CPU, where memory allows at least on a GPU


def forward(
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    images: Tensor,
    frozen: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Logits of n networks.

    Args:
        net: the architecture; its own weights are not used.
        tensors: parameters by name, each (n, *shape).
        images: (B, c, H, W) shown to all, or (n, B, c, H, W), each network its own.
        frozen: tensors by name that all networks share, each (*shape).

    Returns:
        Logits (n, B, C).
    """
    n = len(next(iter(tensors.values())))
    own, cpu = images.ndim == 5, images.device.type == "cpu"
    layers = None if frozen else plain.layers(net)
    if layers and cpu and not own and n and not (torch.is_grad_enabled() and images.requires_grad):
        found = _compiled(net, tensors, images)
        if found is not None:
            return found
    if layers and not plain.agrees(net, images.shape[-3:], "stacked", partial(_forward, layers)):
        layers = None
    size, most = chunk(net, n, images, bool(frozen), general=not layers)
    parts = []
    for start in range(0, n, size):
        chosen = {name: tensor[start : start + size] for name, tensor in tensors.items()}
        seen = [images[start : start + size]] if own else images.split(most)
        logits = [
            _forward(layers, chosen, x) if layers else _general(net, chosen, x, frozen or {})
            for x in seen
        ]
        parts.append(logits[0] if len(logits) == 1 else torch.cat(logits, dim=1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def chunk(
    net: nn.Module, n: int, images: Tensor, frozen: bool, *, general: bool
) -> tuple[int, int]:
    """How many of n networks, and of the images shown to all, go through at once.

    On a CPU groups of networks stay in cache. On a GPU no layer's output has more numbers than
    `_GPU_NUMBERS`, unless one image of one network already has. With gradients all activations are
    kept whatever is chunked, layers in training mode may mix the images of a batch, and images of
    each network's own are few: then images stay together, and on a GPU networks do.

    Args:
        images: (B, c, H, W), or (n, B, c, H, W).
        frozen: whether networks share tensors, so that layers before the first that differs run once.
        general: whether networks go through `vmap`, whose copies of images are what costs on a CPU.
    """
    cpu = images.device.type == "cpu"
    networks = (4 * GROUP if frozen else GROUP) if cpu else max(1, n)
    whole = torch.is_grad_enabled() or any(module.training for module in net.modules())
    if images.ndim == 5:
        return networks, max(1, images.shape[1])
    count = max(1, len(images))
    if whole or (cpu and not general):
        return networks, count
    if cpu:
        fit = _NUMBERS // max(1, min(n, networks) * images[:1].numel())
        return networks, max(1, min(fit, _IMAGES))
    fit = max(1, _GPU_NUMBERS // widest(net, images))
    some = min(count, fit, max(_IMAGES, fit // networks))
    return min(networks, fit // some), some


def widest(net: nn.Module, images: Tensor) -> int:
    """Numbers of the largest output of a layer, or of the input, for one image (1, c, H, W)."""
    meta = {name: torch.empty_like(x, device="meta") for name, x in net.state_dict().items()}
    found = [images[:1].numel()]

    def note(layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            found.append(output.numel())

    hooks = [module.register_forward_hook(note) for module in net.modules()]
    try:
        torch.func.functional_call(net, meta, (torch.empty_like(images[:1], device="meta"),))
    finally:
        for hook in hooks:
            hook.remove()
    return max(found)


def _compiled(net: nn.Module, tensors: Mapping[str, Tensor], images: Tensor) -> Tensor | None:
    """Logits by compiled loops; None when there are none for this network."""
    from flown.nets.batched.program import Program  # numba takes a second to import

    program = Program.of(net, (images.shape[1], images.shape[2], images.shape[3]))
    names = [name for name, _ in net.named_parameters()]
    if program is None or any(t.dtype != torch.float32 for t in (images, *tensors.values())):
        return None
    vectors = torch.cat([tensors[name].flatten(1) for name in names], dim=1).contiguous()
    logits: Tensor = _CompiledLogits.apply(vectors, images.contiguous(), program)
    return logits


class _CompiledLogits(torch.autograd.Function):
    """Logits (n, B, C) of networks (n, D); the way back computes the activations again."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, images: Tensor, program: Program) -> Tensor:
        from flown.nets.batched import compiled

        ctx.save_for_backward(vectors, images)
        ctx.program = program
        pixels, weights = images.detach().numpy(), vectors.detach().numpy()
        return torch.from_numpy(compiled.logits(program, pixels, weights, torch.get_num_threads()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        from flown.nets.batched import compiled

        vectors, images = ctx.saved_tensors
        found = compiled.gradients(
            ctx.program,
            images.numpy(),
            vectors.numpy(),
            above.contiguous().numpy(),
            torch.get_num_threads(),
        )
        return torch.from_numpy(found), None, None


def _forward(
    layers: Sequence[tuple[str, nn.Module]], tensors: Mapping[str, Tensor], images: Tensor
) -> Tensor:
    n = len(next(iter(tensors.values())))
    shared = images.ndim == 4
    x = images if shared else images.transpose(0, 1).flatten(1, 2)  # (B, n*c, H, W)
    x = channels_last(x)
    for name, layer in layers:
        if isinstance(layer, nn.Conv2d):
            weight = tensors[f"{name}.weight"].flatten(0, 1)  # (n*out, in, k, k)
            bias = tensors[f"{name}.bias"].flatten() if layer.bias is not None else None
            groups = 1 if shared else n
            x = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, groups)
            shared = False
        elif isinstance(layer, nn.Linear):
            weight = tensors[f"{name}.weight"].transpose(1, 2)  # (n, in, out)
            x = torch.bmm(x, weight)
            if layer.bias is not None:
                x = x + tensors[f"{name}.bias"][:, None]
        elif isinstance(layer, nn.Flatten):
            if shared:  # every network sees the same image
                x, shared = x.flatten(1).expand(n, -1, -1), False
            else:
                x = torch.unflatten(x, 1, (n, -1)).transpose(0, 1).flatten(2)  # (n, B, features)
        else:
            x = alone(layer, x)
    return x


def channels_last(x: Tensor) -> Tensor:
    """Images (B, c, H, W) in memory as (B, H, W, c), so that what convolutions make of them is too.

    Grey images are in both orders at once; a copy alone has the strides that decide for this one.
    """
    return x.clone(memory_format=torch.channels_last)


def alone(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer without weights.

    Without gradients pooling by two is two maxima, twice as fast on a CPU as PyTorch's, which keeps
    places for the way back.
    """
    halves = isinstance(layer, nn.MaxPool2d) and layer.extra_repr() == _HALVES
    if halves and not (torch.is_grad_enabled() and x.requires_grad):
        x = x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]
        x = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
        return torch.maximum(x[..., ::2], x[..., 1::2])
    found: Tensor = layer(x)
    return found


def each(
    net: nn.Module,
    one: Callable[[dict[str, Tensor], Tensor], Any],
    tensors: dict[str, Tensor],
    images: Tensor,
    size: int | None = None,
) -> Any:
    """A function of one network's tensors and images, for n networks at once.

    Args:
        net: the network that `one` runs.
        one: returns a tensor or tensors by name.
        tensors: each (n, *shape).
        images: (B, c, H, W) for all, or (n, B, c, H, W).
        size: networks at a time, all by default.
    """
    own = images.ndim == 5
    if net not in _LOOPED:
        every = torch.vmap(
            one, in_dims=(0, 0 if own else None), randomness="different", chunk_size=size
        )
        try:
            with warnings.catch_warnings():  # it advises on speed
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                return every(tensors, images)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            found = _looped(one, tensors, images, own)
            _LOOPED.add(net)  # nothing but `vmap` was at fault
            return found
    return _looped(one, tensors, images, own)


def _looped(
    one: Callable[[dict[str, Tensor], Tensor], Any],
    tensors: dict[str, Tensor],
    images: Tensor,
    own: bool,
) -> Any:
    n = len(next(iter(tensors.values())))
    found = [
        one({name: tensor[i] for name, tensor in tensors.items()}, images[i] if own else images)
        for i in range(n)
    ]
    if isinstance(found[0], Tensor):
        return torch.stack(found)
    return {name: torch.stack([f[name] for f in found]) for name in found[0]}


def _general(
    net: nn.Module, tensors: Mapping[str, Tensor], images: Tensor, frozen: Mapping[str, Tensor]
) -> Tensor:
    def one(some: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.functional_call(net, {**frozen, **some}, (x,))

    logits: Tensor = each(net, one, dict(tensors), images)
    return logits
