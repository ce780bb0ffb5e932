"""Training the any-task generator: networks are judged by what they compute on a task's queries.

    x_t: some Euler steps from noise, without gradient
    loss = (1 - a) mean_s ce(p_s, y) + a ce(mean_s p_s, y) - b min(|p_s - p_s'|_tv, 1 - p_y)

p_s = softmax f(query; w_s); the last term wants networks that differ, up to where they are wrong.

Each w_s is written from the end point predicted at x_t, so that every evaluation of the flow ends
at a working network: the fine-tuning of the meta-model (FLoWN, section 4.4) over a stream of tasks,
with the gradient stopped at t.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flown.anytask.bases import Bases
from flown.anytask.config import AnyTaskConfig
from flown.anytask.model import AnyTask, resized, standardised
from flown.anytask.writer import Writer
from flown.base.files import write_json
from flown.base.run import Run
from flown.tasks import Episodes, ManyClass
from flown.tasks.draw import cpu_generator
from flown.tasks.stream import TaskStream
from flown.training import train


def fit(
    config: AnyTaskConfig | None = None,
    *,
    out: Path | str,
    sets: Mapping[str, ManyClass] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> AnyTask:
    """Trains a generator on a stream of tasks and saves it under `out/model`.

    Args:
        sets: the pools by name; loaded by their names otherwise.
        out: the run's folder: checkpoint, `run.json`, `model/`.
        resume: go on from the checkpoint in `out`; ends with the same weights.

    Raises:
        FlownError: `out` exists or belongs to another run, or a pool is not to be had.
        TrainingError: the loss became NaN.
    """
    config = config or AnyTaskConfig()
    stream = TaskStream(config.tasks, sets)
    plan = {"config": config.model_dump(mode="json"), "pools": stream.identity}
    run = Run(out, plan, resume=resume, overwrite=overwrite, configs={"config": AnyTaskConfig})
    if resume and (run.out / "model" / "config.json").exists():
        return AnyTask.from_pretrained(run.out / "model").to(device)
    run.write()
    model = AnyTask(config)
    checks = stream.validation()
    bases = Bases(model, stream)
    train(
        bases,
        config.base.training,
        out=run.out,
        name="bases",
        seed=config.seed,
        resume=resume,
        validate=lambda: {
            f"{name} {net}": right
            for name, tasks in checks.items()
            for net, right in bases.accuracies(tasks).items()
        },
        device=device,
    )
    history = train(
        Objective(model, stream),
        config.training,
        out=run.out,
        name="generator",
        seed=config.seed,
        resume=resume,
        validate=lambda: {name: accuracy(model, tasks) for name, tasks in checks.items()},
        device=device,
    )
    write_json(run.out / "history.json", history)
    figures = {key: value for key, value in history[-1].items() if key in checks}
    model.card = {"pools": stream.identity, "validation": figures}
    model.eval().requires_grad_(False)
    model.save(run.out / "model")
    return model


class Objective(nn.Module):
    """The loss of one draw of tasks for one kind of network."""

    def __init__(self, model: AnyTask, stream: TaskStream) -> None:
        super().__init__()
        self.model, self.stream = model, stream

    def forward(self, generator: torch.Generator) -> Tensor:
        config, cpu = self.model.config, cpu_generator(generator)
        channels = (1, 3)[int(torch.randint(2, (), generator=cpu))]
        shares = torch.tensor(list(config.nets.values()))
        net = list(config.nets)[int(torch.multinomial(shares, 1, generator=cpu))]
        until = int(torch.randint(config.steps, (), generator=cpu))
        tasks = self.stream.draw(cpu, channels).to(self.model.device)
        found = logits(self.model, self.model.writer(net), tasks, config.samples, until, generator)
        log_p = found.log_softmax(dim=-1)  # (T, s, Q, C)
        apart = -log_p.gather(-1, _places(log_p, tasks.targets)).mean()
        mean = log_p.logsumexp(dim=1) - torch.tensor(float(config.samples)).log()
        together = -mean.gather(-1, tasks.targets[..., None]).mean()
        loss: Tensor = (1 - config.together) * apart + config.together * together
        return loss - config.spread * self._spread(log_p.exp(), tasks.targets)

    def _spread(self, p: Tensor, targets: Tensor) -> Tensor:
        """How far two networks of a task are apart, at most as far as they are from the truth."""
        away = (p - p.roll(1, dims=1)).abs().sum(dim=-1).mean(dim=(1, 2)) / 2  # (T,)
        wrong = 1 - p.detach().gather(-1, _places(p, targets)).mean(dim=(1, 2, 3))
        return torch.minimum(away, wrong).mean()


def logits(
    model: AnyTask,
    writer: Writer,
    tasks: Episodes,
    samples: int,
    until: int,
    generator: torch.Generator,
) -> Tensor:
    """Logits (T, samples, Q, C) of networks written after `until` steps of the flow, and one more.

    Args:
        tasks: float images in [0, 1].
    """
    support = standardised(tasks.support, tasks.support)
    query = standardised(tasks.query, tasks.support)
    classes = model.trunk.classes(support.expand(-1, -1, 3, -1, -1), tasks.labels, tasks.ways)
    classes = classes.repeat_interleave(samples, dim=0)
    count = len(writer.neurons)
    shape = (len(classes), count + tasks.ways, model.config.numbers)
    x = torch.randn(shape, generator=generator, device=generator.device)
    steps = model.config.steps
    with torch.no_grad():
        x = model.solve(x, writer.neurons, classes, steps, until)
    x = model.end(x, until / steps, writer.neurons, classes)
    body = writer.write_body(x[:, :count], tasks.support.shape[2])
    images = resized(torch.cat([support, query], dim=1), writer.kind.size)
    features = writer.compute(body, images.repeat_interleave(samples, dim=0))
    seen, asked = features.split([support.shape[1], query.shape[1]], dim=1)
    head = writer.write_head(x[:, count:], seen, tasks.labels.repeat_interleave(samples, dim=0))
    found: Tensor = (F.pad(asked, (0, 1), value=1.0) @ head.mT).unflatten(0, (-1, samples))
    return found


def _places(p: Tensor, targets: Tensor) -> Tensor:
    """Where the targets (T, Q) stand in (T, s, Q, C), as (T, s, Q, 1)."""
    return targets[:, None, :, None].expand(-1, p.shape[1], -1, -1)


@torch.no_grad()
def accuracy(model: AnyTask, tasks: Episodes, net: str | None = None) -> float:
    """Mean accuracy in percent of one network a task, at the last step of the flow."""
    generator = torch.Generator(model.device).manual_seed(0)
    hits = []
    for start in range(0, len(tasks.labels), 8):
        some = tasks.part(slice(start, start + 8)).to(model.device)
        until = model.config.steps - 1
        found = logits(model, model.writer(net), some, 1, until, generator)[:, 0]
        hits.append((found.argmax(-1) == some.targets).float().mean(dim=1).cpu())
    return 100 * float(torch.cat(hits).mean())
