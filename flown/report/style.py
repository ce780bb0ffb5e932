"""One style for every figure: a colour and a mark per method.

The colours are those of Okabe & Ito, safe for colour-blind readers, and their shades; marks differ
too, so that no figure depends on colour alone.
"""

from __future__ import annotations

import base64
import io
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from flown.base.text import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Style(NamedTuple):
    """How a method is named and drawn."""

    label: str
    colour: str
    mark: str


# In the order of tables and strips: the zoo, generated networks, baselines.
STYLES = {
    "zoo": Style("zoo, train", "#0072B2", "s"),
    "zoo-held-out": Style("zoo, held-out", "#56B4E9", "D"),
    "reconstruction-train": Style("reconstructed, train", "#00664B", "<"),
    "reconstruction-held-out": Style("reconstructed, held-out", "#009E73", ">"),
    "flown": Style("generated", "#D55E00", "o"),
    "p-diff": Style("p-diff", "#882255", "H"),
    "nearest": Style("lookup", "#CC79A7", "p"),
    "noise-0.06": Style("noise 0.06", "#E69F00", "^"),
    "noise-0.12": Style("noise 0.12", "#A6761D", "v"),
    "average-16": Style("average of 16", "#4B3F72", "P"),
    "gaussian": Style("Gaussian", "#333333", "X"),
    "pixel-centroid": Style("centroids of pixels", "#999933", "h"),
    "support-only": Style("support set alone", "#332288", "8"),
    "random-init": Style("random init", "#8C8C8C", "*"),
    "recipe-init": Style("recipe's init", "#BFBFBF", "d"),
}
# Starts of training beside "flown" and "recipe-init" (Table 3); never drawn beside the above.
STARTS = {
    "flown-any": Style("flown-any", "#882255", "H"),
    "flown-trajectory": Style("generated, trajectory", "#009E73", "^"),
    "flown-trajectory-stopped": Style("trajectory, stop chosen", "#E69F00", "v"),
    "default-init": Style("PyTorch's init", "#8C8C8C", "*"),
    "kaiming": Style("Kaiming init", "#333333", "X"),
    "checkpoint": Style("zoo checkpoint", "#0072B2", "s"),
    "zoo-mean": Style("mean of the zoo", "#4B3F72", "P"),
    "best-lookup": Style("best lookup", "#CC79A7", "p"),
}
# Beside "zoo-held-out", "flown" and "nearest" over held-out tasks; never drawn beside other baselines.
HELD_OUT = {"flown-shuffled-context": Style("others' context", "#E69F00", "v")}
SOURCE = Style("source", "#A9A9A9", ".")
TASK_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")


# Tried where the usual font has no glyph; whichever are installed.
_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "WenQuanYi Micro Hei",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
)
_FORMULA = "$\\mathdefault{"  # how matplotlib writes powers of ten on an axis


def style_of(method: str) -> Style:
    """The style of a method; one that is not in the list is drawn in black under its own name."""
    return (STYLES | STARTS | HELD_OUT).get(method, Style(method, "#000000", "h"))


def figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure of panels without a window behind it, and its axes as a flat list."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(width, height), layout="constrained")
    engine = page.get_layout_engine()
    if engine is not None and rows > 1:
        engine.set(h_pad=0.14)  # type: ignore[call-arg]
    axes = page.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    return page, axes


def panels(count: int, width: float, height: float, room: float = 0.0) -> tuple[Figure, Any]:
    """`count` panels of a size, at most two beside each other, and inches of room for a legend."""
    columns = min(2, count)
    rows = -(-count // columns)
    page, axes = figure(rows, columns, width * columns, height * rows + room)
    for axis in axes[count:]:
        axis.set_visible(False)
    return page, axes[:count]


def legend(page: Figure, axes: Any, columns: int) -> None:
    """One legend below all panels, of everything that is in any of them."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    marks = page.legend(
        found.values(),
        found.keys(),
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        frameon=False,
        markerscale=1.6,
    )
    for handle in marks.legend_handles:
        if handle is not None:
            handle.set_alpha(1)


def encode(page: Figure) -> str:
    """The figure as a PNG, a data URI. Names in it are drawn as they are, dollars included.

    A sign that none of the fonts has is drawn as a box.
    """
    _write_names_out(page)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)
        page.savefig(buffer, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _write_names_out(page: Figure) -> None:
    """Text without control characters and formulas, in fonts that know more scripts if there are any."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    for axis in (axis for axes in page.axes for axis in (axes.xaxis, axes.yaxis)):
        names = [label.get_text() for label in axis.get_ticklabels()]
        if any(plain(name) != name for name in names):
            axis.set_ticks(axis.get_ticklocs(), [plain(name) for name in names])
    installed = set(font_manager.get_font_names())
    others = [name for name in _FONTS if name in installed]
    for text in page.findobj(Text):
        assert isinstance(text, Text)
        if not text.get_text().startswith(_FORMULA):
            text.set_parse_math(False)
        text.set_text(plain(text.get_text(), keep="\n"))
        text.set_fontfamily([*text.get_fontfamily(), *others])
