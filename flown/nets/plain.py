"""Networks that are a plain sequence of known layers, for which loops of this library may stand.

A layer is known by its exact type: a subclass, a hook, a parametrisation or a weight that is used
twice makes a network compute something else, and only the module itself says what. A loop is
trusted after it has given the module's logits on random weights and images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_ELEMENTWISE = frozenset({nn.Tanh, nn.GELU, nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.Sigmoid})
_HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
_AGREEMENTS: dict[tuple[str, str, tuple[int, ...]], bool] = {}


def is_altered(module: nn.Module) -> bool:
    """Whether a hook or a forward pass of the instance changes what the module's class computes."""
    return "forward" in vars(module) or any(vars(module).get(hooks) for hooks in _HOOKS)


def layers(net: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """Names and layers of a plain network in the order in which they run; None for other networks.

    Plain are convolutions, max-pooling and activations, then one nn.Flatten, then linear layers and
    activations, whose weights in their order are the network's parameters. An activation may stand
    in several places.
    """
    if type(net) is not nn.Sequential or is_altered(net):
        return None
    found = [(name, layer) for name, layer in net.named_modules(remove_duplicate=False) if name]
    flat, names = False, []
    for name, layer in found:
        if is_altered(layer) or not _fits(layer, flat):
            return None
        held = [(key, tuple(p.shape)) for key, p in layer.named_parameters(recurse=False)]
        if held != _expected(layer) or any(True for _ in layer.buffers()):
            return None
        names += [f"{name}.{key}" for key, _ in held]
        flat = flat or type(layer) is nn.Flatten
    # A layer in two places has its names once among the parameters.
    return found if flat and names == [name for name, _ in net.named_parameters()] else None


def _fits(layer: nn.Module, flat: bool) -> bool:
    """Whether a layer is known and may stand there; `flat`: behind nn.Flatten."""
    if type(layer) is nn.Conv2d:
        return not flat and layer.groups == 1 and layer.padding_mode == "zeros"
    if type(layer) is nn.MaxPool2d:
        return not flat and not layer.return_indices
    if type(layer) is nn.Flatten:
        return not flat and layer.start_dim == 1 and layer.end_dim == -1
    if type(layer) is nn.Linear:
        return flat
    return type(layer) in _ELEMENTWISE


def _expected(layer: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the parameters of a layer of a known type."""
    if isinstance(layer, nn.Conv2d):
        shape = layer.out_channels, layer.in_channels, *layer.kernel_size
    elif isinstance(layer, nn.Linear):
        shape = layer.out_features, layer.in_features
    else:
        return []
    return [("weight", shape), *([("bias", shape[:1])] if layer.bias is not None else [])]


def agrees(
    net: nn.Module,
    shape: tuple[int, ...],
    way: str,
    compute: Callable[[dict[str, Tensor], Tensor], Tensor],
) -> bool:
    """Whether `compute` gives a plain network's own logits; asked once for each architecture.

    Args:
        shape: of an image, (c, H, W).
        way: a name of `compute`, of tensors (n, *shape) by name and images (B, c, H, W) to logits
            (n, B, C).
    """
    key = way, repr(net), shape
    if key not in _AGREEMENTS:
        _AGREEMENTS[key] = _agree(net, shape, compute)
    return _AGREEMENTS[key]


@torch.no_grad()
def _agree(
    net: nn.Module,
    shape: tuple[int, ...],
    compute: Callable[[dict[str, Tensor], Tensor], Tensor],
) -> bool:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(2, *p.shape, generator=generator) * max(1, p[0].numel()) ** -0.5
        for name, p in net.named_parameters()
    }
    images = torch.randn(2, *shape, generator=generator)
    each = [{name: tensor[i] for name, tensor in tensors.items()} for i in range(2)]
    try:
        wanted = torch.stack([torch.func.functional_call(net, t, (images,)) for t in each])
        found = compute(tensors, images)
    except (RuntimeError, TypeError, ValueError):
        return False
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)
