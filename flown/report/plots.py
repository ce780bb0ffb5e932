"""The figures of a report card. Each is None where the card has nothing to draw it from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flown.generator.card import Card, TaskCard
from flown.generator.heldout import HeldOutCard
from flown.report.style import SOURCE, STYLES, TASK_COLOURS, figure, legend, panels, style_of
from flown.training import History
from flown.weights.geometry import principal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_X_TICKS = (0, 0.25, 0.5, 0.75, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def ordered(methods: Collection[str]) -> list[str]:
    """Methods in the order of `STYLES`, unknown ones last."""
    return [m for m in STYLES if m in methods] + [m for m in methods if m not in STYLES]


def accuracies(card: Card) -> Figure:
    """A strip of every network's test accuracy per method, its mean as a bar and a number."""
    most = max(len(task.methods) for task in card.tasks.values())
    page, axes = panels(len(card.tasks), 5.6, 0.27 * most + 1.0)
    jitter = np.random.default_rng(0)
    for axis, (name, task) in zip(axes, card.tasks.items(), strict=True):
        _strips(axis, {method: m.test for method, m in task.methods.items()}, jitter)
        _zoo_line(axis.axvline, task)
        axis.set_xlabel("test accuracy, %")
        axis.set_title(name, fontsize=11, loc="left")
    return page


def held_out(card: HeldOutCard) -> Figure:
    """A strip of every held-out task's mean accuracy per method, their mean as a bar and a number."""
    page, axes = panels(1, 7.2, 0.27 * len(card.accuracies) + 1.0)
    _strips(axes[0], card.accuracies, np.random.default_rng(0))
    axes[0].set_xlabel("accuracy on a task's queries, %")
    return page


def _strips(axis: Any, accuracies: Mapping[str, Tensor], jitter: np.random.Generator) -> None:
    """Accuracies by method as dots in a row each; NaN is no dot."""
    shown = ordered(accuracies)[::-1]
    for place, method in enumerate(shown):
        values = accuracies[method][~accuracies[method].isnan()].numpy()
        spread = place + jitter.uniform(-0.26, 0.26, len(values))
        axis.scatter(values, spread, s=10, alpha=0.5, color=style_of(method).colour, linewidths=0)
        mean = values.mean()
        axis.plot([mean, mean], [place - 0.38, place + 0.38], color="black", lw=1.6)
        weight = "bold" if method == "flown" else "normal"
        axis.text(
            1.02,
            place,
            f"{mean:.1f}",
            transform=axis.get_yaxis_transform(),
            va="center",
            fontsize=9,
            fontweight=weight,
        )
    axis.set_yticks(range(len(shown)), [style_of(m).label for m in shown])
    for label, method in zip(axis.get_yticklabels(), shown, strict=True):
        label.set_fontweight("bold" if method == "flown" else "normal")
    axis.set_xlim(-2, 102)
    axis.text(
        1.02,
        len(shown) - 0.35,
        "mean",
        transform=axis.get_yaxis_transform(),
        fontsize=8,
        color="#555555",
    )
    axis.grid(axis="x", alpha=0.25)


def confusion(card: Card) -> Figure | None:
    """Accuracy of networks generated for the row's task on the column's images."""
    if not card.compares_tasks:
        return None
    names = list(card.tasks)
    values = np.array([[np.nan if v is None else v for v in row] for row in card.confusion])
    page, axes = figure(1, 1, 1.15 * len(names) + 2.6, 0.8 * len(names) + 1.4)
    axis = axes[0]
    axis.imshow(np.ma.masked_invalid(values), cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axis.set_facecolor("#f0f0f0")
    for i, j in np.ndindex(values.shape):
        text = "–" if np.isnan(values[i, j]) else f"{values[i, j]:.1f}"
        axis.text(
            j,
            i,
            text,
            ha="center",
            va="center",
            fontsize=11,
            color="white" if values[i, j] > 55 else "black",
        )
    axis.set_xticks(range(len(names)), names, rotation=20, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("tested on")
    axis.set_ylabel("generated for")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return page


def novelty(card: Card) -> Figure | None:
    """Distance to the nearest training network against accuracy."""
    if all(m.ratio is None for task in card.tasks.values() for m in task.methods.values()):
        return None
    page, axes = panels(len(card.tasks), 5.6, 3.7, room=0.7)
    for axis, (name, task) in zip(axes, card.tasks.items(), strict=True):
        farthest = 1.0
        for method in ordered(task.methods):
            measured, generated = task.methods[method], method == "flown"
            if measured.ratio is None:
                continue
            farthest = max(farthest, float(measured.ratio.max()))
            style = style_of(method)
            axis.scatter(
                measured.ratio,
                measured.test,
                s=26 if generated else 16,
                marker=style.mark,
                alpha=0.65,
                color=style.colour,
                linewidths=0,
                zorder=3 if generated else 2,
                label=style.label,
            )
        # Linear up to a held-out network's distance, logarithmic beyond: untrained ones are far.
        axis.set_xscale("symlog", linthresh=1, linscale=1.5)
        axis.set_xlim(-0.05, 1.25 * farthest)
        ticks = [t for t in _X_TICKS if t <= 1.25 * farthest]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_xticks([], minor=True)
        axis.axvline(1, color="black", lw=0.8, ls=":")
        _zoo_line(axis.axhline, task)
        axis.set_ylim(-2, 102)
        axis.set_xlabel("L2 to the nearest training network / held-out networks' own")
        axis.set_ylabel("test accuracy, %")
        axis.set_title(name, fontsize=11, loc="left")
    legend(page, axes, 4 if len(axes) > 1 else 3)
    return page


def trajectory(card: Card) -> Figure | None:
    """Accuracy of networks decoded on the way from source to weights."""
    shown = {n: t for n, t in card.tasks.items() if t.times is not None and t.along is not None}
    if not shown:
        return None
    page, axes = figure(1, 1, 8.2, 3.8)
    axis = axes[0]
    looks = zip(cycle(TASK_COLOURS), cycle("os^Dv"))
    for (colour, mark), (name, task) in zip(looks, shown.items(), strict=False):
        assert task.times is not None and task.along is not None
        mean, spread = task.along.mean(dim=1), task.along.std(dim=1, correction=0)
        axis.plot(task.times, mean, marker=mark, color=colour, ms=4.5, label=name)
        axis.fill_between(task.times, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
        axis.axhline(float(task.methods["zoo"].test.mean()), color=colour, lw=1, ls=":")
    axis.set_xlabel("t (0: source, 1: weights)")
    axis.set_ylabel("test accuracy, %")
    axis.set_ylim(0, 102)
    axis.grid(alpha=0.25)
    legend(page, axes, 4)
    return page


def losses(histories: Mapping[str, History]) -> Figure | None:
    """Training loss of encoder and flow; accuracy of reconstructed networks."""
    shown = {name: history for name, history in histories.items() if history}
    if not shown:
        return None
    reconstructed = [h for h in shown.get("encoder", []) if "train reconstructed" in h]
    count = len(shown) + bool(reconstructed)
    page, axes = figure(1, count, 4.2 * count, 3.4)
    for axis, (name, history) in zip(axes, shown.items(), strict=False):
        axis.plot(
            [h["step"] for h in history], [h["loss"] for h in history], "o-", ms=3, color="#0072B2"
        )
        if all(h["loss"] > 0 for h in history):
            _log_scale(axis)
        axis.set_title(f"{name}: loss", fontsize=11, loc="left")
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    if reconstructed:
        _reconstructions(axes[-1], reconstructed)
    return page


def _log_scale(axis: Any) -> None:
    """Logarithmic, with ticks such as 0.2, 0.5, 1 written out."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def _reconstructions(axis: Any, history: History) -> None:
    steps = [h["step"] for h in history]
    for split, method in (
        ("train", "reconstruction-train"),
        ("held-out", "reconstruction-held-out"),
    ):
        if f"{split} reconstructed" not in history[0]:
            continue
        style = style_of(method)
        axis.plot(
            steps,
            [h[f"{split} reconstructed"] for h in history],
            color=style.colour,
            marker=style.mark,
            ms=4,
            label=f"{split}, reconstructed",
        )
        zoo = style_of("zoo" if split == "train" else "zoo-held-out").colour
        axis.plot(steps, [h[split] for h in history], color=zoo, ls=":", label=f"{split}, as is")
    axis.set_title("encoder: accuracy of networks", fontsize=11, loc="left")
    axis.set_xlabel("step")
    axis.set_ylabel("validation accuracy, %")
    axis.set_ylim(0, 102)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def latents(card: Card) -> Figure | None:
    """Zoo, held-out networks, source, samples and their paths in the zoo's two main directions."""
    if not all("zoo" in task.latents for task in card.tasks.values()):
        return None
    zoos = torch.cat([task.latents["zoo"] for task in card.tasks.values()])
    plane = principal(zoos)
    if plane is None:
        return None
    page, axes = panels(len(card.tasks), 5.4, 4.2, room=0.5)
    background = plane.project(zoos)
    for axis, (name, task) in zip(axes, card.tasks.items(), strict=True):
        if len(card.tasks) > 1:
            axis.scatter(*background.T, s=7, color="#DDDDDD", lw=0, label="zoos of all tasks")
        for part, style, size in (
            ("source", SOURCE, 26),
            ("zoo", style_of("zoo"), 13),
            ("held-out", style_of("zoo-held-out"), 15),
            ("samples", style_of("flown"), 18),
        ):
            if part in task.latents:
                points = plane.project(task.latents[part])
                axis.scatter(
                    *points.T,
                    s=size,
                    marker=style.mark,
                    alpha=0.8,
                    zorder=3,
                    color=style.colour,
                    linewidths=0,
                    label=style.label,
                )
        if task.path is not None:
            for i in range(task.path.shape[1]):
                axis.plot(
                    *plane.project(task.path[:, i]).T,
                    color=style_of("flown").colour,
                    lw=0.7,
                    alpha=0.55,
                    zorder=2,
                )
        axis.set_title(name, fontsize=11, loc="left")
        axis.set_xlabel("first principal direction")
        axis.set_ylabel("second principal direction")
    legend(page, axes, 5 if len(axes) > 1 else 3)
    return page


def _zoo_line(draw: Any, task: TaskCard) -> None:
    draw(
        float(task.methods["zoo"].test.mean()), color=style_of("zoo").colour, lw=1, ls=":", zorder=1
    )
