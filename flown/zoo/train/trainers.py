"""Many networks trained at once, on either of two engines that differ in speed only.

`Threads` runs compiled plain networks beside each other on a CPU's cores, `Stacked` anything else
and everything on a GPU, as one batched network. Both do the same arithmetic: cross-entropy and Adam
(Kingma and Ba 2015, PyTorch's defaults, weight decay added to the gradient).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.nets.architecture import Architecture
from flown.nets.batched import stacked
from flown.weights import construction
from flown.weights.layout import WeightLayout

if TYPE_CHECKING:
    from flown.nets.batched.program import Program


class Trainer(Protocol):
    """n networks in training; what an interruption must not lose are these two tensors."""

    vectors: Tensor  # (n, D)
    moments: Tensor  # (n, 2, D), Adam's

    def run(self, rows: Tensor, labels: Tensor, step: int, scale: Tensor | None = None) -> Tensor:
        """Trains on the images `rows` (n, K) of the pool, in that order, under `labels` (n, K).

        Each network has its own. `step` is the number of steps made before; an incomplete last batch
        is left out. `scale`: what each of these steps multiplies the learning rates by, float64
        (K // batch,).

        Returns the sums of the losses (n,): NaN or Inf where a network diverged.
        """


def trainer(
    net: nn.Module,
    layout: WeightLayout,
    vectors: Tensor,
    x: Tensor,
    batch: int,
    rates: Sequence[float],
    decays: Sequence[float],
    device: str,
    frozen: Mapping[str, Tensor] | None = None,
) -> Trainer:
    """The fastest trainer for these networks.

    Args:
        net: the architecture. vectors: (n, D), where training begins.
        x: images (N, c, H, W), preprocessed; with `frozen` also uint8, preprocessed batch by batch.
        rates, decays: learning rate and weight decay of each network.
        frozen: the other tensors by name, where the layout is of a subset.

    Raises:
        FlownError: a forward pass in the mode that `net` is in changes a buffer.
    """
    if device == "cpu" and frozen is None:
        found = Threads.of(net, vectors, x, batch, rates, decays)
        if found is not None:
            return found
    made = Stacked(net, layout, vectors, x, batch, rates, decays, device, frozen)
    seen = prepared(layout.architecture, made.x[:2])
    construction.check_buffers_stay(made.net, layout.net, seen, made.frozen)
    return made


def prepared(architecture: Architecture, images: Tensor) -> Tensor:
    """Images (..., c, H, W) as networks take them: uint8 ones are preprocessed."""
    if images.dtype != torch.uint8:
        return images
    ready: Tensor = architecture.preprocess(images.flatten(0, -4)).unflatten(0, images.shape[:-3])
    return ready


class Threads:
    """Networks as compiled programs, each in one thread, as many at once as torch has threads."""

    def __init__(
        self,
        program: Program,
        vectors: Tensor,
        x: Tensor,
        batch: int,
        rates: Sequence[float],
        decays: Sequence[float],
    ) -> None:
        self.program, self.batch, self.rates, self.decays = program, batch, rates, decays
        self.x = x.contiguous().numpy()
        self.vectors = vectors.clone()
        self.moments = vectors.new_zeros(len(vectors), 2, vectors.shape[1])

    @classmethod
    def of(
        cls,
        net: nn.Module,
        vectors: Tensor,
        x: Tensor,
        batch: int,
        rates: Sequence[float],
        decays: Sequence[float],
    ) -> Threads | None:
        """None when the network is not a plain sequence of layers that can be compiled."""
        from flown.nets.batched.program import Program  # numba takes a second to import

        program = Program.of(net, (x.shape[1], x.shape[2], x.shape[3]))
        return None if program is None else cls(program, vectors, x, batch, rates, decays)

    def run(self, rows: Tensor, labels: Tensor, step: int, scale: Tensor | None = None) -> Tensor:
        from flown.nets.batched.compiled import train_epoch

        if scale is None:
            scale = torch.ones(rows.shape[1] // self.batch, dtype=torch.float64)

        def one(i: int) -> float:
            return train_epoch(
                self.program,
                self.x,
                rows[i].numpy(),
                labels[i].numpy(),
                self.batch,
                self.vectors[i].numpy(),
                self.moments[i].numpy(),
                step,
                (self.rates[i] * scale).numpy(),
                self.decays[i],
            )

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return torch.tensor(list(pool.map(one, range(len(self.vectors)))))


class Stacked:
    """Networks as one batched network, in torch."""

    def __init__(
        self,
        net: nn.Module,
        layout: WeightLayout,
        vectors: Tensor,
        x: Tensor,
        batch: int,
        rates: Sequence[float],
        decays: Sequence[float],
        device: str,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.net, self.layout, self.batch = net.to(device), layout, batch
        self.frozen = {name: tensor.to(device) for name, tensor in (frozen or {}).items()}
        self.x = x.contiguous().to(device)
        self.vectors = vectors.to(device, copy=True)
        self.moments = self.vectors.new_zeros(len(vectors), 2, vectors.shape[1])
        self.rates = torch.tensor(rates, device=device)[:, None]
        self.decays = torch.tensor(decays, device=device)[:, None]

    def run(self, rows: Tensor, labels: Tensor, step: int, scale: Tensor | None = None) -> Tensor:
        total = torch.zeros(len(self.vectors), device=self.vectors.device)
        rows, labels = rows.to(self.vectors.device), labels.to(self.vectors.device)
        for k in range(rows.shape[1] // self.batch):
            part = slice(k * self.batch, (k + 1) * self.batch)
            rates = self.rates if scale is None else self.rates * float(scale[k])
            total += self._step(rows[:, part], labels[:, part], step + k + 1, rates)
        return total.cpu()

    def _step(self, rows: Tensor, labels: Tensor, step: int, rates: Tensor) -> Tensor:
        leaf = self.vectors.detach().requires_grad_()
        # One order for all, and what is frozen runs once for all.
        once = bool(self.frozen) and bool((rows == rows[0]).all())
        images = prepared(self.layout.architecture, self.x[rows[0] if once else rows])
        logits = stacked.forward(self.net, self.layout.unpack(leaf), images, self.frozen)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses: Tensor = loss.unflatten(0, labels.shape).mean(dim=1)  # (n,)
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        with torch.no_grad():
            grad += self.decays * self.vectors
            mean, square = self.moments.unbind(1)
            mean.mul_(0.9).add_(grad, alpha=0.1)
            square.mul_(0.999).addcmul_(grad, grad, value=0.001)
            spread = (square.sqrt() / (1 - 0.999**step) ** 0.5).add_(1e-8)
            self.vectors -= rates / (1 - 0.9**step) * mean / spread
        return losses.detach()
