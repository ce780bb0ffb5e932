"""AnyTask: networks for a support set of anything, from noise, in a few evaluations.

    class tokens, shares = trunk.see(support)
    x_0 ~ N(0, I), one token a hidden neuron and a class
    dx/dt = (x_1^(x, t) - x) / (1 - t), a few Euler steps
    weights = writer(x_1, shares)

On disk a model is a folder: `generator.safetensors`, `README.md`, the model card, and `config.json`,
written last.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.anytask import modelcard
from flown.anytask.config import AnyTaskConfig
from flown.anytask.evidence import weigh
from flown.anytask.ridge import confidence
from flown.anytask.trunk import Seen, Trunk
from flown.anytask.writer import Writer, architecture
from flown.base.errors import FlownError, FlownWarning, unknown
from flown.base.files import (
    halved,
    load_into,
    load_tensors,
    read_json,
    read_object,
    save_tensors,
    write_json,
    write_text,
)
from flown.base.memory import check_fits
from flown.base.seeding import seeded
from flown.nets import INPUT_SIZES
from flown.nets.architecture import Architecture
from flown.nets.batched.stacked import GROUP
from flown.tasks import Support, Task, check_support
from flown.tasks.looks import Looks
from flown.tasks.stream import SIDE
from flown.version import __version__
from flown.weights.batch import WeightBatch

FORMAT = "flown-any-3"
_SMALLEST = 1e-3  # a deviation of pixels below this is none


class AnyTask(nn.Module):
    """A generator that reads the support set. Made by `flown.anytask.fit` or `from_pretrained`."""

    def __init__(self, config: AnyTaskConfig) -> None:
        super().__init__()
        self.config = config
        self.card: dict[str, Any] = {}
        for net in config.nets:
            if net not in INPUT_SIZES:
                raise unknown("network", net, INPUT_SIZES)
        with seeded(config.seed):
            self.trunk = Trunk(
                config.numbers,
                config.width,
                config.depth,
                config.heads,
                config.features,
                config.experts,
            )
            self.writers = nn.ModuleDict(
                {
                    net: Writer(net, config.width, config.numbers, config.experts)
                    for net in config.nets
                }
            )

    @property
    def device(self) -> torch.device:
        return self.trunk.kind.device

    def writer(self, net: str | None) -> Writer:
        """The writer of a kind of network, by default the first.

        Raises:
            FlownError: it is not written by this model.
        """
        net = net or next(iter(self.config.nets))
        if net not in self.writers:
            raise unknown("network", net, self.writers)
        writer = self.writers[net]
        assert isinstance(writer, Writer)
        return writer

    def start(self, writer: Writer, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (n, N + C, m) at t = 0 for class tokens (n, C, width)."""
        n, ways = classes.shape[:2]
        shape = (n, len(writer.neurons) + ways, self.config.numbers)
        if self.config.way == "point":
            return torch.zeros(shape, device=self.device)
        return torch.randn(shape, generator=generator, device=self.device)

    def solve(self, x: Tensor, neurons: Tensor, classes: Tensor, steps: int, until: int) -> Tensor:
        """Latents (n, N + C, m) after `until` of `steps` Euler steps from x at t = 0."""
        for i in range(until):
            x = x + (self.end(x, i / steps, neurons, classes) - x) / (steps - i)
        return x

    def end(self, x: Tensor, t: float, neurons: Tensor, classes: Tensor) -> Tensor:
        """The end points that x (n, N + C, m) at time t leads to."""
        found: Tensor = self.trunk(x, torch.full((len(x),), t, device=x.device), neurons, classes)
        return found

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        labels: Tensor,
        n: int = 50,
        seed: int = 0,
        net: str | None = None,
        steps: int | None = None,
        classes: Sequence[str] | None = None,
    ) -> WeightBatch:
        """Generates n networks for a support set; a model of the way `point` gives one, n times.

        Args:
            images: (K, c, H, W) or, grey, (K, H, W); uint8 or floats in [0, 1], of any size.
            labels: (K,), every class from 0 at least once, two classes or more.
            net: what is written, one of `config.nets`; by default the first.
            steps: evaluations of the flow, by default `config.evaluations`, without noise always one.
            classes: names of the labels, kept with the networks; "0", "1", ... when None.

        Raises:
            FlownError: n or steps < 1, a network that is not written, an unusable support set.
        """
        steps = self.config.evaluations if steps is None else steps
        for key, value in (("n", n), ("steps", steps)):
            if value < 1:
                raise FlownError(f"{key}: must be 1 or more, got {value}")
        different, views_seed = n, seed
        if self.config.way == "point":
            if steps > 1:
                raise FlownError(f"steps: 1 for a model without noise, got {steps}")
            different, views_seed = 1, 0  # no seed changes what it gives
        writer, (support, ways) = self.writer(net), self._support(images, labels)
        kind = self._kind(writer, support.images, ways)
        check_fits(n, (len(writer.neurons) + ways) * self.config.numbers, "networks")
        seen = self._seen(support, kind)
        tokens = seen.classes.expand(different, -1, -1)
        generator = torch.Generator(self.device).manual_seed(seed)
        x = self.start(writer, tokens, generator)
        x = self.solve(x, writer.neurons, tokens, steps, steps)
        batch = self._written(writer, x, seen.shares, support, kind, views_seed)
        if different < n:
            batch = batch[[0] * n]
        names = tuple(classes) if classes is not None else tuple(map(str, range(ways)))
        batch.task = Task(id="support set", dataset="support set", classes=names, split="test")
        batch.provenance |= {"generator": f"flown {__version__}", "seed": seed, "nfe": steps}
        return batch

    @torch.no_grad()
    def base(self, images: Tensor, labels: Tensor, net: str | None = None) -> WeightBatch:
        """The base network's body under a head for the support set: what no token has written.

        Raises:
            FlownError: as `generate`.
        """
        writer, (support, ways) = self.writer(net), self._support(images, labels)
        kind = self._kind(writer, support.images, ways)
        x = torch.zeros(1, len(writer.neurons) + ways, self.config.numbers, device=self.device)
        return self._written(writer, x, self._seen(support, kind).shares, support, kind, 0)

    def shares(self, images: Tensor, labels: Tensor) -> Tensor:
        """What a support set seems to be: shares (E,) of strokes and of pictures.

        Raises:
            FlownError: as `generate`.
        """
        support, ways = self._support(images, labels)
        kind = self._kind(self.writer(None), support.images, ways)
        return self._seen(support, kind).shares[0]

    @torch.no_grad()
    def _seen(self, support: Support, kind: Architecture) -> Seen:
        """What the trunk sees of one support set."""
        images = _framed(support.images, kind).to(self.device).expand(-1, 3, -1, -1)
        return self.trunk.see(images[None], support.labels.to(self.device)[None], kind.outputs)

    def _written(
        self,
        writer: Writer,
        x: Tensor,
        shares: Tensor,
        support: Support,
        kind: Architecture,
        seed: int,
    ) -> WeightBatch:
        """The networks of end points (n, N + C, m); the seed is that of further views."""
        images, labels = kind.preprocess(support.images.to(self.device)), support.labels.cpu()
        shares = weigh(writer, shares, images, labels.to(self.device))
        looks, seen = Looks(torch.Generator().manual_seed(seed)), images.cpu()
        further = _viewed(labels, self.config.views)
        every = torch.cat([labels, *(labels[chosen] for chosen in further)])
        views = len(every) / len(labels)
        labels, every = labels.to(self.device), every.to(self.device)
        bodies, heads, told = [], [], []
        for part in x.split(GROUP):
            hidden, rows = part.split([len(writer.neurons), kind.outputs], dim=1)
            body, features = writer.write_body(hidden, shares, images)
            told.append(writer.left_out(rows, shares, features, labels))
            if further:
                warped = _views(looks, seen, further, len(part)).to(self.device)
                features = torch.cat([features, writer.compute(body, warped)], dim=1)
            copied = every.expand(len(part), -1)
            heads.append(writer.write_head(rows, shares, features, copied, views))
            bodies.append(body)
        tensors = {name: torch.cat([body[name] for body in bodies]) for name in bodies[0]}
        sure = confidence(torch.cat(told), labels)
        return writer.pack(tensors, sure * torch.cat(heads), kind)

    def _support(self, images: Tensor, labels: Tensor) -> tuple[Support, int]:
        ways = int(labels.max()) + 1 if isinstance(labels, Tensor) and labels.numel() else 0
        if not 2 <= ways <= self.config.tasks.ways:
            raise FlownError(
                f"support set: has {ways} classes, this model writes networks for 2 to "
                f"{self.config.tasks.ways}"
            )
        support = _in_order(check_support(images, labels, ways))
        flat = support.images.flatten(1)
        _, same, counts = flat.unique(dim=0, return_inverse=True, return_counts=True)
        for group in (counts > 1).nonzero().flatten():
            found = support.labels[same == group].unique().tolist()
            if len(found) > 1:
                warnings.warn(
                    f"support set: one image is in classes {found[0]} and {found[1]}",
                    FlownWarning,
                    stacklevel=3,
                )
        return support, ways

    def _kind(self, writer: Writer, images: Tensor, ways: int) -> Architecture:
        """The architecture whose input has mean 0 and deviation 1 on the support set."""
        net, channels = writer.kind.net, images.shape[1]
        seen = _framed(images, architecture(net, channels, ways))
        return architecture(
            net, channels, ways, float(seen.mean()), max(_SMALLEST, float(seen.std()))
        )

    def save(self, folder: Path | str) -> None:
        """Writes the model's folder, weights in half precision."""
        tensors = halved({k: v.detach().cpu() for k, v in self.state_dict().items()})
        save_tensors(Path(folder) / "generator.safetensors", tensors, {"format": FORMAT})
        write_text(Path(folder) / "README.md", modelcard.render(self.config, self.card))
        values = {"format": FORMAT, "flown": __version__, "card": self.card}
        write_json(
            Path(folder) / "config.json", values | {"config": self.config.model_dump(mode="json")}
        )

    @staticmethod
    def is_in(folder: Path | str) -> bool:
        """Whether a folder holds a model of this kind."""
        path = Path(folder) / "config.json"
        values = read_json(path) if path.is_file() else None
        return isinstance(values, dict) and values.get("format") == FORMAT

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> AnyTask:
        """Loads a model's folder.

        Raises:
            FlownError: a file is missing, broken or of another model.
        """
        path = Path(folder)
        if not cls.is_in(path):
            raise FlownError(f"{path}: holds no any-task generator ({FORMAT} in config.json)")
        values = read_object(path / "config.json")
        model = cls(AnyTaskConfig.parse(values.get("config", {}), f"{path}/config.json"))
        file = path / "generator.safetensors"
        load_into(model, load_tensors(file)[0], file)
        card = values.get("card", {})
        model.card = card if isinstance(card, dict) else {}
        return model.eval().requires_grad_(False)


def _in_order(support: Support) -> Support:
    """The darkest images first: images that are left out together do not depend on what came first."""
    order = support.images.double().flatten(1).mean(dim=1).argsort(stable=True)
    return Support(support.images[order], support.labels[order])


def _framed(images: Tensor, kind: Architecture) -> Tensor:
    """Images as the trunk sees them: 32 pixels a side, otherwise preprocessed as the network's."""
    return kind.model_copy(update={"size": SIDE}).preprocess(images)


def _viewed(labels: Tensor, count: int) -> list[Tensor]:
    """Rows of the images in each further view; no views where `count` is 1.

    Each image is seen once more, and as often that its class has `count` images at least.
    """
    copies = ((count / labels.bincount()).ceil() - 1).clamp(min=min(1, count - 1))[labels]
    return [(copies > i).nonzero().flatten() for i in range(int(copies.max()))]


def _views(looks: Looks, images: Tensor, rows: list[Tensor], n: int) -> Tensor:
    """Further views (n, V, c, S, S) of images, for each of n networks its own.

    They do not depend on the order of images or classes.
    """
    return torch.cat([looks.views(images, n)[:, chosen] for chosen in rows], dim=1)


def standardised(images: Tensor, support: Tensor) -> Tensor:
    """Float images (T, N, c, H, W) in units of each support set's own pixels, (T, K, c, H, W)."""
    mean = support.mean(dim=(1, 2, 3, 4), keepdim=True)
    std = support.std(dim=(1, 2, 3, 4), keepdim=True).clamp(min=_SMALLEST)
    standard: Tensor = (images - mean) / std
    return standard


def resized(images: Tensor, size: int) -> Tensor:
    """Images (T, N, c, H, W) with another side, as `Architecture.preprocess` does it."""
    if images.shape[-1] == size:
        return images
    flat = F.interpolate(
        images.flatten(0, 1), (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    sized: Tensor = flat.unflatten(0, images.shape[:2])
    return sized
