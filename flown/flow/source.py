"""Where the flow starts: sources p_0 of x_0, each drawn afresh at every call (FLoWN, 3 and A.4.2).

    gaussian         x_0 ~ N(0, I) in latent space
    kaiming-*        x_0 = encode(w),  w a freshly initialised base model,  Var w = 2 / fan_in
    checkpoint       x_0 = encode(w) + noise eps,  w a given network with a redrawn classifier head

A source knows layouts by their place. Two callables tell it where weights live: `pack` takes one layout's
stacked tensors, name -> (n, *shape), to the joint space (n, D); `encode` takes raw vectors (n, D)
of given layouts (n,) to latents (n, *L), standardising them on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from flown.base.errors import FlownError

Shapes = Sequence[tuple[str, tuple[int, ...]]]
Pack = Callable[[dict[str, Tensor], int], Tensor]
Encode = Callable[[Tensor, Tensor], Tensor]


class Source(Protocol):
    """A distribution p_0 over latents that may depend on the task, never on the context."""

    def sample(self, groups: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws x_0 (n, *L), row i for the task of index groups[i]; groups is (n,)."""


class Gaussian:
    """N(0, I) in latent space."""

    def __init__(self, latent_shape: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.latent_shape, self.device = tuple(latent_shape), torch.device(device)

    def sample(self, groups: Tensor, generator: torch.Generator | None = None) -> Tensor:
        shape = (len(groups), *self.latent_shape)
        return torch.randn(shape, generator=generator, device=self.device)


class Kaiming:
    """A freshly initialised base model, by the rule of He et al.

    Weights have std sqrt(2 / fan_in) (or the uniform law of that std), biases PyTorch's
    U(+-1/sqrt(fan_in)). A norm layer is read as the diagonal linear layer it is (FLoWN, A.2.2),
    with fan_in its width and mean 1: its usual constant start would be a single point, and a flow
    takes a point to a point.
    """

    law: Literal["normal", "uniform"]

    def __init__(self, shapes_by_task: Sequence[Shapes], pack: Pack, encode: Encode) -> None:
        self.shapes_by_task, self.pack, self.encode = shapes_by_task, pack, encode

    def sample(self, groups: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return _encoded(self, groups, generator)

    def draw(
        self, task: int, n: int, generator: torch.Generator | None, device: torch.device
    ) -> dict[str, Tensor]:
        """n networks of a task, name -> (n, *shape)."""
        shapes, tensors = dict(self.shapes_by_task[task]), {}
        for name, shape in shapes.items():
            module, _, kind = name.rpartition(".")
            weight = shapes.get(f"{module}.weight", shape)
            fan_in = math.prod(weight[1:]) if len(weight) > 1 else math.prod(weight)
            if len(shape) == 1 and kind == "bias":
                tensors[name] = _uniform((n, *shape), fan_in**-0.5, generator, device)
                continue
            if self.law == "normal":
                noise = torch.randn((n, *shape), generator=generator, device=device)
                drawn = noise * math.sqrt(2 / fan_in)
            else:
                drawn = _uniform((n, *shape), math.sqrt(6 / fan_in), generator, device)
            tensors[name] = drawn + 1 if len(shape) == 1 else drawn
        return tensors


class KaimingNormal(Kaiming):
    """`Kaiming` with normal weights."""

    law = "normal"


class KaimingUniform(Kaiming):
    """`Kaiming` with uniform weights."""

    law = "uniform"


class Checkpoint:
    """Noise around a given trained network: the mini-ImageNet prior of A.4.2.

    The first tensor is cut or zero-padded to the task's input channels; the classifier head, the
    last layer, is drawn from N(mu, sigma^2) of the prior's own head, tensor by tensor; the rest is
    taken over. N(0, noise^2 I) is added in latent space.

    Raises:
        FlownError: the prior lacks a tensor of a task, or has it in another shape (it is named).
    """

    def __init__(
        self,
        prior: Mapping[str, Tensor],
        shapes_by_task: Sequence[Shapes],
        pack: Pack,
        encode: Encode,
        noise: float = 1.0,
    ) -> None:
        self.shapes_by_task, self.pack, self.encode = shapes_by_task, pack, encode
        self.noise = noise
        self.bodies = [_body(prior, shapes) for shapes in shapes_by_task]
        self.moments = {k: (float(x.mean()), float(x.std(correction=0))) for k, x in prior.items()}

    def sample(self, groups: Tensor, generator: torch.Generator | None = None) -> Tensor:
        latents = _encoded(self, groups, generator)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        return latents + self.noise * noise

    def draw(
        self, task: int, n: int, generator: torch.Generator | None, device: torch.device
    ) -> dict[str, Tensor]:
        """n copies of the prior for a task, with redrawn heads, name -> (n, *shape)."""
        tensors = {}
        for name, shape in self.shapes_by_task[task]:
            if name in self.bodies[task]:
                tensors[name] = self.bodies[task][name].to(device).expand(n, *shape)
            else:
                mean, std = self.moments[name]
                noise = torch.randn((n, *shape), generator=generator, device=device)
                tensors[name] = mean + std * noise
        return tensors


SOURCES: dict[str, Callable[..., Source]] = {
    "gaussian": Gaussian,
    "kaiming-normal": KaimingNormal,
    "kaiming-uniform": KaimingUniform,
    "checkpoint": Checkpoint,
}


def _encoded(
    source: Kaiming | Checkpoint, groups: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Latents (n, *L) of networks drawn for each row's task."""
    drawn: dict[int, Tensor] = {}
    for task in torch.unique(groups).tolist():
        n = int((groups == task).sum())
        drawn[task] = source.pack(source.draw(task, n, generator, groups.device), task)
    first = next(iter(drawn.values()))
    vectors = first.new_empty(len(groups), first.shape[1])
    for task, rows in drawn.items():
        vectors[groups == task] = rows
    return source.encode(vectors, groups)


def _body(prior: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """The prior's tensors without its head, in a task's shapes."""
    first, head = shapes[0][0], shapes[-1][0].rpartition(".")[0]
    body = {}
    for name, shape in shapes:
        if name not in prior:
            raise FlownError(f"checkpoint source: the prior has no tensor '{name}'")
        tensor = prior[name]
        if name.rpartition(".")[0] == head:
            continue
        if name == first and tensor.ndim == len(shape) > 1:
            tensor = _fit_channels(tensor, shape[1])
        if tuple(tensor.shape) != tuple(shape):
            raise FlownError(
                f"checkpoint source: the prior's '{name}' is {tuple(prior[name].shape)}, the task "
                f"needs {tuple(shape)}; only input channels and the head may differ"
            )
        body[name] = tensor
    return body


def _fit_channels(weight: Tensor, channels: int) -> Tensor:
    """The first `channels` input channels of (out, in, ...), zeros where the weight has fewer."""
    cut = weight[:, :channels]
    missing = channels - cut.shape[1]
    return torch.cat([cut, cut.new_zeros(len(cut), missing, *cut.shape[2:])], dim=1)


def _uniform(
    shape: tuple[int, ...], bound: float, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    return (2 * torch.rand(shape, generator=generator, device=device) - 1) * bound
