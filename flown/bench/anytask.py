"""From five images a class to working networks: written, or trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from flown import tasks
from flown.anytask.model import AnyTask
from flown.anytask.writer import architecture
from flown.base.provenance import Row
from flown.bench.timing import medians, timed_rows
from flown.generator.model import Flown
from flown.measure.evaluate import evaluate
from flown.measure.fromsupport import fresh, trained
from flown.tasks import Support
from flown.weights.batch import WeightBatch

NETS = ("cnn-small", "conv4-8", "conv4-32")
_SCRATCH, _ADAPTED = 200, 5  # steps


def anytask(name: str, repeats: int) -> list[Row]:
    """Seconds from scikit-learn's digits, five a class, to networks, and what these get right.

    Beside one network and a hundred: one trained from scratch for 200 steps of Adam, and the model's base
    network trained for 5, which is what MAML does at test time.
    """
    model: AnyTask = Flown.from_pretrained(name)
    digits = tasks.load("digits")
    support = tasks.draw_support(digits.train, 10, 5, torch.Generator().manual_seed(0))
    rows: list[Row] = []
    for net in (net for net in NETS if net in model.writers):
        candidates: dict[str, Callable[[], WeightBatch]] = {
            "written": partial(model.generate, *support, n=1, net=net),
            "100 written": partial(model.generate, *support, n=100, net=net),
            f"trained {_SCRATCH} steps": partial(_scratch, support, net),
            f"base trained {_ADAPTED} steps": partial(_adapted, model, support, net),
        }
        for row in timed_rows(medians(candidates, repeats), "written", 1):
            batch = candidates[row["method"]]()
            right = evaluate(batch, digits.test.images, digits.test.labels)
            found = {"metric": "accuracy", "value": float(right.mean()), "std": None}
            plain = {key: value for key, value in row.items() if key != "ratio"}
            rows += [row | {"net": net}, plain | found | {"net": net}]
    return rows


def _scratch(support: Support, net: str) -> WeightBatch:
    kind = architecture(net, support.images.shape[1], int(support.labels.max()) + 1)
    return _trained(fresh(kind, 1, 0), support, 1e-3, _SCRATCH)


def _adapted(model: AnyTask, support: Support, net: str) -> WeightBatch:
    return _trained(model.base(*support, net=net), support, 1e-3, _ADAPTED)


def _trained(start: WeightBatch, support: Support, rate: float, steps: int) -> WeightBatch:
    images = start.preprocess(support.images)[None]
    return start.on(trained(start, images, support.labels[None], rate, [steps])[0])
