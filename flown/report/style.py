"""One look for every figure: a colour per method (Okabe & Ito, safe for colour-blind readers)."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "flown": "#D55E00",
    "zoo": "#0072B2",
    "zoo-held-out": "#56B4E9",
    "reconstruction-train": "#009E73",
    "reconstruction-held-out": "#7FCFB8",
    "random-init": "#999999",
    "nearest": "#CC79A7",
    "noise-0.06": "#E69F00",
    "noise-0.12": "#B8860B",
    "average-16": "#4B3F72",
    "gaussian": "#333333",
    "source": "#BBBBBB",
}
LABELS = {
    "flown": "generated",
    "zoo": "zoo, train",
    "zoo-held-out": "zoo, held-out",
    "reconstruction-train": "reconstructed, train",
    "reconstruction-held-out": "reconstructed, held-out",
    "random-init": "random init",
    "nearest": "lookup",
    "noise-0.06": "noise 0.06",
    "noise-0.12": "noise 0.12",
    "average-16": "average of 16",
    "gaussian": "per-weight Gaussian",
    "source": "source",
}


def figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure of panels without a window behind it, and its axes as a flat list."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(width, height), layout="constrained")
    axes = page.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return page, axes


def grid(count: int) -> tuple[int, int]:
    """Rows and columns for `count` panels, at most two beside each other."""
    columns = min(2, count)
    return -(-count // columns), columns


def encode(page: Figure) -> str:
    """The figure as a PNG in base64."""
    buffer = io.BytesIO()
    page.savefig(buffer, format="png", dpi=130)
    return base64.b64encode(buffer.getvalue()).decode()
