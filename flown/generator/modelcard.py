"""The README of a saved model: what it generates, its accuracy and its limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flown.nets.architecture import per_channel
from flown.tasks import TaskTable

if TYPE_CHECKING:
    from flown.generator.model import Flown


NOVELTY = ("l2-ratio", "max-iou", "diversity-iou")
_NAMED = 8  # tasks whose names the card lists

_HEAD = """---
library_name: flown
tags: [weight-generation, flow-matching]
license: mit
---

# A flown model

Given a support set of labelled images, it generates the weights of `{net}` classifiers: a flow on
the latents of a weight encoder, conditioned on the images. It was fitted on networks trained for
{tasks}. They are of these architectures:

| channels | size | activation | mean, std of pixels | classes |
|---|---|---|---|---|
{layouts}

```python
import flown

model = flown.Flown.from_pretrained("PATH OR HUB ID")
batch = model.generate(images, labels, n=50)  # uint8 (K, c, H, W) and (K,) -> 50 networks
net = batch.module(0)  # torch.nn.Module
logits = net(batch.preprocess(new_images))
```
"""

_LIMITS = """
## Limits

- Whether it generates working networks for tasks unlike those above is not known: check accuracy on
  labelled images of your own.
- Class order is the order of the labels in training; a support set with its classes in another
  order asks for something the model has not seen.
- Read novelty beside accuracy: a ratio near 0 means copies of training networks, a ratio of 1
  means as far from them as an independently trained network is.
"""


def kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a report card that a model's README shows: accuracies, and how new networks are."""
    return [row for row in rows if row["metric"] in ("accuracy", *NOVELTY)]


def render(model: Flown) -> str:
    """The model card as Markdown; the report card's table is in it when there is one."""
    layouts = "\n".join(
        f"| {x.channels} | {x.size} | {x.activation} | {per_channel(x.mean)}, {per_channel(x.std)} "
        f"| {x.outputs} |"
        for x in (layout.architecture for layout in model.space.joint.layouts)
    )
    head = _HEAD.format(
        net=model.space.joint.layouts[0].net, tasks=_tasks(model.tasks), layouts=layouts
    )
    return head + _adapted(model.card) + _card(model.card) + _LIMITS


def _tasks(tasks: TaskTable) -> str:
    names = ", ".join(f"`{name}`" for name in list(tasks)[:_NAMED])
    beyond = len(tasks) - _NAMED
    return names + (f" and {beyond:,} more tasks" if beyond > 0 else "")


def _adapted(card: dict[str, Any]) -> str:
    """The data that the model was adapted to after its fit, if any."""
    about = card.get("adapted")
    if about is None:
        return ""
    return (
        f"\n## Adapted\n\nAfterwards adapted to '{about['data']}' (parts: "
        f"{', '.join(about['config']['parts'])}; method: {about['config']['method']}): what it "
        f"generates is for those images and their order of classes. Mean validation accuracy there: "
        f"{about['static']:.1f} % before, {about['val']:.1f} % after.\n"
    )


def _card(card: dict[str, Any]) -> str:
    rows = card.get("rows", [])
    if not rows:
        return "\nNo report card has been made for this model yet (`flown evaluate`).\n"
    if any("difference" in row for row in rows):
        return _held_out(rows)
    lines = [
        "\n## Report card\n",
        "Percent of the test images; see `selection` for what was chosen where. L2 ratio: distance to",
        "the nearest training network, 0 for a copy, 1 for a held-out network. IoU: share of errors in",
        "common with the most similar training network, and among the networks themselves.\n",
    ]
    lines += [
        "| dataset | method | accuracy | n | selection | L2 ratio | max IoU | IoU among |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {(r["dataset"], r["method"], r["metric"]): r["value"] for r in rows}
    for row in (r for r in rows if r["metric"] == "accuracy"):
        std = "" if row.get("std") is None else f" ± {row['std']:.1f}"
        novelty = [""] * len(NOVELTY)
        if row["selection"] == "all":
            values = (found.get((row["dataset"], row["method"], metric)) for metric in NOVELTY)
            novelty = ["" if value is None else f"{value:.2f}" for value in values]
        cells = [row["dataset"], row["method"], f"{row['value']:.1f}{std}", str(row["n"])]
        lines.append(f"| {' | '.join([*cells, row['selection'], *novelty])} |")
    return "\n".join(lines) + "\n"


def _held_out(rows: list[dict[str, Any]]) -> str:
    lines = [
        "\n## Report card\n",
        "Tasks that no training saw: mean accuracy of all networks in percent of the tasks' queries, and",
        "what generated networks are ahead by on the same tasks; with 95 % intervals over tasks.\n",
        "| method | accuracy | `flown` minus it | tasks |",
        "|---|---|---|---|",
    ]
    for row in rows:
        ahead = ""
        if "difference" in row:
            ahead = f"{row['difference']:+.1f}{_half(row['difference_interval'])}"
        mean = f"{row['value']:.1f}{_half(row['interval'])}"
        lines.append(f"| {row['method']} | {mean} | {ahead} | {row['n']} |")
    return "\n".join(lines) + "\n"


def _half(width: float | None) -> str:
    return "" if width is None else f" ± {width:.1f}"
