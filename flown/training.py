"""The one training loop: AdamW, warm-up and cosine decay, EMA, validation, checkpoints, resume.

It knows an objective, not a model: an `nn.Module` whose `forward(generator)` draws its own batch and
returns the loss. The generator of step i depends on the seed and i alone, so that a resumed run
draws what the uninterrupted one would have drawn. Runs under Hugging Face `accelerate`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flown.config import Config
from flown.errors import FlownError, TrainingError
from flown.files import load_tensors, save_tensors
from flown.progress import bar

History = list[dict[str, float]]


class TrainConfig(Config):
    """How long and how fast; `ema` is the decay per step, 0 turns it off."""

    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 2e-6
    warmup: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    ema: float = 0.999
    clip: float = 1.0
    checkpoint_every: int = 500
    validate_every: int = 500


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step: the same for a seed and a step, on any run."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def train(
    objective: nn.Module,
    config: TrainConfig,
    *,
    out: Path,
    name: str,
    seed: int = 0,
    resume: bool = False,
    validate: Callable[[], Mapping[str, float]] | None = None,
    device: str = "cpu",
) -> History:
    """Minimises `objective(generator)` and leaves the averaged weights in it.

    Args:
        out: the folder of the checkpoint `<name>.checkpoint.safetensors`.
        name: what is being trained, for files, progress and errors.
        resume: go on from that checkpoint, if there is one.
        validate: figures to record, called every `validate_every` steps with averaged weights.

    Returns:
        One record of step, loss and validation figures per validation.

    Raises:
        TrainingError: the loss is NaN or Inf.
        FlownError: no steps, or the checkpoint belongs to another model.
    """
    from accelerate import Accelerator

    if config.steps < 1 or config.batch_size < 1:
        raise FlownError(f"{name}: steps and batch_size must be at least 1")
    accelerator = Accelerator(cpu=device == "cpu")
    objective.to(accelerator.device)
    trained = {k: p for k, p in objective.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    average = {k: p.detach().clone() for k, p in trained.items()}
    history: History = []
    path = out / f"{name}.checkpoint.safetensors"
    first = _restore(path, objective, trained, average, optimizer, history) if resume else 0
    prepared, fast = accelerator.prepare(objective, optimizer)
    loss_sum, count = 0.0, 0
    prepared.train()
    with bar(f"training {name}", config.steps, first) as update:
        for step in range(first, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _rate(config, step)
            rank_seed = seed + 7919 * accelerator.process_index
            loss = prepared(step_generator(rank_seed, step, accelerator.device))
            fast.zero_grad()
            accelerator.backward(loss)
            if config.clip:
                accelerator.clip_grad_norm_(trained.values(), config.clip)
            fast.step()
            _average(average, trained, config.ema, step)
            loss_sum, count = loss_sum + loss.detach(), count + 1
            done = step + 1
            last = done == config.steps
            if last or done % config.validate_every == 0:
                record = {"step": float(done), "loss": _finite(loss_sum / count, name, done)}
                if validate is not None:
                    with _swapped(trained, average, objective):
                        record |= validate()
                history.append(record)
                loss_sum, count = 0.0, 0
                update(done, "  ".join(f"{k} {v:.4g}" for k, v in record.items() if k != "step"))
            elif done % 20 == 0:
                update(done, f"loss {_finite(loss_sum / count, name, done):.4g}")
            if (last or done % config.checkpoint_every == 0) and accelerator.is_main_process:
                _finite(loss.detach(), name, done)
                _save(path, done, objective, trained, average, optimizer, history)
    _load_average(trained, average)
    objective.eval()
    return history


def _rate(config: TrainConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def _finite(loss: Any, name: str, step: int) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise TrainingError(f"{name}: the loss is {value} at step {step}; lower the learning rate")
    return value


@torch.no_grad()
def _average(average: dict[str, Tensor], trained: dict[str, nn.Parameter], ema: float,
             step: int) -> None:  # fmt: skip
    decay = min(ema, (1 + step) / (10 + step))  # the first steps are not worth remembering
    targets = [p.data for p in trained.values()]
    torch._foreach_lerp_(list(average.values()), targets, 1 - decay)


class _swapped:
    """Inside, the model has its averaged weights and is in eval mode."""

    def __init__(self, trained: dict[str, nn.Parameter], average: dict[str, Tensor],
                 module: nn.Module) -> None:  # fmt: skip
        self.trained, self.average, self.module = trained, average, module

    def __enter__(self) -> None:
        self.backup = {k: p.detach().clone() for k, p in self.trained.items()}
        _load_average(self.trained, self.average)
        self.module.eval()

    def __exit__(self, *error: object) -> None:
        _load_average(self.trained, self.backup)
        self.module.train()


def _load_average(trained: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for key, parameter in trained.items():
        parameter.data.copy_(values[key])


def _save(path: Path, step: int, objective: nn.Module, trained: dict[str, nn.Parameter],
          average: dict[str, Tensor], optimizer: torch.optim.Optimizer,
          history: History) -> None:  # fmt: skip
    state = {f"weights.{k}": p for k, p in trained.items()}
    state |= {f"buffers.{k}": b for k, b in objective.named_buffers()}
    state |= {f"average.{k}": v for k, v in average.items()}
    for key, parameter in trained.items():
        state |= {f"{s}.{key}": v for s, v in optimizer.state[parameter].items()}
    shared = {k: v.clone() for k, v in state.items()}  # safetensors refuses aliases
    save_tensors(path, shared, {"step": str(step), "history": json.dumps(history)})


def _restore(path: Path, objective: nn.Module, trained: dict[str, nn.Parameter],
             average: dict[str, Tensor], optimizer: torch.optim.Optimizer,
             history: History) -> int:  # fmt: skip
    if not path.exists():
        return 0
    state, about = load_tensors(path)
    buffers = dict(objective.named_buffers())
    expected = {f"weights.{k}" for k in trained} | {f"buffers.{k}" for k in buffers}
    if missing := sorted(expected - set(state)):
        raise FlownError(f"{path}: belongs to another model, '{missing[0]}' is missing")
    for key, parameter in trained.items():
        if state[f"weights.{key}"].shape != parameter.shape:
            got, want = tuple(state[f"weights.{key}"].shape), tuple(parameter.shape)
            raise FlownError(f"{path}: belongs to another model, '{key}' is {got}, expected {want}")
        parameter.data.copy_(state[f"weights.{key}"])
        average[key].copy_(state[f"average.{key}"])
        optimizer.state[parameter] = {
            "step": state[f"step.{key}"],
            "exp_avg": state[f"exp_avg.{key}"].to(parameter.device),
            "exp_avg_sq": state[f"exp_avg_sq.{key}"].to(parameter.device),
        }
    for key, buffer in buffers.items():
        buffer.copy_(state[f"buffers.{key}"])
    history.extend(json.loads(about["history"]))
    return int(about["step"])
