"""A look of its own for every task: what all images of a task share, and how each differs from it.

    image = colour(stroke(warp(x)))

Drawn once a task: rotation, scale, shear, elastic strength, stroke width, blur, ink and ground,
texture, noise. Drawn for each image: a small warp, a shift, a change of brightness. Some tasks have no
look but for small warps: most images that a user has are plain. Axes: T tasks, N images of a task, c
channels, S pixels of a side; images are floats in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
_PLAIN = 0.3  # of tasks, which are as they are but for small warps


def grey(x: Tensor) -> Tensor:
    """Luminance (T, N, 1, S, S) of colour images (T, N, 3, S, S)."""
    return torch.einsum("tnchw,c->tnhw", x, x.new_tensor(LUMA))[:, :, None]


class Looks:
    """Random looks from one generator; `textures` (M, 3, S, S), uint8, fill strokes and grounds."""

    def __init__(self, generator: torch.Generator, textures: Tensor | None = None) -> None:
        self.generator, self.textures = generator, textures

    def strokes(self, x: Tensor, channels: int) -> Tensor:
        """Looks for strokes (T, N, 1, S, S), ink bright on black, to (T, N, channels, S, S)."""
        near = self._warp(x, turn=0.1, jitter=0.04, shift=0.04, padding="zeros")
        x = self._warp(x, turn=0.2, jitter=0.12, shift=0.1, padding="zeros")
        x = self._stroke(self._beside(x))
        x = self._noise(self._inked(x, channels))
        return torch.where(self._chance(_PLAIN, len(x)), near, x).clamp(0, 1)

    def photos(self, x: Tensor, channels: int) -> Tensor:
        """Looks for pictures (T, N, 3, S, S), to (T, N, channels, S, S)."""
        flipped = self._chance(0.5, *x.shape[:2])
        x = torch.where(flipped, x.flip(-1), x)
        near = self._warp(x, turn=0.02, jitter=0.04, shift=0.05, padding="reflection")
        x = self._warp(x, turn=0.05, jitter=0.06, shift=0.08, padding="reflection")
        if channels == 1:
            x, near = grey(x), grey(near)
        x = self._softened(x, 0.3)
        gain, lift = 1 + 0.25 * self._normal(*x.shape[:2]), 0.1 * self._normal(*x.shape[:2])
        task = 1 + 0.2 * self._normal(x.shape[0], 1, channels)
        x = (x - 0.5) * gain * task + 0.5 + lift
        x = torch.where(self._chance(0.15, len(x)), 1 - x, x)
        if channels == 1:
            x = torch.where(self._chance(0.15, len(x)), x * self._vignette(x), x)
        return torch.where(self._chance(_PLAIN, len(x)), near, self._noise(x)).clamp(0, 1)

    def views(self, x: Tensor, count: int) -> Tensor:
        """Other views of images (N, c, S, S), (count, N, c, S, S).

        In each all images are slightly turned, moved, stretched and bent alike.
        """
        flat = x.flatten(0, 1).expand(count, 1, -1, -1, -1)
        warped = self._warp(flat, turn=0.0, jitter=0.12, shift=0.07, padding="reflection")
        return warped.view(count, *x.shape)

    def _warp(self, x: Tensor, turn: float, jitter: float, shift: float, padding: str) -> Tensor:
        """Affine maps near the identity, the task's after the image's, and elastic bending."""
        (count, each), flat = x.shape[:2], x.flatten(0, 1)
        linear = self._linear(turn, count, 1) @ self._linear(jitter, count, each)
        moved = shift * self._random(torch.randn, count, each, 2, 1)
        matrix = torch.cat([linear, moved], dim=-1).flatten(0, 1)
        grid = F.affine_grid(matrix, list(flat.shape), align_corners=False)
        strength = (0.1 * self._uniform(count) ** 2).expand(-1, each, 2, 4, 4)
        bend = (strength * self._random(torch.randn, count, each, 2, 4, 4)).flatten(0, 1)
        bend = F.interpolate(bend, x.shape[-2:], mode="bilinear", align_corners=True)
        grid = grid + bend.permute(0, 2, 3, 1)
        return F.grid_sample(flat, grid, padding_mode=padding, align_corners=False).view(x.shape)

    def _linear(self, spread: float, count: int, each: int) -> Tensor:
        """Rotation, scales and shear near the identity, (count, each, 2, 2)."""
        angle, wide, high, skew = spread * self._random(torch.randn, 4, count, each)
        first = torch.stack([wide.exp() * angle.cos(), skew - angle.sin()], dim=-1)
        second = torch.stack([angle.sin(), high.exp() * angle.cos()], dim=-1)
        return torch.stack([first, second], dim=-2)

    def _beside(self, x: Tensor) -> Tensor:
        """Parts of another image at both sides, as in photographs of writing."""
        away = x.shape[-1] * 5 // 8
        left, right = x.roll(1, dims=1), x.roll(2, dims=1)
        beside = F.pad(left[..., away:], (0, away)) + F.pad(right[..., :-away], (away, 0))
        return torch.where(self._chance(0.15, len(x)), torch.maximum(x, beside), x)

    def _stroke(self, x: Tensor) -> Tensor:
        """Another width of the pen, and softer edges."""
        count = len(x)
        width = 2 * self._uniform(count) - 0.7
        flat = x.flatten(0, 1)
        thick = F.max_pool2d(flat, 3, 1, 1).view(x.shape)
        thin = -F.max_pool2d(-flat, (2, 2), 1, 1)[..., 1:, 1:].reshape(x.shape)
        x = x + width.clamp(0, 1) * (thick - x) + (-width).clamp(0, 1) * (thin - x)
        again = F.max_pool2d(x.flatten(0, 1), 3, 1, 1).view(x.shape)
        x = torch.where(self._chance(0.15, count), again, x)
        return self._softened(x, 0.5)

    def _softened(self, x: Tensor, chance: float) -> Tensor:
        """Blurred, or seen through half as many pixels."""
        flat = x.flatten(0, 1)
        amount = self._uniform(len(x)) * self._chance(chance, len(x))
        soft = F.avg_pool2d(flat, 3, 1, 1, count_include_pad=False).view(x.shape)
        x = x + amount * (soft - x)
        coarse = F.interpolate(x.flatten(0, 1), scale_factor=0.5, mode="area")
        coarse = F.interpolate(coarse, x.shape[-2:], mode="bilinear").view(x.shape)
        return torch.where(self._chance(chance / 2, len(x)), coarse, x)

    def _inked(self, x: Tensor, channels: int) -> Tensor:
        """Ink and ground of a brightness or colour, plain or textured."""
        count, each = x.shape[:2]
        plain = self._chance(0.5 if channels == 1 else 0.1, count).float()
        share = self._chance(0.5, count).float()  # of the colours that images share
        ink, ground = (self._colour(count, each, channels, share) for _ in range(2))
        near = (ink - ground).abs().mean(2, keepdim=True) < 0.25
        ink = torch.where(near, (ground + 0.5) % 1, ink)
        filled, photo = self._chance(0.3, count).float(), self._chance(0.3, count).float()
        ink = ink * (1 - filled) + filled * self._texture(x, channels, 1.0) * ink.clamp(0.5)
        photo = photo * (0.3 + 0.7 * self._uniform(count))
        ground = ground * (1 - photo) + photo * self._texture(x, channels, 0.6)
        ground = ground * ~self._chance(0.3, count)
        shaded = ground + (ink - ground) * x
        level = 0.6 + 0.4 * self._uniform(count, each)
        bright = x * (1 + plain * (level - 1))
        inverted = self._chance(0.2, count)
        return plain * torch.where(inverted, 1 - bright, bright) + (1 - plain) * shaded

    def _colour(self, count: int, each: int, channels: int, share: Tensor) -> Tensor:
        task, own = (self._uniform(count, n, channels) for n in (1, each))
        return share * task + (1 - share) * own

    def _texture(self, x: Tensor, channels: int, strength: float) -> Tensor:
        """Random pictures, or slopes of brightness where there are none, (T, N, channels, S, S)."""
        count, each, _, _, side = x.shape
        if self.textures is None:
            slope = torch.linspace(-0.5, 0.5, side, device=x.device)
            slope = self._normal(count, each, channels) * slope
            return (0.5 + strength * slope).expand(-1, -1, -1, side, -1)
        rows = self._uniform(count, each)[..., 0, 0, 0] * len(self.textures)
        found = self.textures[rows.long()].float() / 255
        if channels == 1:
            found = grey(found)
        return 0.5 + strength * (found - 0.5)

    def _vignette(self, x: Tensor) -> Tensor:
        side = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        radius = (side[:, None] ** 2 + side**2).sqrt()
        edge = 0.6 + 0.3 * self._uniform(*x.shape[:2])
        return ((edge - radius) * 8).sigmoid()

    def _noise(self, x: Tensor) -> Tensor:
        amount = 0.1 * self._uniform(len(x)) * self._chance(0.3, len(x))
        if not amount.any():
            return x
        return x + amount * torch.randn(x.shape, generator=self.generator, device=x.device)

    def _random(self, draw: Callable[..., Tensor], *shape: int) -> Tensor:
        return draw(shape, generator=self.generator, device=self.generator.device)

    def _uniform(self, tasks: int, images: int = 1, channels: int = 1) -> Tensor:
        """Uniform on [0, 1], (tasks, images, channels, 1, 1)."""
        return self._random(torch.rand, tasks, images, channels, 1, 1)

    def _normal(self, tasks: int, images: int = 1, channels: int = 1) -> Tensor:
        return self._random(torch.randn, tasks, images, channels, 1, 1)

    def _chance(self, p: float, tasks: int, images: int = 1) -> Tensor:
        return self._uniform(tasks, images) < p
