"""The losses: of the weight encoder (FLoWN, eq. 2), and of the flow on its latents (eq. 1)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown import flow
from flown.context.head import ContextHead
from flown.context.tokens import Contexts
from flown.encoders import Encoder
from flown.encoders.functional import FunctionalError
from flown.flow.diffusion import diffusion_loss
from flown.flow.semidiscrete import SemiDiscrete
from flown.generator.config import FlownConfig
from flown.generator.data import TrainingSet


class Sampler:
    """Scaled networks of a training set on a device, with their outputs in any order."""

    def __init__(self, networks: TrainingSet, device: str) -> None:
        self.networks, self.device = networks, device
        self.scale = copy.deepcopy(networks.scale).to(device)
        self.layouts = networks.train.layouts.to(device)
        self.tasks = networks.train.tasks.to(device)

    def vectors(self, rows: Tensor, orders: Tensor | None = None) -> Tensor:
        """Networks `rows` (b,), scaled (b, D + 2 T), their outputs permuted by `orders` (b, C)."""
        vectors = self.networks.train[rows.cpu()].to(self.device)
        if orders is None:
            return vectors
        layouts = self.layouts[rows]
        raw = self.scale.invert(vectors, layouts)
        moved = self.networks.joint.permute_classes(raw, orders)
        return self.scale(moved, layouts)  # type: ignore[no-any-return]


class EncoderObjective(nn.Module):
    """Reconstruction error at each network's scale, the latent's penalty, functional errors."""

    def __init__(
        self,
        encoder: Encoder,
        sampler: Sampler,
        config: FlownConfig,
        functions: FunctionalError | None,
    ) -> None:
        super().__init__()
        self.encoder, self.sampler, self.config = encoder, sampler, config
        self.functions = functions
        self.permute = config.context.permute and config.context.mode != "none"

    def forward(self, generator: torch.Generator) -> Tensor:
        sampler, batch = self.sampler, self.config.encoder_training.batch_size
        rows = torch.randint(
            len(sampler.tasks), (batch,), generator=generator, device=generator.device
        ).to(sampler.device)
        layouts = sampler.layouts[rows]
        orders = sampler.networks.orders(layouts, generator) if self.permute else None
        vectors = sampler.vectors(rows, orders)
        decoded, penalty = self.encoder.training_pass(
            vectors, sampler.scale.mask(layouts), generator
        )
        error = sampler.scale.error(decoded, vectors, layouts)
        loss: Tensor = self.config.functional.mse * error + penalty
        if self.functions is not None:
            loss = loss + self.functions(decoded, vectors, sampler.tasks[rows], generator)
        return loss


class FlowObjective(nn.Module):
    """Flow matching (eq. 1), or the diffusion loss, on latents under fresh support sets.

    With several layouts, the cross-entropy of `form` on the context teaches which layout suits a
    support set.

    Args:
        latents: (n, *L), or a path's marginals (m, K, *L); `layouts` and `tasks` (n or m,).
        encode: latents of rows (b,) with their outputs in other orders (b, C), where classes are
            permuted in training.
        transport: which network each source sample travels to; else they are drawn apart and coupled.
    """

    def __init__(
        self,
        velocity: flow.UNet,
        head: ContextHead | None,
        form: nn.Linear | None,
        source: flow.Source,
        config: FlownConfig,
        latents: Tensor,
        layouts: Tensor,
        tasks: Tensor,
        contexts: Contexts | None,
        path: flow.Path | None = None,
        encode: Callable[[Tensor, Tensor], Tensor] | None = None,
        orders: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        transport: SemiDiscrete | None = None,
    ) -> None:
        super().__init__()
        self.velocity, self.head, self.form = velocity, head, form
        self.source, self.config, self.contexts = source, config, contexts
        self.latents, self.layouts, self.tasks, self.path = latents, layouts, tasks, path
        self.encode, self.orders = encode, orders
        self.transport = transport
        self.couple = None if transport else flow.COUPLINGS[config.flow.coupling]
        # Every task is drawn equally often, however many networks it has.
        self.chances = 1.0 / torch.bincount(tasks).clamp_min(1)[tasks].double()

    def forward(self, generator: torch.Generator) -> Tensor:
        batch = self.config.flow_training.batch_size
        rows = torch.multinomial(self.chances, batch, replacement=True, generator=generator)
        tasks, layouts, x0 = self.tasks[rows], self.layouts[rows], None
        if self.transport is not None:
            x0 = self.source.sample(layouts, generator)
            rows = self.transport(x0, tasks)
        tokens = None if self.contexts is None else self.contexts.draw(tasks, generator)
        if tokens is not None and self.encode is not None and self.orders is not None:
            orders = self.orders(layouts, generator)
            x1 = self.encode(rows, orders)
            tokens = tokens.gather(1, orders[..., None].expand_as(tokens))
        else:
            x1 = self.latents[rows]
        if self.config.flow.process == "flow" and self.couple is not None:
            first = x1 if self.path is None else x1[:, 0]
            x0 = self.couple(self.source.sample(layouts, generator), first, tasks, generator)
        context, loss = None, x1.new_zeros(())
        if tokens is not None and self.head is not None:
            context = self.head(tokens)
            if self.form is not None:
                loss = F.cross_entropy(self.form(context), layouts)
        if x0 is None:
            process = self.config.flow.process
            return loss + diffusion_loss(self.velocity, x1, context, generator, process)
        t = None
        if self.config.flow.times == "early":
            t = torch.rand(batch, generator=generator, device=x1.device).square()
        return loss + flow.flow_matching_loss(
            self.velocity,
            x0,
            x1,
            context,
            t=t,
            sigma=self.config.flow.sigma,
            generator=generator,
            path=self.path,
            loss=self.config.flow.loss,
        )
