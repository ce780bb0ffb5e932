"""What reads a support set, and the flow's end-point prediction under its class tokens.

    class token k = mean over the images of class k of encode(image)
    shares        = p(kind of images | support set)             of the base networks
    x_1^(x_t, t) = x_t + transformer([neurons + x_t, classes + x_t], t)

No token has a place of its own among its kind but by what it is: permuted classes give permuted rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Seen(NamedTuple):
    """What is seen of T support sets: class tokens (T, C, width), shares (T, E) of base networks."""

    classes: Tensor
    shares: Tensor

    def repeat(self, samples: int) -> Seen:
        """The same for `samples` networks of each."""
        return Seen(*(part.repeat_interleave(samples, dim=0) for part in self))


class ImageEncoder(nn.Module):
    """Images (K, 3, 32, 32) to features (K, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, width))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.layers(images)
        return found


class Gate(nn.Module):
    """Tells E kinds of images apart: log p (T, E) of support sets (T, K, 3, 32, 32).

    It is small, reads nothing else and is trained by itself: shares that are learned from what mixed
    networks compute are soon all of one base network.
    """

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 5, 4, 2), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.kinds = nn.Linear(32, kinds)

    def forward(self, images: Tensor) -> Tensor:
        found = self.layers(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        log_p: Tensor = self.kinds(found.mean(dim=1)).log_softmax(dim=1)
        return log_p


class Block(nn.Module):
    """Self-attention and a perceptron, each behind a norm, each a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norms[1](x))
        return x


class Trunk(nn.Module):
    """The end point of the flow for neurons and classes.

    Args:
        numbers: m, of a token's latent. width: of the tokens. depth: blocks.
        features: of an image. experts: E, base networks of a kind, which are mixed.
    """

    def __init__(
        self,
        numbers: int,
        width: int,
        depth: int,
        heads: int,
        features: int | None = None,
        experts: int = 1,
    ) -> None:
        super().__init__()
        features = width if features is None else features
        self.images = ImageEncoder(features)
        self.gate = Gate(experts)
        self.kind = nn.Parameter(torch.randn(width) * 0.5)
        self.shots, self.time = nn.Linear(1, width), nn.Linear(1, width)
        self.seen = nn.Linear(features, width)
        self.enter, self.leave = nn.Linear(numbers, width), nn.Linear(width, numbers)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        for parameter in self.leave.parameters():  # the flow begins as noise around base networks
            nn.init.zeros_(parameter)

    def see(self, images: Tensor, labels: Tensor, ways: int) -> Seen:
        """What is seen of T support sets, images (T, K, 3, 32, 32), labels (T, K)."""
        member = F.one_hot(labels, ways).to(images.dtype)
        return Seen(self.tokens(images, member), self.shares(images))

    def tokens(self, images: Tensor, member: Tensor) -> Tensor:
        """Class tokens (T, C, width) of images (T, K, 3, 32, 32) and whose they are, 0 or 1, (T, K, C)."""
        found = self.images(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        counts = member.sum(dim=1)[..., None]
        means = member.mT @ found / counts
        tokens: Tensor = self.seen(means) + self.shots(counts.log()) + self.kind
        return tokens

    @torch.no_grad()
    def shares(self, images: Tensor) -> Tensor:
        """Shares (T, E) of the base networks for support sets (T, K, 3, 32, 32)."""
        found: Tensor = self.gate(images).exp()
        return found

    def forward(self, x: Tensor, t: Tensor, neurons: Tensor, classes: Tensor) -> Tensor:
        """End points (n, N + C, m).

        Args:
            x: latents at time t, (n, N + C, m). t: (n,).
            neurons: (N, width). classes: (n, C, width).
        """
        tokens = torch.cat([neurons.expand(len(x), -1, -1), classes], dim=1)
        tokens = tokens + self.enter(x) + self.time(t[:, None])[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        end: Tensor = x + self.leave(self.norm(tokens))
        return end
