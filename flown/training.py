"""The one training loop: AdamW, warm-up and cosine decay, EMA, validation, checkpoints, resume.

It knows an objective, not a model: an `nn.Module` whose `forward(generator)` draws its own batch and
returns the loss. The generator of step i depends on the seed and i alone, so that a resumed run
draws what the uninterrupted one would have drawn. One process trains on one device, given by name;
another run of the same process may have another.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, Optional

import torch
from pydantic import Field
from torch import Tensor, nn

from flown.base.config import Config
from flown.base.errors import FlownError, TrainingError, unknown
from flown.base.files import load_tensors, save_tensors
from flown.base.progress import bar

History = list[dict[str, float]]
_ADAM = ("step", "exp_avg", "exp_avg_sq")


class LoopConfig(Config):
    """What the loop reads: how long and how fast; `ema` is the decay per step, 0 turns it off.

    `choose` names a figure of validation: the averaged weights with which it was largest are kept,
    in place of the last ones; those before the first step count too.
    """

    steps: int = 3000
    learning_rate: float = 1e-3
    weight_decay: float = 2e-6
    warmup: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    ema: float = 0.999
    clip: float = 1.0
    checkpoint_every: int = 500
    validate_every: int = 500
    choose: Optional[str] = None


class TrainConfig(LoopConfig):
    """The same, and `batch_size`, for objectives that draw so many networks, images or tasks a step."""

    batch_size: int = Field(default=64, ge=1)


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step: the same for a seed and a step, on any run."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def train(
    objective: nn.Module,
    config: LoopConfig,
    *,
    out: Path,
    name: str,
    seed: int = 0,
    resume: bool = False,
    validate: Callable[[], Mapping[str, float]] | None = None,
    device: torch.device | str = "cpu",
) -> History:
    """Minimises `objective(generator)` and leaves the averaged weights in it, the last or the best.

    Args:
        out: the folder of the checkpoint `<name>.checkpoint.safetensors`.
        name: what is being trained, for files, progress and errors.
        resume: go on from that checkpoint, if there is one.
        validate: figures to record, called every `validate_every` steps with averaged weights.
        device: where `objective` is moved, and its random numbers are drawn.

    Returns:
        One record of step, loss and validation figures per validation.

    Raises:
        TrainingError: the loss is NaN or Inf.
        FlownError: no steps, the checkpoint belongs to another model, or nothing is called `choose`.
    """
    if config.steps < 1:
        raise FlownError(f"{name}: steps must be at least 1")
    run = _Run(objective, config, torch.device(device), seed)
    path = out / f"{name}.checkpoint.safetensors"
    first = run.restore(path) if resume else 0
    if config.choose and validate is not None and not first:
        with run.averaged():
            figures = validate()
        run.note({"step": 0.0, **figures})
    with bar(f"training {name}", config.steps, first) as update:
        for step in range(first, config.steps):
            run.advance(step)
            done = step + 1
            last = done == config.steps
            if last or done % config.validate_every == 0:
                record = {"step": float(done), "loss": _mean(run.losses, name, done)}
                if validate is not None:
                    with run.averaged():
                        record |= validate()
                run.note(record)
                run.losses.clear()
                update(done, "  ".join(f"{k} {v:.4g}" for k, v in record.items() if k != "step"))
            elif done % 20 == 0:
                update(done, f"loss {_mean(run.losses, name, done):.4g}")
            if last or done % config.checkpoint_every == 0:
                _mean(run.losses[-1:], name, done)
                run.save(path, done)
    run.finish()
    return run.history


def _rate(config: LoopConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def _mean(losses: list[Tensor], name: str, step: int) -> float:
    """The mean of the losses, 0 of none; raises TrainingError where it is NaN or Inf."""
    value = float(torch.stack(losses).mean()) if losses else 0.0
    if not math.isfinite(value):
        raise TrainingError(f"{name}: the loss is {value} at step {step}; lower the learning rate")
    return value


class _Run:
    """All that a run is, but its random numbers: parameters, average, optimiser, history.

    `losses` are those of the steps since the last validation.
    """

    def __init__(
        self, objective: nn.Module, config: LoopConfig, device: torch.device, seed: int
    ) -> None:
        self.objective, self.config = objective.to(device), config
        self.device, self.seed = device, seed
        self.trained = {k: p for k, p in objective.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.average = {k: p.detach().clone() for k, p in self.trained.items()}
        self.best: dict[str, Tensor] = {}
        self.history: History = []
        self.losses: list[Tensor] = []
        self.objective.train()

    def advance(self, step: int) -> None:
        """One step of the optimiser."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * _rate(self.config, step)
        loss: Tensor = self.objective(step_generator(self.seed, step, self.device))
        self.optimizer.zero_grad()
        loss.backward()
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip)
        self.optimizer.step()
        self.follow(self.config.ema, step)
        self.losses.append(loss.detach())

    @torch.no_grad()
    def follow(self, ema: float, step: int) -> None:
        """Moves the average towards the parameters."""
        decay = min(ema, (1 + step) / (10 + step))  # the first steps are not worth remembering
        targets = [p.data for p in self.trained.values()]
        torch._foreach_lerp_(list(self.average.values()), targets, 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has its averaged weights and is in eval mode."""
        backup = {k: p.detach().clone() for k, p in self.trained.items()}
        self.keep_average()
        yield
        self._fill(backup)
        self.objective.train()

    def note(self, record: dict[str, float]) -> None:
        """Adds to the history; remembers the averaged weights if their figure is the largest so far."""
        key = self.config.choose
        if key and key not in record:
            raise unknown("figure", key, record)
        if key and all(record[key] > before[key] for before in self.history):
            self.best = {k: v.clone() for k, v in self.average.items()}
        self.history.append(record)

    def finish(self) -> None:
        """The averaged weights, the best if they are chosen, become the model's own."""
        self.average |= self.best
        self.keep_average()

    def keep_average(self) -> None:
        """The averaged weights become the model's own."""
        self._fill(self.average)
        self.objective.eval()

    def _fill(self, values: dict[str, Tensor]) -> None:
        for key, parameter in self.trained.items():
            parameter.data.copy_(values[key])

    def save(self, path: Path, step: int) -> None:
        state: dict[str, Tensor] = {f"weights.{k}": p for k, p in self.trained.items()}
        state |= {f"buffers.{k}": b for k, b in self.objective.named_buffers()}
        state |= {f"average.{k}": v for k, v in self.average.items()}
        state |= {f"best.{k}": v for k, v in self.best.items()}
        if self.losses:
            state["losses"] = torch.stack(self.losses)
        for key, parameter in self.trained.items():
            state |= {f"{s}.{key}": v for s, v in self.optimizer.state[parameter].items()}
        apart = {k: v.clone() for k, v in state.items()}  # safetensors refuses aliases
        save_tensors(path, apart, {"step": str(step), "history": json.dumps(self.history)})

    def restore(self, path: Path) -> int:
        """Takes everything from a checkpoint, if there is one; returns the steps it has seen."""
        if not path.exists():
            return 0
        state, about = load_tensors(path)
        buffers = dict(self.objective.named_buffers())
        expected = {f"weights.{k}" for k in self.trained} | {f"buffers.{k}" for k in buffers}
        if missing := sorted(expected - set(state)):
            raise FlownError(f"{path}: belongs to another model, '{missing[0]}' is missing")
        for key, parameter in self.trained.items():
            got, want = tuple(state[f"weights.{key}"].shape), tuple(parameter.shape)
            if got != want:
                raise FlownError(
                    f"{path}: belongs to another model, '{key}' is {got}, expected {want}"
                )
            parameter.data.copy_(state[f"weights.{key}"])
            self.average[key].copy_(state[f"average.{key}"])
            if f"best.{key}" in state:
                self.best[key] = state[f"best.{key}"].to(parameter.device)
            if f"step.{key}" in state:  # no loss may have reached it yet
                self.optimizer.state[parameter] = {
                    k: state[f"{k}.{key}"].to(parameter.device) for k in _ADAM
                }
        for key, buffer in buffers.items():
            buffer.copy_(state[f"buffers.{key}"])
        if "losses" in state:
            self.losses = list(state["losses"].to(self.device))
        self.history = json.loads(about["history"])
        return int(about["step"])
