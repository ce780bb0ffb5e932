"""What stands beside an exported file: what it reads, what it says, what it was generated from."""

from __future__ import annotations

import json

from flown.base.text import plain
from flown.nets.architecture import per_channel
from flown.version import __version__
from flown.weights.batch import WeightBatch

_CARD = """# {count} x {name}

Exported by flown {version}.

- **Input**: images of {channels}, {size} x {size} pixels, as `(pixels / 255 - {mean}) / {std}`.
- **Classes**: {classes}.
- **Origin**: {origin}.

{use}
"""


def render(batch: WeightBatch, use: str) -> str:
    """The card of networks as Markdown.

    Args:
        use: what there is to know about the file, and how it is called.
    """
    kind = batch.layout.architecture
    classes = batch.task.classes if batch.task else ()
    origin = "; ".join(f"{key} {json.dumps(value)}" for key, value in batch.provenance.items())
    return _CARD.format(
        count=len(batch),
        name=plain(batch.name),
        version=__version__,
        channels={1: "one grey channel", 3: "red, green and blue"}.get(
            kind.channels, f"{kind.channels} channels"
        ),
        size=kind.size,
        mean=per_channel(kind.mean),
        std=per_channel(kind.std),
        classes=", ".join(map(plain, classes)) or f"{kind.outputs}, without names",
        origin=plain(origin) or "unknown",
        use=use,
    )
