"""The velocity network v(x, t; c): a small UNet on the latent (FLoWN, A.2.3; after D2NWG's).

    e = MLP(sin, cos of 1000 t) + W c                      embeddings of 128
    block: h + conv(SiLU((1 + s) GroupNorm(conv(SiLU(GroupNorm(h)))) + b)),   (s, b) = W' SiLU(e)

`embed` adds the context to the time embedding, as above; `concat` projects it to extra input
channels instead, one as published. No context means the learned null context, which also serves guidance:

    v_g = v(x, t; null) + scale (v(x, t; c) - v(x, t; null))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flown.base.config import Config, Size
from flown.base.errors import FlownError
from flown.nets.pixels import PixelAttention, group_norm

BoundVelocity = Callable[[Tensor, Tensor], Tensor]  # v(x (n, *L), t ()), its condition bound


class VelocityConfig(Config):
    """Sizes of the UNet: `channels` times each of `multipliers`, halving the side between them.

    `context_channels`: input channels that `concat` projects the context to; the paper's is one.
    """

    channels: Size = 64
    multipliers: tuple[Size, ...] = (1, 2)
    blocks: Size = 2
    attention: bool = True
    embed_dim: Size = Field(default=128, ge=2, multiple_of=2)
    conditioning: Literal["embed", "concat"] = "embed"
    context_channels: Size = 1
    context_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


class UNet(nn.Module):
    """v(x (B, *L), t (B,), context (B, C)) -> (B, *L).

    Raises:
        FlownError: the latent's side cannot be halved between all levels, or more than twice.
    """

    frequencies: Tensor

    def __init__(
        self, config: VelocityConfig, latent_shape: tuple[int, ...], context_dim: int
    ) -> None:
        super().__init__()
        channels, *side = latent_shape
        halvings = len(config.multipliers) - 1
        if not 0 <= halvings <= 2 or any(length % 2**halvings for length in side):
            raise FlownError(
                f"velocity: multipliers {config.multipliers} halve a latent {tuple(latent_shape)} "
                f"{halvings} times; choose one to three, and sides divisible by 2 at each"
            )
        self.config, self.context_dim = config, context_dim
        self.latent_shape = tuple(latent_shape)
        self.context_dropout = config.context_dropout
        embed, concat = config.embed_dim, config.conditioning == "concat"
        half = torch.arange(embed // 2) / (embed // 2)
        self.register_buffer("frequencies", 1000 * 10000**-half, persistent=False)
        self.time = nn.Sequential(nn.Linear(embed, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.null = nn.Parameter(torch.zeros(context_dim))
        extra = config.context_channels if concat else 0  # input channels
        self.project = nn.Linear(context_dim, extra * math.prod(side) if concat else embed)

        widths = [config.channels * m for m in config.multipliers]
        self.stem = nn.Conv2d(channels + extra, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width, skips = widths[0], []
        for level, target in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(_Block(width, target))
                width = target
                skips.append(width)
            if level < halvings:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
        attention = PixelAttention(width, math.gcd(width, 4)) if config.attention else nn.Identity()
        self.middle = nn.ModuleList([_Block(width, width), attention, _Block(width, width)])
        for level, target in reversed(list(enumerate(widths))):
            for _ in range(config.blocks):
                self.up.append(_Block(width + skips.pop(), target))
                width = target
            if level:
                up = nn.Upsample(scale_factor=2.0, mode="nearest")
                self.up.append(nn.Sequential(up, nn.Conv2d(width, width, 3, padding=1)))
        self.norm, self.out = group_norm(width), nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)  # the flow starts as the identity
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]
        # One product for all blocks' scales and shifts: on small latents, the number of calls sets the cost.
        blocks = [m for m in (*self.down, *self.middle, *self.up) if isinstance(m, _Block)]
        self.sizes = [2 * block.width for block in blocks]
        self.modulate = nn.Linear(embed, sum(self.sizes))

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """The velocity at x.

        Args:
            x: points (B, *L).
            t: times (B,) or ().
            context: (B, C), (1, C) for all rows, or None.
            drop: booleans (B,), True where the null context replaces a row's own.

        Raises:
            FlownError: x or context has another shape than the network was made for.
        """
        return self.conditioned(x, t, self.condition(context, drop))

    def bind(self, context: Tensor | None = None) -> BoundVelocity:
        """v(x, t) under one condition, whose projection is computed here, once.

        Holds the parameters' present values: bind again after changing them.
        """
        condition = self.condition(context)
        return lambda x, t: self.conditioned(x, t, condition)

    def condition(self, context: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """The projected context (B or 1, embed_dim), or (B or 1, channels, h, w) for `concat`."""
        if context is None:
            context = self.null[None]
        elif context.ndim != 2 or context.shape[1] != self.context_dim:
            shape = tuple(context.shape)
            raise FlownError(f"context: expected (B, {self.context_dim}), got {shape}")
        elif drop is not None:
            context = torch.where(drop[:, None], self.null, context)
        projected: Tensor = self.project(context)
        if self.config.conditioning == "concat":
            return projected.view(-1, self.config.context_channels, *self.latent_shape[1:])
        return projected

    def conditioned(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """`forward` with what `condition` returned."""
        if tuple(x.shape[1:]) != self.latent_shape:
            expected = ", ".join(map(str, ("B", *self.latent_shape)))
            raise FlownError(f"latent: expected ({expected}), got {tuple(x.shape)}")
        angles = t.reshape(-1, 1) * self.frequencies  # (B or 1, embed_dim / 2)
        e = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        if self.config.conditioning == "concat":
            x = torch.cat([x, condition.expand(len(x), -1, -1, -1)], dim=1)
        else:
            e = e + condition
        modulations = iter(self.modulate(F.silu(e)).split(self.sizes, dim=1))
        h, skips = self.stem(x), []
        for layer in self.down:
            if isinstance(layer, _Block):
                h = layer(h, next(modulations))
                skips.append(h)
            else:
                h = layer(h)
        for layer in self.middle:
            h = layer(h, next(modulations)) if isinstance(layer, _Block) else layer(h)
        for layer in self.up:
            if isinstance(layer, _Block):
                h = layer(torch.cat([h, skips.pop()], dim=1), next(modulations))
            else:
                h = layer(h)
        return self.out(F.silu(self.norm(h)))  # type: ignore[no-any-return]


class Guided:
    """Classifier-free guidance (Ho and Salimans): two evaluations, as one of twice the rows."""

    evaluations = 2

    def __init__(self, velocity: UNet, context: Tensor, scale: float) -> None:
        self.velocity, self.scale = velocity, scale
        self.condition, self.null = velocity.condition(context), velocity.condition(None)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        rows = (len(x), *[-1] * (self.condition.ndim - 1))
        both = torch.cat([self.condition.expand(rows), self.null.expand(rows)])
        twice = t if t.ndim == 0 else torch.cat([t, t])
        v, v_null = self.velocity.conditioned(torch.cat([x, x]), twice, both).chunk(2)
        return v_null + self.scale * (v - v_null)


def guided(velocity: UNet, context: Tensor, scale: float = 1.0) -> BoundVelocity:
    """The guided velocity v(x, t) of a context (B or 1, C); scale 1 is the conditional one."""
    return velocity.bind(context) if scale == 1.0 else Guided(velocity, context, scale)


class _Block(nn.Module):
    """A residual block whose second norm is scaled and shifted by the embedding."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.norm1, self.conv1 = group_norm(inputs), nn.Conv2d(inputs, width, 3, padding=1)
        self.norm2, self.conv2 = group_norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)  # (B or 1, width, 1, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        h = self.conv2(F.silu(torch.addcmul(shift, h, 1 + scale)))
        return self.skip(x) + h  # type: ignore[no-any-return]
