"""Networks for a support set by name: a data set or a folder, whose class names are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flown import tasks as data
from flown.flow.samplers import Samples
from flown.generator.model import Flown
from flown.tasks.classes import only_counts, places, support_in_order


def sample_for(
    model: Flown,
    source: str | Path,
    n: int = 50,
    *,
    shots: int = 5,
    seed: int = 0,
    **options: Any,
) -> tuple[Samples, str | None]:
    """Networks for the classes of a data set or folder, and a warning about their order, if any.

    If a task of the model has the same class names, the support set takes that task's order.
    Otherwise the networks take the support set's class names.

    Args:
        source, shots: as in `load_support`.
        options: as in `Flown.sample`.

    Raises:
        FlownError: as `load_support` and `Flown.sample`.
    """
    support, names = data.load_support(source, shots, seed)
    known = [task.classes for task in model.tasks.values()]
    support, names = support_in_order(support, names, known)
    samples = model.sample(support.images, support.labels, n, seed, classes=names, **options)
    samples.batch.provenance |= {"support": str(source), "classes": list(names)}
    if only_counts(names) or any(places(names, classes) is not None for classes in known):
        return samples, None
    return samples, (
        f"no task of the model's training has classes called '{names[0]}', '{names[1]}', ...: their "
        "order was not compared; if they are classes that it knows, give them in its order"
    )
