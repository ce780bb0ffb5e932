"""The meta-model: classifier heads from a support set by flow matching, one class's row at a time.

    head (W F + W,) = rows w_k (F + 1,), the weight and bias of class k
    w_k --standardise, VAE--> latent (4, 8, 8);   v(x_k, t; c_k) transports noise to it
    c_k = W_2 silu(W_1 [LN z_k; mean_j LN z_j]),  z_k the token of class k, of support and queries

Each class has its own path from noise to row, and classes interact only through a mean: another order of
classes gives the same rows in that order, for any number of ways. FLoWN generates whole heads, and has to
learn this symmetry from examples.

Sources of the flow: N(0, I), or the encoded rows of a nearest-centroid head and noise around them,
a (m_k - mean_j m_j) with m = (s + u) / 2, with the bias 0 (`centroid`) or -a |m_k|^2 / 2 + const
(`euclidean`, the nearest by distance). Axes: T tasks, n samples, W ways, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown import encoders, flow
from flown.base.config import Config
from flown.base.errors import FlownError
from flown.base.frozen import load_frozen, load_shipped, save_frozen
from flown.base.seeding import seeded
from flown.encoders import EncoderConfig, LinearConfig, VAEConfig
from flown.flow import VelocityConfig, samplers
from flown.flow.diffusion import diffusion_loss
from flown.heads.frames import ClassTokens, join_rows, split_heads, support_tokens
from flown.heads.heads import feature_head
from flown.training import History, TrainConfig, train
from flown.weights.layout import JointLayout, WeightLayout

_ROWS = 512  # rows sampled at once


class HeadFlowConfig(Config):
    """Sizes and trainings; the defaults are the CPU preset, `published()` has Table 6's VAE.

    The preset's VAE is linear and needs no training. `source` applies to flows only; `spread` is the
    standard deviation of the noise around encoded centroids.
    """

    encoder: EncoderConfig = LinearConfig(beta=1e-6)
    encoder_training: TrainConfig = TrainConfig(steps=2000, batch_size=256)
    velocity: VelocityConfig = VelocityConfig(
        channels=16, blocks=1, conditioning="concat", context_channels=4
    )
    process: Literal["flow", "diffusion", "v-diffusion", "latent-diffusion"] = "flow"
    source: Literal["gaussian", "centroid", "euclidean"] = "centroid"
    spread: float = 0.15
    flow_training: TrainConfig = TrainConfig(
        steps=1000, batch_size=160, learning_rate=2e-3, warmup=50, ema=0.99
    )
    context_dim: int = 256
    queries: bool = True
    seed: int = 0

    @classmethod
    def published(cls) -> HeadFlowConfig:
        """Table 6's sizes, for a GPU."""
        return cls(
            encoder=VAEConfig.published(few_shot=True), velocity=VelocityConfig(channels=128)
        )


class _Context(nn.Module):
    """Tokens (B, W, Z) to contexts (B, W, context_dim)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.first, self.second = nn.Linear(2 * size, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(tokens)
        x = torch.cat([x, x.mean(dim=1, keepdim=True).expand_as(x)], dim=2)
        return self.second(F.silu(self.first(x)))  # type: ignore[no-any-return]


def _row_layout(features: int) -> JointLayout:
    architecture = feature_head("linear-head", features, 1)
    return JointLayout.of([WeightLayout.of(nn.Linear(features, 1), architecture)])


class RowScale(nn.Module):
    """One mean and deviation for all rows' weights, one for all biases, fitted on training rows."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, features + 1))
        self.register_buffer("std", torch.ones(1, features + 1))

    def fit(self, rows: Tensor) -> None:
        """Fits on rows (B, F + 1)."""
        for part in (slice(0, -1), slice(-1, None)):
            values = rows[:, part].double()
            self.mean[:, part] = values.mean().float()
            self.std[:, part] = values.std(correction=0).clamp_min(1e-8).float()

    def forward(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) / self.std

    def invert(self, standard: Tensor) -> Tensor:
        return standard * self.std + self.mean


class HeadFlow(nn.Module):
    """A trained generator of heads; made by `fit_heads`."""

    def __init__(self, config: HeadFlowConfig, features: int, tokens: int) -> None:
        super().__init__()
        self.config, self.features = config, features
        joint = _row_layout(features)
        self.standardizer = RowScale(features)
        self.encoder = encoders.build(config.encoder, joint, joint.size)
        self.latent_shape = self.encoder.latent_shape
        self.velocity = flow.UNet(config.velocity, self.latent_shape, config.context_dim)
        self.context = _Context(tokens, config.context_dim)
        self.register_buffer(
            "stretch", torch.ones(())
        )  # ratio of the lengths of probed and centroid rows
        self.history: dict[str, History] = {}

    stretch: Tensor

    def save(self, path: Path | str) -> None:
        """One safetensors file in half precision, the config in its header."""
        save_frozen(self, path, "heads", self.config, {"features": str(self.features)})

    @classmethod
    def pretrained(cls) -> HeadFlow:
        """The generator that ships, trained by `flown.heads.pretrain`."""
        return load_shipped("flown.heads", "heads", cls.load)

    @classmethod
    def load(cls, path: Path | str) -> HeadFlow:
        """Reads what `save` wrote.

        Raises:
            FlownError: no such file, or no generator of heads.
        """

        def build(config: HeadFlowConfig, header: Mapping[str, str]) -> HeadFlow:
            features = header.get("features", "")
            if not features.isdecimal():
                raise FlownError(f"{path}: no generator of heads, 'features' is '{features}'")
            return cls(config, int(features), 2 * int(features))

        return load_frozen(path, "heads", "generator of heads", HeadFlowConfig, build)

    @property
    def device(self) -> torch.device:
        return self.standardizer.mean.device

    def encode(self, rows: Tensor) -> Tensor:
        """Rows (B, F + 1) to latents (B, 4, 8, 8)."""
        return self.encoder.encode(self.standardizer(rows))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, 8, 8) to rows (B, F + 1)."""
        return self.standardizer.invert(self.encoder.decode(latents))

    @torch.no_grad()
    def reconstruct(self, heads: Tensor, tasks: ClassTokens) -> Tensor:
        """decode(encode(w)) of the tasks' heads (T, W F + W), on the model's device."""
        tasks, heads = tasks.to(self.device), heads.to(self.device)
        rows = tasks.framed(split_heads(heads, tasks.tokens.shape[1]))
        found = [self.decode(self.encode(part)) for part in rows.flatten(0, 1).split(_ROWS)]
        return join_rows(tasks.unframed(torch.cat(found).view_as(rows)))

    def centroid_rows(self, tokens: Tensor) -> Tensor:
        """Rows (B, W, F + 1) of nearest-centroid heads, of the mean length of probed ones."""
        means, soft = tokens[..., : 2 * self.features].chunk(2, dim=2)
        means = (means + soft) / 2
        weight = self.stretch * (means - means.mean(dim=1, keepdim=True))
        bias = means.new_zeros(*means.shape[:2], 1)
        if self.config.source == "euclidean":
            bias = -self.stretch * means.square().sum(dim=2, keepdim=True) / 2
        return torch.cat([weight, bias - bias.mean(dim=1, keepdim=True)], dim=2)

    def start(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Samples x_0 of the source for tokens (B, W, Z): (B W, 4, 8, 8)."""
        shape = (tokens.shape[0] * tokens.shape[1], *self.latent_shape)
        return self.around(tokens, torch.randn(shape, generator=generator, device=tokens.device))

    def around(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """Samples x_0 (B W, 4, 8, 8) for tokens (B, W, Z) from standard noise of that shape."""
        if self.config.source == "gaussian" or self.config.process != "flow":
            return noise
        with torch.no_grad():
            return (
                self.encode(self.centroid_rows(tokens).flatten(0, 1)) + self.config.spread * noise
            )

    @torch.no_grad()
    def generate(
        self,
        tasks: ClassTokens,
        n: int = 50,
        seed: int = 0,
        solver: str | None = None,
        steps: int = 20,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Heads (T, n, W F + W) for tasks with these class tokens, on the model's device.

        Args:
            solver: `euler` and others for a flow, `ddim` or `ddpm` for a diffusion.
            noise: samples of the source (T, n, W, 4, 8, 8) in place of the seed's.

        Raises:
            FlownError: n < 1, features of another size, a solver unknown or not of this model.
        """
        tasks = tasks.to(self.device)
        tokens = tasks.tokens
        if n < 1 or tokens.ndim != 3 or tokens.shape[2] != self.context.norm.normalized_shape[0]:
            size, got = self.features, tokens.shape[2] // 2
            raise FlownError(
                f"heads: expected n of 1 or more and {size} features, got {n} and {got}"
            )
        ways = tokens.shape[1]
        contexts = self.context(tokens)
        found = []
        step = max(1, _ROWS // (n * ways))
        for i in range(0, len(tokens), step):
            repeated = tokens[i : i + step].repeat_interleave(n, dim=0)
            generator = torch.Generator(tokens.device).manual_seed(seed * 1_000_003 + i)
            x0 = (
                self.start(repeated, generator)
                if noise is None
                else noise[i : i + step].flatten(0, 2)
            )
            c = contexts[i : i + step].repeat_interleave(n, dim=0).flatten(0, 1)
            method = solver or ("euler" if self.config.process == "flow" else "ddim")
            solution = samplers.solve(
                self.config.process, self.velocity.bind(c), x0, method, steps, generator, False
            )
            rows = self.decode(solution.x).unflatten(0, (-1, ways))
            frames = tasks[i : i + step].repeated(n)
            found.append(join_rows(frames.unframed(rows)).unflatten(0, (-1, n)))
        return torch.cat(found)

    def mean_heads(self, tasks: ClassTokens, n: int = 16, seed: int = 0, steps: int = 5) -> Tensor:
        """The mean (T, W F + W) of n heads a task; all tasks and classes share the samples' noise.

        Classes in another order have the same rows in that order.
        """
        tasks = tasks.to(self.device)
        count, ways = tasks.tokens.shape[:2]
        generator = torch.Generator(tasks.tokens.device).manual_seed(seed)
        noise = torch.randn(
            1, n, 1, *self.latent_shape, generator=generator, device=tasks.tokens.device
        )
        each = noise.expand(count, n, ways, -1, -1, -1).flatten(0, 2)
        start = self.around(tasks.repeated(n).tokens, each).unflatten(0, (count, n, ways))
        return self.generate(tasks, n, steps=steps, noise=start).mean(dim=1)


@cache
def _shipped() -> HeadFlow:
    return HeadFlow.pretrained()


def flow_heads(support: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Heads (T, W F + W) for supports (T, S, F), the shipped backbone's features at length 1, labels (T, S).

    Each is the mean of 16 heads that the shipped generator samples from fixed noise. Images to label do
    not enter: on validation tasks they raised the accuracy only where classes had equal numbers of them.
    """
    return _shipped().mean_heads(support_tokens(support, labels, ways))


class _RowsObjective(nn.Module):
    def __init__(self, model: HeadFlow, rows: Tensor, batch: int) -> None:
        super().__init__()
        self.encoder, self.rows, self.batch = model.encoder, rows, batch

    def forward(self, generator: torch.Generator) -> Tensor:
        device = self.rows.device
        chosen = torch.randint(len(self.rows), (self.batch,), generator=generator, device=device)
        rows = self.rows[chosen]
        mask = torch.ones_like(rows, dtype=torch.bool)
        decoded, penalty = self.encoder.training_pass(rows, mask, generator)
        return (decoded - rows).square().mean() + penalty


class _FlowObjective(nn.Module):
    """Flow matching, or the diffusion loss, for rows under their class's context."""

    def __init__(self, model: HeadFlow, latents: Tensor, tokens: Tensor) -> None:
        super().__init__()
        self.velocity, self.context, self.model = model.velocity, model.context, [model]
        self.latents, self.tokens = latents, tokens  # (T, W, 4, 8, 8), (T, W, Z)

    def forward(self, generator: torch.Generator) -> Tensor:
        (model,) = self.model
        count = max(1, model.config.flow_training.batch_size // self.tokens.shape[1])
        device = self.tokens.device
        chosen = torch.randint(len(self.tokens), (count,), generator=generator, device=device)
        tokens, x1 = self.tokens[chosen], self.latents[chosen].flatten(0, 1)
        contexts = self.context(tokens).flatten(0, 1)
        if model.config.process != "flow":
            return diffusion_loss(self.velocity, x1, contexts, generator, model.config.process)
        x0 = model.start(tokens, generator)
        return flow.flow_matching_loss(self.velocity, x0, x1, contexts, generator=generator)


def _fit_encoder(
    model: HeadFlow, standard: Tensor, out: Path, resume: bool, device: torch.device | str
) -> None:
    """Trains the encoder on standardised rows (B, F + 1); a linear one has a closed form."""
    config = model.config
    if isinstance(model.encoder, encoders.Linear):
        model.encoder.fit(standard)
        return
    objective = _RowsObjective(model, standard, config.encoder_training.batch_size)
    model.history["encoder"] = train(
        objective,
        config.encoder_training,
        out=out,
        name="encoder",
        seed=config.seed,
        resume=resume,
        device=device,
    )
    model.encoder.fit_scale(standard[:8192])


def fit_heads(
    heads: Tensor,
    tasks: ClassTokens,
    config: HeadFlowConfig | None = None,
    *,
    out: Path | str,
    resume: bool = False,
    like: HeadFlow | None = None,
    device: torch.device | str = "cpu",
) -> HeadFlow:
    """Trains a generator on probed heads (T, W F + W) and their tasks' class tokens.

    Args:
        out: the folder of the checkpoints; `resume` continues from them.
        like: a model whose encoder is reused: the same latent space for another flow.

    Raises:
        FlownError: heads and tokens do not fit, or as `flown.training.train`.
    """
    config = config or HeadFlowConfig()
    tokens, ways = tasks.tokens, tasks.tokens.shape[1]
    features = tasks.centre.shape[1]
    if tuple(heads.shape) != (want := (len(tokens), ways * features + ways)):
        raise FlownError(f"heads: expected {want} for these tasks, got {tuple(heads.shape)}")
    tasks = tasks.to(device)
    tokens = tasks.tokens
    rows = tasks.framed(split_heads(heads.to(device), ways))
    with seeded(config.seed):  # parameters are initialised by torch's own rules
        model = HeadFlow(config, features, tokens.shape[2])
    flat = rows.flatten(0, 1)
    shared: dict[str, Any] = {} if like is None else like.state_dict()
    if like is None:
        model.standardizer.fit(flat.cpu())
        model.to(device)
        standard = model.standardizer(flat)
        _fit_encoder(model, standard, Path(out), resume, device)
        means = tokens[..., :features]
        distance = (means - means.mean(dim=1, keepdim=True)).norm(dim=2).mean()
        model.stretch.copy_(rows[..., :-1].norm(dim=2).mean() / distance)
    else:
        reused = {
            k: v
            for k, v in shared.items()
            if k.startswith(("encoder.", "standardizer.", "stretch"))
        }
        model.to(device).load_state_dict(reused, strict=False)
    model.encoder.requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([model.encode(part) for part in flat.split(_ROWS)])
    objective_ = _FlowObjective(model, latents.unflatten(0, (-1, ways)), tokens)
    model.history["flow"] = train(
        objective_,
        config.flow_training,
        out=Path(out),
        name="flow",
        seed=config.seed + 1,
        resume=resume,
        device=device,
    )
    return model.eval().requires_grad_(False)
