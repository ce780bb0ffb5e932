"""The README of a saved model: what it generates, how well, and where it should not be trusted."""

from __future__ import annotations

from typing import Any, Protocol

from flown.weights.layout import JointLayout


class Described(Protocol):
    """What the card tells of: a model's layouts and, where one was made, its report card."""

    joint: JointLayout
    card: dict[str, Any]


_HEAD = """---
library_name: flown
tags: [weight-generation, flow-matching]
license: mit
---

# A flown model

Given a support set of labelled images, it generates the weights of `{net}` classifiers: a flow on
the latents of a weight encoder, conditioned on the images. It was fitted on trained networks for
these tasks:

| task | channels | size | activation | classes |
|---|---|---|---|---|
{tasks}

```python
import flown

model = flown.Flown.from_pretrained("PATH OR HUB ID")
batch = model.generate(images, labels, n=50)   # uint8 (K, c, H, W) and (K,) -> 50 networks
net = batch.module(0)                          # torch.nn.Module; feed it task.preprocess(images)
```
"""

_LIMITS = """
## Limits

- It generates networks of this architecture for tasks like those above. For other images the
  nearest known task's weights come out; check accuracy on labelled images of your own.
- Class order is the order of the labels in training; a support set with its classes in another
  order asks for something the model has not seen.
- Read novelty beside accuracy: a ratio near 0 means copies of training networks, a ratio of 1
  means as far from them as an independently trained network is.
"""


def render(model: Described) -> str:
    """The model card as Markdown; the report card's table is in it when there is one."""
    tasks = "\n".join(
        f"| {x.task.name} | {x.task.channels} | {x.task.size} | {x.task.activation} "
        f"| {len(x.task.classes)} |"
        for x in model.joint.layouts
    )
    head = _HEAD.format(net=model.joint.layouts[0].net, tasks=tasks)
    return head + _adapted(model.card) + _card(model.card) + _LIMITS


def _adapted(card: dict[str, Any]) -> str:
    """What the model was trained on after its fit, if it was."""
    about = card.get("adapted")
    if about is None:
        return ""
    return (
        f"\n## Adapted\n\nAfterwards adapted to '{about['data']}' (parts: "
        f"{', '.join(about['config']['parts'])}; method: {about['config']['method']}): networks for "
        f"task '{about['task']}' are for those images and their order of classes, preprocessed as "
        f"the task's. Mean validation accuracy there: {about['static']:.1f} % before, "
        f"{about['val']:.1f} % after.\n"
    )


def _card(card: dict[str, Any]) -> str:
    rows = card.get("rows", [])
    if not rows:
        return "\nNo report card has been made for this model yet (`flown evaluate`).\n"
    lines = [
        "\n## Report card\n",
        "Percent of the test images; see `selection` for what was chosen where.\n",
    ]
    lines += [
        "| dataset | method | metric | value | std | n | selection |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        std = "" if row.get("std") is None else f"{row['std']:.1f}"
        lines.append(
            f"| {row['dataset']} | {row['method']} | {row['metric']} | {row['value']:.1f} | {std} "
            f"| {row['n']} | {row['selection']} |"
        )
    return "\n".join(lines) + "\n"
