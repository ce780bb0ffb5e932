"""Side-by-side timings: every ratio is measured in one run, medians over several repeats."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from flown import data, flow
from flown.config import Config
from flown.diffusion import diffusion_loss, sample_ddpm
from flown.evaluate import evaluate as accuracy
from flown.evaluate import predictions
from flown.fitting import Population, context_bank
from flown.layout import Task, WeightLayout
from flown.model import Flown, shipped_zoo
from flown.nets import INPUT_SIZES, build
from flown.provenance import Row, provenance, write_results
from flown.training import train
from flown.weights import WeightBatch
from flown.zoo import Zoo

STEPS = (1, 2, 5, 10, 20, 50, 100)


class BenchConfig(Config):
    """What was timed."""

    what: str
    repeats: int
    model: str | None = None
    networks: int = 100


def _medians(
    candidates: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each candidate, run in turn so that the machine's drift meets them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()  # warm-up
    for _ in range(repeats):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _rows(seconds: Mapping[str, list[float]], ours: str, n: int) -> list[Row]:
    base = statistics.median(seconds[ours])
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        rows.append({"dataset": None, "method": name, "metric": "seconds", "value": median,
                     "std": statistics.stdev(values) if len(values) > 1 else None, "n": n,
                     "selection": f"median of {len(values)}", "epoch": None, "paper": None,
                     "ratio": median / base})  # fmt: skip
    return rows


class _Loop(nn.Module):
    """Trains a network as eps_theta on a model's latents, in the flow's own training loop."""

    def __init__(self, model: Flown, network: nn.Module, latents: torch.Tensor,
                 tasks: torch.Tensor, bank: torch.Tensor) -> None:  # fmt: skip
        super().__init__()
        self.network, self.batch = network, model.config.flow_training.batch_size
        self.head = model.head
        self.latents, self.tasks, self.bank = latents, tasks, bank

    def forward(self, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(self.latents), (self.batch,), generator=generator)
        draws = torch.randint(self.bank.shape[1], (self.batch,), generator=generator)
        assert self.head is not None
        context = self.head(self.bank[self.tasks[rows], draws]).detach()
        return diffusion_loss(self.network, self.latents[rows], context, generator)


def sample(name: str, repeats: int, scratch: Path, networks: int = 100) -> list[Row]:
    """Sampling: ours against torchdiffeq's Euler and a 1000-step DDPM on the same network.

    The DDPM network has the flow's architecture and is trained on the same latents and contexts
    with the same settings for as many steps. Accuracies are of `networks` networks for the model's
    first task, on its test images.
    """
    from torchdiffeq import odeint

    model, zoo = Flown.from_pretrained(name), Zoo.open(shipped_zoo(name))
    images = {task: data.load(task) for task in zoo.tasks}
    people = Population.of(zoo, model.config.epochs)
    assert model.support is not None and model.head is not None
    bank = context_bank(model.support, images, model.tasks, model.classes, model.config)
    with torch.no_grad():
        latents = model.encoder.encode(people.train)  # type: ignore[operator]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rival = flow.UNet(model.config.velocity, model.latent_shape, 128)
    loop = _Loop(model, rival, latents, people.train_tasks, bank)
    train(loop, model.config.flow_training, out=scratch, name="ddpm", resume=True)
    rival.requires_grad_(False)
    task = model.tasks[0]
    context = model.head(bank[:1, 0])
    test = images[task].test
    shape = (networks, *model.latent_shape)
    x0 = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    many = context.expand(networks, -1)

    def euler(steps: int) -> torch.Tensor:
        return flow.integrate(model.velocity.bind(context), x0, steps=steps).x

    def ddpm() -> torch.Tensor:
        return sample_ddpm(rival, shape, context, generator=torch.Generator().manual_seed(0)).x

    def theirs() -> torch.Tensor:
        grid = torch.linspace(0, 1, 101)
        return odeint(lambda t, x: model.velocity(x, t.expand(networks), many), x0, grid,  # type: ignore[no-any-return]
                      method="euler")[-1]  # fmt: skip

    with torch.no_grad():
        seconds = _medians({"flown-euler-100": lambda: euler(100), "torchdiffeq-euler-100": theirs,
                            "ddpm-1000": ddpm}, repeats)  # fmt: skip
        rows = _rows(seconds, "flown-euler-100", networks)
        drawn = {"ddpm-1000": ddpm()} | {f"flown-euler-{s}": euler(s) for s in STEPS}
    for method, latent in drawn.items():
        values = accuracy(model.decode(latent, task), test.images, test.labels)
        rows.append({"dataset": task, "method": method, "metric": "accuracy",
                     "value": float(values.mean()), "std": float(values.std()), "n": networks,
                     "selection": "all", "epoch": None, "paper": None})  # fmt: skip
    return rows


def evaluate(repeats: int, networks: int = 100, images: int = 10_000) -> list[Row]:
    """Evaluation: all networks at once against a loop over modules, `cnn-small`, grey images.

    The loop is timed with batches of 100 and of 1000 images; the faster one is its best setting.
    """
    net = build("cnn-small", 1, 10, "tanh")
    task = Task(name="noise", channels=1, size=INPUT_SIZES["cnn-small"], mean=0.5, std=0.5,
                classes=tuple("0123456789"), activation="tanh")  # fmt: skip
    layout = WeightLayout.of(net, "cnn-small", task)
    generator = torch.Generator().manual_seed(0)
    batch = WeightBatch(layout, 0.1 * torch.randn(networks, layout.size, generator=generator))
    pixels = torch.randint(0, 256, (images, 1, 28, 28), generator=generator, dtype=torch.uint8)
    modules = [batch.module(i) for i in range(networks)]

    @torch.no_grad()
    def loop(size: int) -> torch.Tensor:
        x = task.preprocess(pixels)
        return torch.stack(
            [torch.cat([m(some).argmax(-1) for some in x.split(size)]) for m in modules]
        )

    assert (predictions(batch, pixels[:500]) == loop(500)[:, :500]).float().mean() > 0.999
    candidates: dict[str, Callable[[], object]] = {"flown": lambda: predictions(batch, pixels)}
    candidates |= {f"loop-{size}": partial(loop, size) for size in (100, 1000)}
    return _rows(_medians(candidates, repeats), "flown", networks)


def show(rows: list[Row], console: Console) -> None:
    """Prints the rows."""
    table = Table("what", "metric", "value", "against ours")
    for row in rows:
        ratio = f"{row['ratio']:.2f} x" if "ratio" in row else ""
        table.add_row(row["method"], row["metric"], f"{row['value']:.3f}", ratio)
    console.print(table)


def write(path: Path, what: str, repeats: int, seconds: float, rows: list[Row],
          model: str | None = None) -> None:  # fmt: skip
    """Writes the rows with their provenance."""
    config = BenchConfig(what=what, repeats=repeats, model=model)
    about: dict[str, Any] = provenance(config, {}, seconds, "cpu")
    write_results(path, f"bench-{what}", "cpu", about, rows)
