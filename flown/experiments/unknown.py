"""Does a classifier know what it does not know: images of classes outside the support set.

Each task has twice the classes that it is shown: half of them make the support set, queries are of all.
Every method gives each image a score, and its limit comes from scores of support images that were
left out, for 5 % of false alarms; images of other classes are used by no method.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flown.anytask.model import AnyTask
from flown.base.config import Config
from flown.base.progress import bar
from flown.base.provenance import Row, write_results
from flown.experiments.begin import Result, begin, kept
from flown.experiments.clock import Clock
from flown.experiments.unseen import Unseen
from flown.generator.model import Flown
from flown.heads.unknown import distances, left_out, limit, of_networks
from flown.measure.evaluate import probabilities
from flown.measure.interval import interval
from flown.report.unknown import write_unknown
from flown.tasks import Support

# The second of these is what `ImageClassifier(unknown=)` uses.
METHODS = ("maximum softmax", "distance in written networks", "distance of pixels")


class UnknownStudy(Config):
    """`ways` of the rows are classes of the support set; as many others are asked about."""

    model: str = "flown-any"
    samples: int = 20
    rate: float = 0.05
    rows: tuple[Unseen, ...] = tuple(
        Unseen(set=name, part="test", ways=ways, shots=5, tasks=20)
        for name in ("omniglot_full", "mini_imagenet")
        for ways in (5, 10)
    )
    seed: int = 0


def unknown(
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
        FlownError: a set is not here, or `out` holds another study.
    """
    study = UnknownStudy(seed=seed)
    if scale == "smoke":
        rows = tuple(row.model_copy(update={"tasks": 3}) for row in study.rows)
        study = study.model_copy(update={"rows": rows, "samples": 2})
    begun = begin(out, "unknown", scale, seed, resume, overwrite)
    return run(study, begun.path, scale, device)


def run(study: UnknownStudy, out: Path, scale: str, device: str = "cpu") -> Result:
    """As `unknown`, in a folder that was begun."""
    clock = Clock(out / "seconds.json")
    model: AnyTask = Flown.from_pretrained(study.model).to(device)
    rows: list[Row] = []
    with bar("rows", len(study.rows)) as update:
        for place, row in enumerate(study.rows):
            rows += kept(out / f"row-{place}.json", partial(_measure, model, study, row))
            clock.record("measure")
            update(place + 1, row.name)
    about = clock.about(study, {"tasks": {row.name: row.tasks for row in study.rows}}, device)
    write_results(out / "results.json", "unknown", scale, about, rows)
    write_unknown(out / "report.html", rows, about)
    return Result(rows, about)


def _measure(model: AnyTask, study: UnknownStudy, row: Unseen) -> list[Row]:
    """All methods on the tasks of one row."""
    images, tasks = row.model_copy(update={"ways": 2 * row.ways}).draw(study.seed)
    of_tasks = []
    for i in range(row.tasks):
        known = tasks.labels[i] < row.ways
        support = Support(images[tasks.support[i][known]], tasks.labels[i][known])
        asked, inside = images[tasks.query[i]], tasks.targets[i] < row.ways
        score = partial(_scores, model, study.samples, study.seed + i)
        limits = [limit(scores, study.rate) for scores in left_out(support, score)]
        of_tasks.append(
            [
                _judged(scores, inside, most)
                for scores, most in zip(score(support, asked), limits, strict=True)
            ]
        )
    figures = torch.tensor(of_tasks)  # (tasks, methods, 3)
    return [_record(row, name, figures[:, k]) for k, name in enumerate(METHODS)]


@torch.no_grad()
def _scores(model: AnyTask, n: int, seed: int, support: Support, images: Tensor) -> Tensor:
    """Each method's scores (3, N) of images, larger for stranger ones."""
    batch = model.generate(*support, n, seed)
    ways = int(support.labels.max()) + 1
    seen, asked = (batch.preprocess(x).flatten(1)[None] for x in (support.images, images))
    return torch.stack(
        [
            -probabilities(batch, images).amax(dim=1).cpu(),
            of_networks(batch, support, images).cpu(),
            distances(seen, support.labels, ways, asked),
        ]
    )


def _judged(scores: Tensor, inside: Tensor, most: float) -> tuple[float, float, float]:
    """Percent of other classes' images that are detected and of false alarms, and the ROC's area."""
    beyond = scores > most
    known, strange = scores[inside], scores[~inside]
    area = (strange[:, None] > known).float() + (strange[:, None] == known).float() / 2
    return (
        100 * float(beyond[~inside].float().mean()),
        100 * float(beyond[inside].float().mean()),
        100 * float(area.mean()),
    )


def _record(row: Unseen, method: str, figures: Tensor) -> Row:
    found: Row = {"row": row.name, "method": method, "tasks": len(figures)}
    for name, values in zip(("detected", "false_alarms", "auroc"), figures.T, strict=True):
        average, half, _ = interval(values)
        found |= {name: round(average, 2), f"{name}_interval": round(half or 0.0, 2)}
    return found
