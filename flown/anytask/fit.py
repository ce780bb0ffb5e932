"""Training the any-task generator: base networks first, then the flow in the way of the config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from flown.anytask.bases import Bases
from flown.anytask.config import AnyTaskConfig
from flown.anytask.model import AnyTask
from flown.anytask.ways import objective
from flown.anytask.written import of_queries, seen
from flown.base.files import load_into, load_tensors, save_tensors, write_json
from flown.base.run import Run, digest
from flown.tasks import Episodes, ManyClass
from flown.tasks.stream import TaskStream
from flown.training import train

_BASES = "bases"


def fit(
    config: AnyTaskConfig | None = None,
    *,
    out: Path | str,
    sets: Mapping[str, ManyClass] | None = None,
    bases: Path | str | None = None,
    begin: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> AnyTask:
    """Trains a generator on a stream of tasks and saves it under `out/model`.

    Args:
        sets: the pools by name; loaded by their names otherwise.
        bases: the folder of `fit_bases` or of another fit, whose base networks this one begins with.
        begin: the folder of a model of the same sizes, whose weights are trained further, all of them.
        out: the run's folder: checkpoints, `run.json`, `model/`.
        resume: go on from the checkpoints in `out`; ends with the same weights.

    Raises:
        FlownError: `out` exists or belongs to another run, a pool is not to be had, or `bases` holds
            no base networks, or those of another model; or `begin` is of another size.
        TrainingError: the loss became NaN.
    """
    config = config or AnyTaskConfig()
    stream = TaskStream(config.tasks, sets)
    trained = None if bases is None else load_tensors(_checkpoint(bases))
    first = None if begin is None else AnyTask.from_pretrained(begin).state_dict()
    plan = {
        "config": config.model_dump(mode="json"),
        "pools": stream.identity,
        "bases": None if trained is None else _digest(trained[0]),
        "begin": None if first is None else _digest(first),
    }
    run = Run(
        out,
        plan,
        resume=resume,
        overwrite=overwrite,
        configs={"config": AnyTaskConfig},
        newer=("bases", "begin"),
        sources=[folder for folder in (bases, begin) if folder is not None],
    )
    if resume and (run.path / "model" / "config.json").exists():
        return AnyTask.from_pretrained(run.path / "model").to(device)
    run.begin()
    if trained is not None and not _checkpoint(run.path).exists():
        save_tensors(_checkpoint(run.path), *trained)
    model = AnyTask(config).to(device)
    if first is not None and begin is not None:
        load_into(model, first, begin)
    checks = stream.validation()
    _train_bases(model, stream, run.path, checks, resume or trained is not None, device)
    history = train(
        objective(model, stream, run.path),
        config.training,
        out=run.path,
        name="generator",
        seed=config.seed,
        resume=resume,
        validate=lambda: {name: accuracy(model, tasks) for name, tasks in checks.items()},
        device=device,
    )
    write_json(run.path / "history.json", history)
    figures = {key: value for key, value in history[-1].items() if key in checks}
    model.card = {"pools": stream.identity, "validation": figures, "begin": plan["begin"]}
    model.eval().requires_grad_(False)
    model.save(run.path / "model")
    return model


def fit_bases(
    config: AnyTaskConfig,
    *,
    out: Path,
    sets: Mapping[str, ManyClass] | None = None,
    resume: bool = False,
    device: str = "cpu",
) -> AnyTask:
    """Trains base networks alone, for fits that begin with them; the model writes nothing else yet.

    Args:
        out: the folder of their checkpoint.

    Raises:
        FlownError: a pool is not to be had, or the checkpoint belongs to another model.
    """
    stream, model = TaskStream(config.tasks, sets), AnyTask(config).to(device)
    _train_bases(model, stream, out, stream.validation(), resume, device)
    return model.eval().requires_grad_(False)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return digest(*(tensors[name] for name in sorted(tensors)))


def _checkpoint(folder: Path | str) -> Path:
    return Path(folder) / f"{_BASES}.checkpoint.safetensors"


def _train_bases(
    model: AnyTask,
    stream: TaskStream,
    out: Path,
    checks: Mapping[str, Episodes],
    resume: bool,
    device: str,
) -> None:
    bases = Bases(model, stream)
    train(
        bases,
        model.config.base.training,
        out=out,
        name=_BASES,
        seed=model.config.seed,
        resume=resume,
        validate=lambda: {
            f"{name} {net}": right
            for name, tasks in checks.items()
            for net, right in bases.accuracies(tasks).items()
        },
        device=device,
    )


@torch.no_grad()
def accuracy(model: AnyTask, tasks: Episodes, net: str | None = None) -> float:
    """Mean accuracy in percent of one network a task, after all steps of the flow."""
    generator = torch.Generator(model.device).manual_seed(0)
    writer, steps, hits = model.writer(net), model.config.evaluations, []
    for start in range(0, len(tasks.labels), 8):
        some = tasks.part(slice(start, start + 8)).to(model.device)
        classes, shares = seen(model, some, 1)
        x = model.start(writer, classes, generator)
        x = model.solve(x, writer.neurons, classes, steps, steps)
        found = of_queries(writer, some, x, shares)[:, 0]
        hits.append((found.argmax(-1) == some.targets).float().mean(dim=1).cpu())
    return 100 * float(torch.cat(hits).mean())
