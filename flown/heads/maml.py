"""First-order MAML on cached features (Finn et al. 1703.03400; Nichol et al. 1803.02999).

    logits_k = v_k . relu(A x + a) + b_k,   theta = (A, a, v, b)
    theta_task = theta after a few steps of gradient descent on the support's cross-entropy

The common start of all tasks is learnt on the queries of meta-training tasks, with a step size for each
tensor; the gradients of the inner steps count as constants (first order). All classes start from the
same row v and bias b, as in Ye & Chao's UnicornMAML (2106.16245): the result does not depend on the
numbering of classes, and works for any number of ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.base.seeding import seeded
from flown.context import FeatureSet
from flown.context.episodes import EpisodeLoss
from flown.heads.classifiers import accuracy
from flown.tasks import Episodes, check_disjoint
from flown.training import TrainConfig, train


class MAMLConfig(Config):
    """`steps` inner steps; `rate` is the step size at the start of meta-training."""

    features: int = 512
    hidden: int = 128
    steps: int = 10
    rate: float = 0.3


class MAML(nn.Module):
    """Logits (T, N, W) at queries after adapting to supports."""

    def __init__(self, config: MAMLConfig) -> None:
        super().__init__()
        self.config = config
        body = nn.Linear(config.features, config.hidden)
        row = nn.Linear(config.hidden, 1)
        self.start = nn.ParameterList([body.weight, body.bias, row.weight, row.bias])
        self.rates = nn.Parameter(torch.full((4,), config.rate).log())

    def forward(self, support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
        """Logits (T, N, W) at queries (T, N, F), from supports (T, S, F) with labels (T, S).

        Raises:
            FlownError: features of another length.
        """
        if support.shape[2] != self.config.features:
            raise FlownError(
                f"maml: features have {support.shape[2]} numbers, "
                f"it was trained on {self.config.features}"
            )
        tasks = len(support)
        repeats = (1, 1, ways, ways)  # a row and a bias for every class
        adapted = [
            p.expand(tasks, *p.shape) if n == 1 else p.expand(tasks, n, *p.shape[1:])
            for p, n in zip(self.start, repeats, strict=True)
        ]
        for _ in range(self.config.steps):
            leaves = [p.detach().requires_grad_() for p in adapted]
            with torch.enable_grad():
                logits = _run(leaves, support)
                loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
                slopes = torch.autograd.grad(loss / labels.shape[1], leaves)
            adapted = [p - r * s for p, r, s in zip(adapted, self.rates.exp(), slopes, strict=True)]
        return _run(adapted, query)


def _run(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Logits (T, N, W) of networks with weights (T, H, F), (T, H), (T, W, H), (T, W)."""
    body, bias, rows, last = weights
    hidden = torch.baddbmm(bias[:, None], x, body.transpose(1, 2)).relu()
    return torch.baddbmm(last[:, None], hidden, rows.transpose(1, 2))


def maml(tasks: Episodes, model: MAML) -> Tensor:
    """Logits (T, W Q, W) of a meta-trained model, 64 tasks at a time."""
    parts = [tasks.part(slice(i, i + 64)) for i in range(0, len(tasks.support), 64)]
    with torch.no_grad():
        return torch.cat([model(p.support, p.labels, p.query, p.ways) for p in parts])


def train_maml(
    sets: Sequence[FeatureSet],
    config: MAMLConfig,
    training: TrainConfig,
    *,
    out: Path | str,
    size: tuple[int, int, int] = (5, 1, 5),
    seed: int = 0,
    resume: bool = False,
    device: str = "cpu",
) -> MAML:
    """Meta-trains on tasks of the `train` classes; its history follows the `val` classes.

    Args:
        sets: cached features, standardised; every step's tasks come from a random one of them.
        size: ways, shots and queries of a task.
        out: the folder of the checkpoint `maml.checkpoint.safetensors`.

    Raises:
        FlownError: no set, parts that share a class, features of another length than
            `config.features`, or too few classes or images.
    """
    if not sets:
        raise FlownError("train_maml: no set of features given")
    for known in sets:
        check_disjoint(known.class_split)
    with seeded(seed):
        model = MAML(config)
    held_out = [
        known.pool("val")
        .draw(*size, torch.Generator().manual_seed(0), count=100)
        .gather(known.features)
        for known in sets
    ]
    pools = [(known.features, known.pool("train")) for known in sets]

    def draw(generator: torch.Generator) -> Episodes:
        place = int(torch.randint(len(pools), (1,), generator=generator))
        features, pool = pools[place]
        return pool.draw(*size, generator, training.batch_size).gather(features)

    def logits(tasks: Episodes, _: torch.Generator) -> Tensor:
        found: Tensor = model(tasks.support, tasks.labels, tasks.query, tasks.ways)
        return found

    def validate() -> dict[str, float]:
        trained_on = model.rates.device
        model.cpu()
        means = [float(accuracy(maml(tasks, model), tasks).mean()) for tasks in held_out]
        model.to(trained_on)
        return {"accuracy": sum(means) / len(means)}

    objective = EpisodeLoss(model, draw, logits)
    train(
        objective,
        training,
        out=Path(out),
        name="maml",
        seed=seed,
        resume=resume,
        validate=validate,
        device=device,
    )
    return model.requires_grad_(False).eval()
