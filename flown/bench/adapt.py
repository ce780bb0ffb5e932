"""Training through the solver: cost and savings of the stop-gradient time and of recomputation."""

from __future__ import annotations

import multiprocessing
import statistics
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from flown import tasks as data
from flown.base.provenance import Row
from flown.bench.store import held
from flown.bench.timing import medians, spread
from flown.generator import adapt as library
from flown.generator.adapt import AdaptConfig, Objective
from flown.generator.model import Flown
from flown.measure.evaluate import predictions
from flown.measure.novelty import mutual_iou
from flown.tasks import ImageData
from flown.training import TrainConfig, step_generator

DETACH = (0.0, 0.2, 0.4, 0.6, 0.8)
TRAINED = ("detach-0", "detach-0.4", "detach-0.8")  # whose accuracies are compared
GRIDS = (20, 100)  # solver steps between which memory is compared
DATA = "digits"  # ships with scikit-learn; the model was trained on other handwritten digits
SAMPLES = 50
# The flow alone: the decoder would hide the effect of the stop-gradient time.
_BASE = AdaptConfig(
    networks=8,
    steps=50,
    validated=8,
    training=TrainConfig(
        steps=30,
        batch_size=64,
        learning_rate=3e-3,
        weight_decay=0.0,
        warmup=10,
        ema=0.95,
        validate_every=30,
        checkpoint_every=30,
    ),
)


def adapt(name: str, repeats: int, scratch: Path) -> list[Row]:
    """Seconds and memory of a step for every t', with and without recomputation; memory by number
    of solver steps; accuracy and agreement after a fixed number of training steps.

    Memory is the peak of a step over the memory before it, each in its own process. Accuracies are
    means of 50 networks on test images.
    """
    configs = {f"detach-{t:g}": _BASE.model_copy(update={"detach": t}) for t in DETACH}
    configs |= {
        f"{k}-recompute": c.model_copy(update={"recompute": True}) for k, c in configs.items()
    }
    steps: dict[str, Callable[[], object]] = {k: _step(name, c) for k, c in configs.items()}
    timed = medians(steps, repeats)
    whole = statistics.median(timed["detach-0"])
    rows = []
    for method, values in timed.items():
        median = statistics.median(values)
        took = _row(method, "seconds a step", median, repeats, std=spread(values))
        rows.append(took | {"ratio": median / whole})
        rows.append(_row(method, "MB a step", memory(name, configs[method]), 1))
    for count in GRIDS:
        for recompute in (False, True):
            config = _BASE.model_copy(
                update={"steps": count, "recompute": recompute, "detach": 0.0}
            )
            method = f"detach-0-{count}-steps" + ("-recompute" if recompute else "")
            rows.append(_row(method, "MB a step", memory(name, config), 1))
    images = data.load(DATA)
    static = Flown.from_pretrained(name)
    rows += _quality("static", static, images)
    for method in TRAINED:
        model = library.adapt(static, images, configs[method], out=scratch / method, layout=0)
        rows += _quality(method, model, images)
    return rows


def memory(name: str, config: AdaptConfig) -> float:
    """Megabytes that one step needs beyond the model, measured in its own process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_watched, (name, config))


def _watched(name: str, config: AdaptConfig) -> float:
    _step(
        name, config.model_copy(update={"steps": 2, "detach": 0.0})
    )()  # buffers that are made only once
    step, done = _step(name, config), threading.Event()
    before = most = held()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return most - before


def _step(name: str, config: AdaptConfig) -> Callable[[], object]:
    """One forward and backward pass."""
    model = Flown.from_pretrained(name)
    objective = Objective(model, data.load(DATA), 0, config)
    model.velocity.requires_grad_(True)
    return lambda: objective(step_generator(0, 0)).backward()


def _quality(method: str, model: Flown, images: ImageData) -> list[Row]:
    batch = library.sample(model, images, 0, SAMPLES, 1, _BASE.solver, _BASE.steps)
    wrong = predictions(batch, images.test.images) != images.test.labels
    accuracy = 100 * (1 - wrong.float().mean(dim=1))
    done = 0 if method == "static" else _BASE.training.steps
    row = partial(_row, method, repeats=None, epoch=done, n=SAMPLES)
    return [
        row("accuracy", float(accuracy.mean()), std=float(accuracy.std())),
        row("diversity-iou", mutual_iou(wrong)),
    ]


def _row(
    method: str,
    metric: str,
    value: float,
    repeats: int | None,
    n: int = _BASE.networks,
    epoch: int | None = None,
    std: float | None = None,
) -> Row:
    chosen = "all" if repeats is None else f"median of {repeats}"
    return {
        "dataset": DATA,
        "method": method,
        "metric": metric,
        "value": value,
        "std": std,
        "n": n,
        "selection": chosen,
        "epoch": epoch,
        "paper": None,
    }
