"""Ways to train the any-task generator, numbers of tasks and sizes, at one budget.

Base networks are trained once. Every variant begins with them and has the same number of flow steps
on top; a variant of few tasks has base networks of its own, which saw these tasks alone as well. All
are measured on the same tasks of validation classes, all samples, no selection.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from flown.anytask.config import AnyTaskConfig, BankConfig, Way
from flown.anytask.fit import fit, fit_bases
from flown.anytask.model import AnyTask
from flown.base.config import Config
from flown.base.files import file_name
from flown.base.progress import bar
from flown.base.provenance import Row, write_results
from flown.experiments.begin import Result, begin, kept
from flown.experiments.clock import Clock
from flown.experiments.queries import judged, mean, record, right
from flown.experiments.unseen import Unseen
from flown.measure.interval import interval
from flown.report.variants import BASE, FIRST, write_variants
from flown.tasks import Episodes, ManyClass
from flown.tasks.stream import TaskStream, load_pool

# Trunks have the image encoder of the base networks' training, whatever their width.
FIT = AnyTaskConfig(nets={"conv4-8": 0.5, "cnn-small": 0.5}, features=128)


Asked = list[tuple[Unseen, Tensor, Episodes]]


class VariantsStudy(Config):
    """`fit` is what every variant is but for what it varies; `samples` networks a task are measured.

    `counts` are numbers of training tasks, `sizes` widths and depths of the trunk.
    """

    fit: AnyTaskConfig = FIT
    ways: tuple[Way, ...] = get_args(Way)
    counts: tuple[int, ...] = (100, 1000, 10_000)
    sizes: tuple[tuple[int, int], ...] = ((64, 2), (128, 4), (256, 6))
    rows: tuple[Unseen, ...] = tuple(
        Unseen(set=name, part="val", ways=ways, shots=shots, tasks=40)
        for name in ("omniglot_full", "mini_imagenet")
        for ways, shots in ((10, 5), (5, 1))
    )
    samples: int = 6
    seed: int = 0


def study(scale: str, seed: int) -> VariantsStudy:
    """What is measured at a scale."""
    whole = VariantsStudy(fit=_lasting(FIT.model_copy(update={"seed": seed}), 1000, 500), seed=seed)
    if scale != "smoke":
        return whole
    small = whole.fit.model_copy(update={"bank": BankConfig(draws=2, steps=2)})
    rows = tuple(row.model_copy(update={"tasks": 2}) for row in whole.rows)
    return whole.model_copy(update={"fit": _lasting(small, 3, 3), "rows": rows, "samples": 2})


def _lasting(config: AnyTaskConfig, base: int, flow: int) -> AnyTaskConfig:
    """The same with so many steps for base networks and for the flow."""
    first = config.base.training.model_copy(
        update={"steps": base, "checkpoint_every": 100, "validate_every": base}
    )
    then = config.training.model_copy(
        update={"steps": flow, "checkpoint_every": 100, "validate_every": flow}
    )
    bases = config.base.model_copy(update={"training": first})
    return config.model_copy(update={"base": bases, "training": then})


def fits(study: VariantsStudy) -> dict[str, AnyTaskConfig]:
    """What is fitted, by name. The first way is also the unlimited tasks and the usual trunk."""
    fit = study.fit
    found = {str(way): fit.model_copy(update={"way": way}) for way in study.ways}
    for count in study.counts:
        tasks = fit.tasks.model_copy(update={"count": count})
        found[f"{count:,} tasks"] = fit.model_copy(update={"tasks": tasks})
    for width, depth in study.sizes:
        if (width, depth) != (fit.width, fit.depth):
            update = {"width": width, "depth": depth}
            found[f"width {width}, depth {depth}"] = fit.model_copy(update=update)
    return found


def variants(
    out: Path,
    scale: str = "cpu",
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> Result:
    """Runs the study and writes `results.json` under `out`; variants that are there are not done again.

    Raises:
        FlownError: a set is not here, or `out` holds another study.
    """
    begun = begin(out, "variants", scale, seed, resume, overwrite)
    return run(study(scale, seed), begun.path, scale, device)


def run(study: VariantsStudy, out: Path, scale: str, device: str = "cpu") -> Result:
    """As `variants`, in a folder that was begun."""
    clock = Clock(out / "seconds.json")
    sets = {name: load_pool(name) for name in study.fit.tasks.pools}
    asked = [(row, *row.draw(study.seed)) for row in study.rows]
    clock.record("data")
    model = fit_bases(study.fit, out=out / "bases", sets=sets, resume=True, device=device)
    clock.record("bases")
    rows: list[Row] = kept(out / "base.json", partial(_bases, model, study, asked))
    clock.record("measure")
    chosen = fits(study)
    with bar("variants", len(chosen)) as update:
        for place, (name, config) in enumerate(chosen.items()):
            make = partial(_variant, name, config, study, asked, sets, out, clock, device)
            rows += kept(out / f"variant-{file_name(name)}.json", make)
            update(place + 1, name)
    _compare(rows)
    drawn = _tasks_drawn(TaskStream(study.fit.tasks, sets), study.fit.training.steps)
    counts = {"tasks": {row.name: row.tasks for row in study.rows}, "tasks_drawn": drawn}
    about = clock.about(study, counts, device)
    write_results(out / "results.json", "variants", scale, about, rows)
    write_variants(out / "report.html", rows, about)
    return Result(rows, about)


def _bases(model: AnyTask, study: VariantsStudy, asked: Asked) -> list[Row]:
    """The base networks alone, under the head for each support set."""
    rows = []
    for row, images, tasks in asked:
        for net in study.fit.nets:
            found = [
                right(model.base(images[tasks.support[i]], tasks.labels[i], net), images, tasks, i)
                for i in range(row.tasks)
            ]
            rows.append(_record(row, BASE, net, found))
    return rows


def _variant(
    name: str,
    config: AnyTaskConfig,
    study: VariantsStudy,
    asked: Asked,
    sets: Mapping[str, ManyClass],
    out: Path,
    clock: Clock,
    device: str,
) -> list[Row]:
    """Fits one variant and measures it."""
    model = fit(
        config,
        out=out / "fits" / file_name(name),
        sets=sets,
        bases=None if config.tasks.count else out / "bases",
        resume=True,
        device=device,
    )
    clock.record(name)
    about = {
        "way": config.way,
        "count": config.tasks.count,
        "width": config.width,
        "depth": config.depth,
        "parameters": sum(p.numel() for p in model.trunk.parameters()),
        "seconds": clock.spent[name],
    }
    rows = []
    for row, images, tasks in asked:
        for net in config.nets:
            found = []
            for i in range(row.tasks):
                support = images[tasks.support[i]], tasks.labels[i]
                batch = model.generate(*support, study.samples, study.seed + i, net)
                found.append(judged(batch, images[tasks.query[i]], tasks.targets[i]))
            measured = {
                "vote": mean([task.vote for task in found]),
                "overlap": mean([task.overlap for task in found]),
            }
            accuracies = [task.accuracies.mean() for task in found]
            rows.append(_record(row, name, net, accuracies) | measured | about)
    clock.record("measure")
    return rows


def _record(row: Unseen, name: str, net: str, accuracies: list[Tensor]) -> Row:
    each = [round(float(value), 3) for value in accuracies]
    return record(row, name, each) | {"net": net, "of_tasks": each}


def _compare(rows: list[Row]) -> None:
    """Puts the points ahead of the first way, on the same tasks, in place of each task's accuracy."""
    first = {
        (r["row"], r["net"]): torch.tensor(r["of_tasks"]) for r in rows if r["method"] == FIRST
    }
    for row in rows:
        ahead = torch.tensor(row.pop("of_tasks")) - first[row["row"], row["net"]]
        points, half, _ = interval(ahead)
        row |= {
            "ahead": round(points, 2),
            "ahead_interval": None if half is None else round(half, 2),
        }


def _tasks_drawn(stream: TaskStream, steps: int) -> int:
    """About how many tasks a fit of so many steps draws."""
    generator = torch.Generator().manual_seed(0)
    sizes = [stream.size(generator)[0] for _ in range(1000)]
    return round(steps * sum(sizes) / len(sizes))
