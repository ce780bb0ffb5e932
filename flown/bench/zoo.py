"""Training a zoo against a plain PyTorch loop: one model after another."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown import tasks as data
from flown.base.progress import bar
from flown.base.provenance import Row
from flown.bench.timing import medians, spread
from flown.measure.evaluate import evaluate as accuracy
from flown.weights.batch import WeightBatch
from flown.weights.layout import WeightLayout
from flown.zoo import Recipe
from flown.zoo.train.shard import initial
from flown.zoo.train.train import layout_for
from flown.zoo.train.trainers import Threads, Trainer, trainer

MODELS = 64
GROWTH = (1, 8, 64)
_LOOPED = 4  # models of a timed loop, whose rate does not depend on their number
_TIMED_STEPS = _GROWTH_STEPS = 20
_COMPARED, _EPOCHS = 8, 3  # networks whose accuracies are compared, and their epochs


@dataclass(frozen=True)
class Setting:
    """One way to run the plain loop."""

    threads: int
    channels_last: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        chosen = (k for k in ("channels_last", "compiled") if getattr(self, k))
        return "-".join(["loop", f"{self.threads}t", *chosen]).replace("_", "-")


class _Contest:
    """The same networks, images, initial weights and data orders for all contestants."""

    def __init__(self, net: str, device: str) -> None:
        recipe = Recipe(name=net, dataset="mnist5k", net=net, learning_rate=1e-3, batch_size=32)
        images = data.load("mnist5k")
        self.recipe, self.device = recipe, device
        self.layout: WeightLayout = layout_for(recipe, images)
        self.x = self.layout.architecture.preprocess(images.train.images).contiguous().to(device)
        self.y = images.train.labels.to(device)
        self.val = images.val
        self.steps = len(self.x) // recipe.batch_size

    def start(self, models: int) -> Tensor:
        fresh = [initial(self.layout, "default", seed) for seed in range(models)]
        return self.layout.pack({k: torch.stack([f[k] for f in fresh]) for k in fresh[0]})

    def orders(self, models: int, epoch: int = 0) -> Tensor:
        """(models, K), different for each network."""
        generators = (torch.Generator().manual_seed(epoch * models + i) for i in range(models))
        return torch.stack([torch.randperm(len(self.x), generator=g) for g in generators])

    def ours(self, models: int) -> Trainer:
        net = self.layout.architecture.build().eval()
        rates, decays = [self.recipe.learning_rate] * models, [0.0] * models
        return trainer(net, self.layout, self.start(models), self.x, 32, rates, decays, self.device)

    def engine(self, models: int) -> None:
        """Some steps of so many models by the zoo's trainer."""
        rows = self.orders(models)[:, : 32 * _TIMED_STEPS]
        self.ours(models).run(rows, self.y[rows], 0)

    def settings(self) -> list[Setting]:
        """The settings of the loop."""
        cores = [1] if self.device != "cpu" else sorted({1, torch.get_num_threads()})
        plain = itertools.product(cores, (False, True))
        return [*(Setting(*values) for values in plain), Setting(cores[-1], True, True)]

    def loop(self, setting: Setting, models: int, epochs: int = 0) -> Tensor:
        """The plain loop over models, with fused Adam, for some epochs or `_TIMED_STEPS` steps.

        Returns:
            Their weights (n, D).
        """
        net = WeightBatch(self.layout, self.start(1)).module(0).train().to(self.device)
        form = torch.channels_last if setting.channels_last else torch.contiguous_format
        net, x = net.to(memory_format=form), self.x.contiguous(memory_format=form)
        call = _compiled(net) if setting.compiled else net
        before = torch.get_num_threads()
        torch.set_num_threads(setting.threads)
        try:
            seen = 32 * (self.steps if epochs else _TIMED_STEPS)
            drawn = [self.orders(models, epoch)[:, :seen] for epoch in range(epochs or 1)]
            orders = torch.stack(drawn, dim=1)
            pairs = zip(self.start(models), orders.to(self.device), strict=True)
            return torch.stack([self._train(net, call, x, *pair) for pair in pairs])
        finally:
            torch.set_num_threads(before)

    def _train(
        self,
        net: nn.Module,
        call: Callable[[Tensor], Tensor],
        x: Tensor,
        vector: Tensor,
        orders: Tensor,
    ) -> Tensor:
        net.load_state_dict(WeightBatch(self.layout, vector[None]).state_dict(0))
        rate = self.recipe.learning_rate
        optimizer = torch.optim.Adam(net.parameters(), rate, fused=True)
        for order in orders:
            for rows in order.split(32):
                optimizer.zero_grad()
                F.cross_entropy(call(x[rows]), self.y[rows]).backward()
                optimizer.step()
        named = {k: p.detach().cpu().contiguous()[None] for k, p in net.named_parameters()}
        return self.layout.pack(named)[0]


def _compiled(net: nn.Module) -> Callable[[Tensor], Tensor]:
    compiled: Callable[[Tensor], Tensor] = torch.compile(net)
    return compiled


def zoo(repeats: int, device: str = "cpu") -> list[Row]:
    """Model-steps per second at 64 models, batch size 32, own starts and data orders.

    The loop is run with one thread and with all, with and without channels-last memory, and compiled:
    the fastest is its best setting. Then the same networks are trained by both for three epochs and
    their validation accuracies compared; memory and growth are measured.
    """
    return [row for net in ("cnn-small", "cnn-medium") for row in _one(net, repeats, device)]


def _one(net: str, repeats: int, device: str) -> Iterator[Row]:
    contest = _Contest(net, device)
    candidates: dict[str, Callable[[], object]] = {"flown": partial(contest.engine, MODELS)}
    settings = {str(s): s for s in contest.settings()}
    candidates |= {name: partial(contest.loop, s, _LOOPED) for name, s in settings.items()}
    with bar(f"bench {net}", 3) as update:
        seconds = medians(candidates, repeats)
        models = {name: MODELS if name == "flown" else _LOOPED for name in seconds}
        runs = {k: [models[k] * _TIMED_STEPS / x for x in s] for k, s in seconds.items()}
        rates = {name: statistics.median(values) for name, values in runs.items()}
        for name, rate in rates.items():
            yield _row(
                net,
                name,
                "model-steps/s",
                rate,
                models[name],
                repeats,
                std=spread(runs[name]),
                ratio=rates["flown"] / rate,
            )
        update(1, "accuracies")
        best = max(settings, key=lambda name: rates[name])
        yield from _accuracies(contest, settings[best])
        update(2, "growth")
        yield from _growth(contest, repeats)


def _accuracies(contest: _Contest, best: Setting) -> Iterator[Row]:
    """Both train the same networks; the difference of means in standard errors."""
    engine = contest.ours(_COMPARED)
    for epoch in range(_EPOCHS):
        rows = contest.orders(_COMPARED, epoch)
        engine.run(rows, contest.y[rows], epoch * contest.steps)
    ends = {"flown": engine.vectors.cpu(), str(best): contest.loop(best, _COMPARED, _EPOCHS)}
    found = {}
    for name, vectors in ends.items():
        batch = WeightBatch(contest.layout, vectors)
        found[name] = accuracy(batch, contest.val.images, contest.val.labels)
        yield _row(
            contest.recipe.net,
            name,
            "validation accuracy",
            float(found[name].mean()),
            _COMPARED,
            None,
            std=float(found[name].std()),
        )
    compiled, loop = found.values()
    error = ((compiled.var() + loop.var()) / _COMPARED).sqrt()
    yield _row(
        contest.recipe.net,
        "flown",
        "difference in standard errors",
        float((compiled.mean() - loop.mean()) / error),
        _COMPARED,
        None,
    )


def _growth(contest: _Contest, repeats: int) -> Iterator[Row]:
    """Seconds of twenty steps and bytes of state as the number of models grows."""
    engines = {n: contest.ours(n) for n in GROWTH}
    orders = {n: contest.orders(n)[:, : 32 * _GROWTH_STEPS] for n in GROWTH}
    candidates = {
        str(n): partial(engines[n].run, orders[n], contest.y[orders[n]], 0) for n in GROWTH
    }
    for n, values in zip(GROWTH, medians(candidates, repeats).values(), strict=True):
        yield _row(
            contest.recipe.net,
            f"flown-{n}",
            f"seconds of {_GROWTH_STEPS} steps",
            statistics.median(values),
            n,
            repeats,
            std=spread(values),
        )
    engine = engines[MODELS]
    state = engine.vectors.nbytes + engine.moments.nbytes
    yield _row(contest.recipe.net, "flown", "state bytes a model", state / MODELS, MODELS, None)
    if isinstance(engine, Threads):
        program = engine.program
        working = 4 * (32 * program.activations + 2 * program.tiles) + 32 * program.choices
        yield _row(contest.recipe.net, "flown", "working bytes a thread", working, MODELS, None)


def _row(
    net: str,
    method: str,
    metric: str,
    value: float,
    n: int,
    repeats: int | None,
    std: float | None = None,
    **extra: float,
) -> Row:
    chosen = "all" if repeats is None else f"median of {repeats}"
    return {
        "dataset": "mnist5k",
        "net": net,
        "method": method,
        "metric": metric,
        "value": value,
        "std": std,
        "n": n,
        "selection": chosen,
        "epoch": None,
        "paper": None,
        **extra,
    }
