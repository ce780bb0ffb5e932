"""Networks for a support set by name: a data set or a folder, whose class names are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flown import tasks as data
from flown.flow.samplers import Samples
from flown.generator.model import Flown
from flown.tasks.classes import only_counts, support_in_order


def sample_for(
    model: Flown,
    source: str | Path,
    n: int = 50,
    *,
    shots: int = 5,
    seed: int = 0,
    task: str | None = None,
    **options: Any,
) -> tuple[Samples, str | None]:
    """Networks for the classes of a data set or folder, and a warning about their order, if any.

    Where a task of the model has the same class names, the support set takes that task's order. Else
    the networks' classes are called as the support set's.

    Args:
        source, shots: as in `load_support`.
        options: as in `Flown.sample`.

    Raises:
        FlownError: as `load_support` and `Flown.sample`.
    """
    support, names = data.load_support(source, shots, seed)
    known = {layout.task.name: layout.task.classes for layout in model.joint.layouts}
    first = [known[task]] if task in known else []
    support, names = support_in_order(support, names, [*first, *known.values()])
    samples = model.sample(support.images, support.labels, n, seed, task=task, **options)
    batch = samples.batch
    batch.provenance |= {"support": str(source), "classes": list(names)}
    about = batch.layout.task
    if names == about.classes or len(names) != len(about.classes) or only_counts(names):
        return samples, None
    named = about.model_copy(update={"classes": names})
    batch.layout = batch.layout.model_copy(update={"task": named})
    return samples, (
        f"the classes '{names[0]}', '{names[1]}', ... are not called like those of task "
        f"'{about.name}', '{about.classes[0]}', '{about.classes[1]}', ..., whose networks these "
        "are like: their order was not compared; if they are the same classes, give them in that "
        "order"
    )
