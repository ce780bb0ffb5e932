"""Networks for tasks that nobody trained on, beside everything else that the same images give.

Zero gradient steps for generated networks; all samples, no selection. Controls that have settings are
given the one that is best on validation classes of Omniglot and mini-ImageNet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flown.anytask.model import AnyTask, resized, standardised
from flown.anytask.writer import architecture
from flown.base.config import Config
from flown.base.progress import bar
from flown.base.provenance import write_results
from flown.experiments.begin import Result, begin, kept
from flown.experiments.clock import Clock
from flown.experiments.queries import Judged, judged, mean, record, right
from flown.experiments.unseen import ROWS, VALIDATION, Unseen
from flown.generator.model import Flown
from flown.heads.calibrate import calibration_error
from flown.measure.fromsupport import fresh, nearest_centroid, own_logits, trained
from flown.measure.novelty import mutual_iou
from flown.report.anytask import write_study
from flown.tasks import Episodes
from flown.weights.batch import WeightBatch

BASE_STEPS = (1, 5, 50)


class AnyTaskStudy(Config):
    """`samples` networks a task, of each of `nets`; `ensemble` of the first where there is one shot.

    Controls that are trained, and other supports than a task's, see the first `few` tasks of a row:
    `scratch` networks train for `scratch_steps`, the base networks of `trained_nets` for `BASE_STEPS`.
    """

    model: str = "flown-any"
    lookup: str = "flown-small"
    rows: tuple[Unseen, ...] = ROWS
    validation: tuple[Unseen, ...] = VALIDATION
    samples: int = 6
    ensemble: int = 20
    nets: tuple[str, ...] = ("conv4-32", "conv4-8", "cnn-medium", "cnn-small")
    scratch: tuple[str, ...] = ("cnn-small", "conv4-8")
    scratch_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    scratch_steps: int = 200
    trained_nets: tuple[str, ...] = ("conv4-32", "conv4-8", "cnn-small")
    base_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    few: int = 20
    seed: int = 0


def study(scale: str, seed: int) -> AnyTaskStudy:
    """What is measured at a scale."""
    if scale != "smoke":
        return AnyTaskStudy(seed=seed)

    def few(rows: Iterable[Unseen]) -> tuple[Unseen, ...]:
        return tuple(row.model_copy(update={"tasks": 2}) for row in rows)

    return AnyTaskStudy(
        rows=few(ROWS),
        validation=few(VALIDATION),
        samples=2,
        ensemble=2,
        scratch_steps=5,
        seed=seed,
    )


def anytask(
    out: Path,
    scale: str = "cpu",
    *,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> Result:
    """Runs the study and writes `results.json` under `out`; rows that are there are not done again.

    Raises:
        FlownError: a set or a model is not here, or `out` holds another study.
    """
    config = study(scale, seed)
    begun = begin(out, "anytask", scale, seed, resume, overwrite)
    out = begun.path
    clock = Clock(out / "seconds.json")
    model = Flown.from_pretrained(config.model).to(device)
    known = Flown.from_pretrained(config.lookup).to(device)
    settings = kept(out / "settings.json", partial(_settings, model, config))
    clock.record("settings")
    found: list[dict[str, Any]] = []
    with bar("any task", len(config.rows)) as update:
        for place, row in enumerate(config.rows):
            path = out / f"row-{place:02d}.json"
            found += kept(path, partial(measure, model, known, row, config, settings))
            clock.record("rows")
            update(place + 1, row.name)
    counts = {"tasks": {row.name: row.tasks for row in config.rows}, "settings": settings}
    about = clock.about(config, counts, device)
    write_results(out / "results.json", "anytask", scale, about, found)
    write_study(out / "report.html", found, about)
    return Result(found, about)


def measure(
    model: AnyTask,
    known: Flown | None,
    row: Unseen,
    config: AnyTaskStudy,
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The records of one row: every method on the same tasks.

    Args:
        known: the generator that looks tasks up; left out when None.
        settings: of controls that are trained: `scratch`, a network and a rate, and `base`, by
            network a rate for each number of steps.
    """
    images, tasks = row.draw(config.seed)
    found: dict[str, list[Tensor]] = {}
    records = []
    for net in config.nets:
        many = config.ensemble if row.shots == 1 and net == config.nets[0] else config.samples
        each = config.model_copy(update={"samples": many})
        measured = [_generated(model, images, tasks, i, net, each) for i in range(row.tasks)]
        records.append(
            record(row, f"flown-any {net}", [m.accuracies.mean() for m in measured])
            | {
                "networks": many,
                "vote": mean([m.vote for m in measured]),
                "overlap": mean([m.overlap for m in measured]),
                "ece": round(
                    calibration_error(
                        torch.cat([m.mean for m in measured]), tasks.targets.flatten()
                    ),
                    2,
                ),
            }
        )
        found[f"base body {net}"] = [
            right(model.base(images[tasks.support[i]], tasks.labels[i], net), images, tasks, i)
            for i in range(row.tasks)
        ]
    pair = config.model_copy(update={"samples": 2})
    for name in ("another task's support", "shuffled labels", "no support"):
        found[f"{name} {config.nets[0]}"] = [
            _generated(model, images, tasks, i, config.nets[0], pair, name).accuracies.mean()
            for i in range(min(config.few, row.tasks))
        ]
    seen = _standard(images, tasks)
    found["nearest centroid of pixels"] = list(nearest_centroid(seen))
    found["nearest centroid of the context's features"] = list(
        nearest_centroid(_features(model, seen))
    )
    first = seen.part(slice(config.few))
    wrong = torch.stack(
        [_scratch(first, settings["scratch"], config, seed) for seed in range(2)], 1
    )
    records.append(
        record(row, f"scratch {settings['scratch'][0]}", list(_rights(wrong[:, 0])))
        | {"overlap": mean([mutual_iou(pair) for pair in wrong])}
    )
    for net in config.trained_nets:
        starts = _bases(model, images, tasks, net, config.few)
        for steps, moved in _moved(starts, first, settings["base"][net]).items():
            found[f"base trained {steps} steps {net}"] = list(_rights(moved))
    if known is not None and row.ways == 10:
        found["lookup"] = [
            right(known.generate(images[tasks.support[i]], tasks.labels[i], 2, i), images, tasks, i)
            for i in range(row.tasks)
        ]
    return records + [record(row, method, values) for method, values in found.items()]


def _generated(
    model: AnyTask,
    images: Tensor,
    tasks: Episodes,
    i: int,
    net: str,
    config: AnyTaskStudy,
    ablation: str = "",
) -> Judged:
    support, labels = images[tasks.support[i]], tasks.labels[i]
    if ablation == "another task's support":
        support = images[tasks.support[(i + 1) % len(tasks.support)]]
        generator = torch.Generator().manual_seed(i)  # the same ten classes may stand in order
        labels = torch.randperm(tasks.ways, generator=generator)[labels]
    elif ablation == "shuffled labels":
        generator = torch.Generator().manual_seed(i)
        labels = labels[torch.randperm(len(labels), generator=generator)]
    elif ablation == "no support":
        generator = torch.Generator().manual_seed(i)
        support = torch.randint(
            256, support.shape, generator=generator, dtype=torch.uint8, device=support.device
        )
    batch = model.generate(support, labels, config.samples, config.seed + i, net)
    return judged(batch, images[tasks.query[i]], tasks.targets[i])


def _standard(images: Tensor, tasks: Episodes) -> Episodes:
    """Float images of 32 pixels a side in units of each support set's own pixels."""
    support = resized(images[tasks.support].float() / 255, 32)
    query = resized(images[tasks.query].float() / 255, 32)
    return tasks._replace(
        support=standardised(support, support), query=standardised(query, support)
    )


@torch.no_grad()
def _features(model: AnyTask, tasks: Episodes) -> Episodes:
    """The trunk's features of images in their place."""

    def of(images: Tensor) -> Tensor:
        parts = [model.trunk.images(x.expand(-1, 3, -1, -1).to(model.device)) for x in images]
        found = torch.stack(parts).cpu()
        return torch.nn.functional.normalize(found, dim=-1)

    return tasks._replace(support=of(tasks.support), query=of(tasks.query))


def _sized(tasks: Episodes, size: int) -> Episodes:
    return tasks._replace(support=resized(tasks.support, size), query=resized(tasks.query, size))


def _scratch(
    tasks: Episodes, setting: tuple[str, float], config: AnyTaskStudy, seed: int = 0
) -> Tensor:
    """Where networks from PyTorch's initialisation are wrong, trained on each support set, (T, Q)."""
    net, rate = setting
    kind = architecture(net, tasks.support.shape[2], tasks.ways)
    starts = fresh(kind, len(tasks.labels), config.seed + seed)
    return _after(starts, tasks, rate, [config.scratch_steps])[0]


def _after(starts: WeightBatch, tasks: Episodes, rate: float, steps: Sequence[int]) -> list[Tensor]:
    """Where networks are wrong, trained on each support set, (T, Q) after each number of steps."""
    sized = _sized(tasks, starts.layout.architecture.size)
    found = []
    for vectors in trained(starts, sized.support, sized.labels, rate, steps):
        with torch.no_grad():
            logits = own_logits(starts, vectors, sized.query)
        found.append(logits.argmax(dim=-1) != sized.targets)
    return found


def _rights(wrong: Tensor) -> Tensor:
    """Accuracies (T,) in percent of networks that are wrong there, (T, Q)."""
    return 100 - 100 * wrong.float().mean(dim=1)


def _moved(starts: WeightBatch, tasks: Episodes, rates: Mapping[str, float]) -> dict[int, Tensor]:
    """As `_after`, by numbers of steps, whose rates these are; one training for equal rates."""
    found: dict[int, Tensor] = {}
    for rate in set(rates.values()):
        steps = sorted(int(x) for x in rates if rates[x] == rate)
        found |= dict(zip(steps, _after(starts, tasks, rate, steps), strict=True))
    return dict(sorted(found.items()))


def _bases(model: AnyTask, images: Tensor, tasks: Episodes, net: str, count: int) -> WeightBatch:
    """The base body under the head for each support set."""
    batches = [
        model.base(images[tasks.support[i]], tasks.labels[i], net)
        for i in range(min(count, len(tasks.labels)))
    ]
    return batches[0].on(torch.cat([batch.vectors for batch in batches]).cpu())


def _settings(model: AnyTask, config: AnyTaskStudy) -> dict[str, Any]:
    """The settings of controls that are best on validation classes: networks, learning rates."""
    drawn = [row.draw(config.seed + 1) for row in config.validation]
    tasks = [_standard(*pair) for pair in drawn]
    options = [(net, rate) for net in config.scratch for rate in config.scratch_rates]
    means = [
        mean([float(_rights(_scratch(episodes, o, config)).mean()) for episodes in tasks])
        for o in options
    ]
    scratch = options[means.index(max(means))]
    base: dict[str, dict[int, float]] = {}
    for net in config.trained_nets:
        found = []  # of each rate, the mean accuracy after each number of steps
        for rate in config.base_rates:
            moved = [
                _after(_bases(model, *pair, net, len(seen.labels)), seen, rate, BASE_STEPS)
                for pair, seen in zip(drawn, tasks, strict=True)
            ]
            found.append([mean([float(_rights(a[i]).mean()) for a in moved]) for i in range(3)])
        best = torch.tensor(found).argmax(dim=0).tolist()
        base[net] = {steps: config.base_rates[i] for steps, i in zip(BASE_STEPS, best, strict=True)}
    return {"scratch": scratch, "base": base}
