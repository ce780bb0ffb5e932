"""The figures of a report card."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flown.card import Card
from flown.report.style import COLOURS, LABELS, figure, grid
from flown.training import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ORDER = ("zoo", "zoo-held-out", "reconstruction-train", "reconstruction-held-out", "flown",
          "nearest", "noise-0.06", "noise-0.12", "average-16", "gaussian", "random-init")  # fmt: skip


def accuracies(card: Card) -> Figure:
    """A strip of every network's test accuracy per method, with the mean."""
    rows, columns = grid(len(card.tasks))
    page, axes = figure(rows, columns, 5.6 * columns, 3.7 * rows)
    jitter = np.random.default_rng(0)
    for axis, (name, task) in zip(axes, card.tasks.items(), strict=False):
        shown = [m for m in _ORDER if m in task.methods]
        for place, method in enumerate(reversed(shown)):
            values = task.methods[method].test.numpy()
            spread = place + jitter.uniform(-0.28, 0.28, len(values))
            axis.scatter(values, spread, s=9, alpha=0.45, color=COLOURS[method], linewidths=0)
            axis.plot([values.mean()] * 2, [place - 0.38, place + 0.38], color="black", lw=1.6)
        axis.set_yticks(range(len(shown)), [LABELS[m] for m in reversed(shown)])
        axis.set_xlabel("test accuracy, %")
        axis.set_title(name, fontsize=11, loc="left")
        axis.axvline(float(task.methods["zoo"].test.mean()), color=COLOURS["zoo"], lw=0.8, ls=":")
        axis.grid(axis="x", alpha=0.25)
    _hide(axes[len(card.tasks) :])
    return page


def confusion(card: Card) -> Figure:
    """Networks generated for the row's task, tested on the column's."""
    names = list(card.tasks)
    values = np.array([[np.nan if v is None else v for v in row] for row in card.confusion])
    side = 1.35 * len(names) + 2.4
    page, axes = figure(1, 1, side, side * 0.82)
    axis = axes[0]
    axis.imshow(values, cmap="Blues", vmin=0, vmax=100)
    for i, j in np.ndindex(values.shape):
        text = "–" if np.isnan(values[i, j]) else f"{values[i, j]:.1f}"
        axis.text(j, i, text, ha="center", va="center", fontsize=11,
                  color="white" if values[i, j] > 55 else "black")  # fmt: skip
    axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("tested on")
    axis.set_ylabel("generated for")
    axis.spines[:].set_visible(False)
    return page


def novelty(card: Card) -> Figure:
    """Distance to the nearest training network against accuracy."""
    rows, columns = grid(len(card.tasks))
    page, axes = figure(rows, columns, 5.6 * columns, 3.7 * rows)
    for axis, (name, task) in zip(axes, card.tasks.items(), strict=False):
        for method in _ORDER:
            measured = task.methods.get(method)
            if measured is None or measured.ratio is None or method.startswith("reconstruction-t"):
                continue
            big = method == "flown"
            axis.scatter(measured.ratio, measured.test, s=22 if big else 12, alpha=0.6,
                         color=COLOURS[method], linewidths=0, zorder=3 if big else 2,
                         label=LABELS[method])  # fmt: skip
        axis.axvline(1, color="black", lw=0.8, ls=":")
        axis.axhline(float(task.methods["zoo"].test.mean()), color=COLOURS["zoo"], lw=0.8, ls=":")
        axis.set_xlim(left=-0.05)
        axis.set_xlabel("L2 to nearest training network / held-out's own")
        axis.set_ylabel("test accuracy, %")
        axis.set_title(name, fontsize=11, loc="left")
    handles, labels = axes[0].get_legend_handles_labels()
    page.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    _hide(axes[len(card.tasks) :])
    return page


def trajectory(card: Card) -> Figure:
    """Accuracy of what is decoded on the way from source to weights."""
    page, axes = figure(1, 1, 7.2, 3.8)
    palette = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    for colour, (name, task) in zip(palette, card.tasks.items(), strict=False):
        axes[0].plot(task.times, task.along, "o-", color=colour, ms=4, label=name)
        axes[0].axhline(float(task.methods["zoo"].val.mean()), color=colour, lw=0.9, ls=":")
    axes[0].set_xlabel("t (0: source, 1: weights)")
    axes[0].set_ylabel("validation accuracy, %")
    axes[0].legend(frameon=False, fontsize=9)
    axes[0].grid(alpha=0.25)
    return page


def losses(histories: dict[str, History]) -> Figure | None:
    """Training loss of encoder and flow; the encoder's reconstruction accuracy."""
    shown = {name: history for name, history in histories.items() if history}
    if not shown:
        return None
    page, axes = figure(1, len(shown) + ("encoder" in shown), 4.2 * (len(shown) + 1), 3.4)
    for axis, (name, history) in zip(axes, shown.items(), strict=False):
        axis.plot([h["step"] for h in history], [h["loss"] for h in history], color="#0072B2")
        axis.set_yscale("log")
        axis.set_title(f"{name}: loss", fontsize=11, loc="left")
        axis.set_xlabel("step")
    if "encoder" in shown:
        axis = axes[-1]
        for split, colour in (("train", "#009E73"), ("held-out", "#7FCFB8")):
            points = [h for h in shown["encoder"] if f"{split} reconstructed" in h]
            if not points:
                continue
            steps = [h["step"] for h in points]
            axis.plot(steps, [h[f"{split} reconstructed"] for h in points], color=colour,
                      label=f"{split}, reconstructed")  # fmt: skip
            axis.plot(steps, [h[split] for h in points], color=colour, ls=":", label=f"{split}, as is")
        axis.set_title("encoder: accuracy of networks", fontsize=11, loc="left")
        axis.set_xlabel("step")
        axis.set_ylabel("validation accuracy, %")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=8)
    return page


def latents(card: Card) -> Figure:
    """Zoo, held-out networks, source, samples and their paths in the zoo's two main directions."""
    rows, columns = grid(len(card.tasks))
    page, axes = figure(rows, columns, 5.6 * columns, 4.4 * rows)
    every = torch.cat([task.latents["zoo"] for task in card.tasks.values()])
    centre = every.mean(dim=0)
    directions = torch.pca_lowrank(every - centre, q=2, niter=6)[2]

    def project(x: Tensor) -> np.ndarray:
        return ((x - centre) @ directions).numpy()  # type: ignore[no-any-return]

    for axis, (name, task) in zip(axes, card.tasks.items(), strict=False):
        background = project(every)
        axis.scatter(*background.T, s=6, color="#DDDDDD", linewidths=0, label="other tasks' zoos")
        for part, key, size in (("source", "source", 8), ("zoo", "zoo", 12),
                                ("held-out", "zoo-held-out", 12), ("samples", "flown", 14)):  # fmt: skip
            points = project(task.latents[part])
            axis.scatter(*points.T, s=size, alpha=0.75, color=COLOURS[key], linewidths=0,
                         label=LABELS[key])  # fmt: skip
        if task.path is not None:
            for i in range(task.path.shape[1]):
                axis.plot(*project(task.path[:, i]).T, color=COLOURS["flown"], lw=0.6, alpha=0.6)
        axis.set_title(name, fontsize=11, loc="left")
        axis.set_xlabel("first principal direction")
        axis.set_ylabel("second")
    handles, labels = axes[0].get_legend_handles_labels()
    page.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False,
                markerscale=1.5)  # fmt: skip
    _hide(axes[len(card.tasks) :])
    return page


def _hide(axes: np.ndarray) -> None:
    for axis in axes:
        axis.set_visible(False)
