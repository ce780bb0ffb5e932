"""The base of a subset zoo: a network trained as a whole; all others differ from it in the subset.

    progress-base.safetensors   while it trains: weights, buffers and Adam's state after an epoch
    rest-<task>.safetensors     the frozen tensors, part of the zoo
    base.safetensors            the start of the subset's training; written last, removed in the end

No augmentation, no schedule: Adam (PyTorch's defaults, the recipe's rate and weight decay).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.errors import TrainingError
from flown.base.files import load_tensors, save_tensors
from flown.base.seeding import seeded
from flown.tasks import ImageData, ManyClass
from flown.weights import construction
from flown.weights.layout import WeightLayout
from flown.zoo.store import frozen_file
from flown.zoo.train.recipes import Recipe

_ADAM = ("step", "exp_avg", "exp_avg_sq")


class Base:
    """Trains the base network into a zoo's folder; recipe and seed decide its bits."""

    def __init__(
        self,
        recipe: Recipe,
        layout: WeightLayout,
        images: ImageData | ManyClass,
        out: Path,
        seed: int,
        device: str = "cpu",
    ) -> None:
        self.recipe, self.layout, self.out, self.device = recipe, layout, out, device
        assert isinstance(images, ImageData)  # `Recipe.check` refuses a subset of random tasks'
        self.train = images.train[: recipe.max_train_images]
        self.seed, self.note = seed, ""

    def epochs(self) -> Iterator[int]:
        """Trains and yields after every epoch; skips epochs that are on disk already.

        Raises:
            TrainingError: the network diverged.
        """
        if start_file(self.out).exists():
            yield self.recipe.base_epochs
            return
        net = construction.build_seeded(self.layout, self.seed).to(self.device).train()
        adam = torch.optim.Adam(
            net.parameters(), self.recipe.learning_rate, weight_decay=self.recipe.weight_decay
        )
        for epoch in range(self._restore(net, adam) + 1, self.recipe.base_epochs + 1):
            with seeded(self.seed + epoch, self.device):  # of dropout
                self._epoch(net, adam, epoch)
            self._checkpoint(net, adam, epoch)
            yield epoch
        tensors = _state(net)
        frozen = {name: value for name, value in tensors.items() if name not in self.layout.names}
        save_tensors(frozen_file(self.out, 0), frozen)
        save_tensors(start_file(self.out), {name: tensors[name] for name in self.layout.names})
        self._progress.unlink(missing_ok=True)

    def _epoch(self, net: nn.Module, adam: torch.optim.Adam, epoch: int) -> None:
        size, total = self.recipe.batch_size, torch.zeros((), device=self.device)
        order = torch.randperm(
            len(self.train), generator=torch.Generator().manual_seed(self.seed * 1_000 + epoch)
        )
        steps = len(order) // size
        for rows in order[: steps * size].split(size):
            x = self.layout.architecture.preprocess(self.train.images[rows].to(self.device))
            loss = F.cross_entropy(net(x), self.train.labels[rows].to(self.device))
            adam.zero_grad()
            loss.backward()
            adam.step()
            total += loss.detach()
        if not torch.isfinite(total):
            raise TrainingError(
                f"{self.recipe.name}: the base network diverged in epoch {epoch}; "
                "lower the learning rate"
            )
        self.note = f"loss {float(total) / steps:.3f}"

    @property
    def _progress(self) -> Path:
        return self.out / "progress-base.safetensors"

    def _checkpoint(self, net: nn.Module, adam: torch.optim.Adam, epoch: int) -> None:
        state = {f"net.{name}": value for name, value in _state(net).items()}
        for name, parameter in net.named_parameters():
            state |= {f"{key}.{name}": value for key, value in adam.state[parameter].items()}
        save_tensors(self._progress, state, {"epoch": str(epoch)})

    def _restore(self, net: nn.Module, adam: torch.optim.Adam) -> int:
        if not self._progress.exists():
            return 0
        state, about = load_tensors(self._progress)
        known = {name: state[f"net.{name}"] for name in _state(net)}
        net.load_state_dict(known, strict=False)  # second names of tied weights are not stored
        for name, parameter in net.named_parameters():
            kept = {key: state[f"{key}.{name}"] for key in _ADAM if f"{key}.{name}" in state}
            adam.state[parameter] = {
                key: value if key == "step" else value.to(parameter) for key, value in kept.items()
            }
        return int(about["epoch"])


def start_file(out: Path) -> Path:
    return out / "base.safetensors"


def load_base(layout: WeightLayout, out: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """The start of the subset's training, (1, D), and the frozen rest."""
    start, _ = load_tensors(start_file(out))
    frozen, _ = load_tensors(frozen_file(out, 0))
    return layout.pack({name: tensor[None] for name, tensor in start.items()}), frozen


def _state(net: nn.Module) -> dict[str, Tensor]:
    """A state dict in which a tied weight has one name, the layout's."""
    second = construction.second_names(net)
    return {name: value for name, value in net.state_dict().items() if name not in second}
