"""The README.md of an any-task generator, in the hub's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flown.anytask.config import AnyTaskConfig
from flown.tasks.stream import StreamConfig
from flown.version import __version__

_CARD = """---
library_name: flown
license: mit
tags: [weight-generation, flow-matching, few-shot]
---

# A generator of networks for any images

From a support set of 2 to {ways} classes it writes the weights of working classifiers, without a gradient
step: {nets}. Networks of one support set differ; an ensemble of them is better than one.

```python
import flown

model = flown.Flown.from_pretrained("flown-any")
batch = model.generate(images, labels, n=50, seed=0)  # (K, c, H, W) uint8 or in [0, 1], and (K,)
accuracies = flown.evaluate(batch, other_images, their_labels)
```

## What it has seen

Random tasks over the training classes of {pools},
each with a look of its own.{unseen}
{validation}
Trained by flown {version}: {base} steps of the base networks, {steps} of the flow{begun}.
"""

_UNSEEN = """ Not seen, in any
form: MNIST, USPS, EMNIST, KMNIST, Fashion-MNIST, CIFAR-10, SVHN, digits of any script, Latin alphabets,
and the evaluation and validation alphabets of Omniglot. Greek and Cyrillic handwriting, some of whose
letters look Latin, is among what was seen."""


def render(config: AnyTaskConfig, card: Mapping[str, Any]) -> str:
    """The text of a model card."""
    pools = ", ".join(
        f"{name} ({found['images']:,} images in all its parts)"
        for name, found in card.get("pools", {}).items()
    )
    figures = "".join(
        f"| {name} | {value:.1f} |\n" for name, value in card.get("validation", {}).items()
    )
    table = (
        "\n## Classes that were kept for validation\n\n10-way 5-shot, one network of the first kind a "
        f"task.\n\n| classes of | accuracy, % |\n|---|---:|\n{figures}"
    )
    return _CARD.format(
        ways=config.tasks.ways,
        nets=", ".join(f"`{net}`" for net in config.nets),
        pools=pools or ", ".join(config.tasks.pools),
        unseen=_UNSEEN if config.tasks.pools.keys() == StreamConfig().pools.keys() else "",
        validation=table if figures else "",
        version=__version__,
        base=config.base.training.steps,
        steps=config.training.steps,
        begun=", further from another model" if card.get("begin") else "",
    )
