"""The figures of a zoo's population. Each is None where nothing is known to draw it from."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flown.report.style import Style, figure, legend, panels, style_of
from flown.zoo import Zoo
from flown.zoo.inspect.population import SPLITS, Group, Plane, Population, TaskPopulation, networks
from flown.zoo.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = 200  # networks of a split that are drawn one by one
_BINS = 30
_TENSORS = 30  # histograms a task
_STYLES = {"train": style_of("zoo"), "held-out": style_of("zoo-held-out")}
_DARK, _PALE = "#333333", "#C9CDD2"


def _style_of(split: str) -> Style:
    return _STYLES.get(split, style_of(split))


def accuracies(zoo: Zoo, population: Population) -> Figure | None:
    """Validation accuracy by epoch: every network a faint line, each split's mean a bold one."""
    if not any(group.val for task in population.tasks for group in task.groups):
        return None
    page, axes = panels(len(population.tasks), 5.4, 3.4, room=0.4)
    for axis, task in zip(axes, population.tasks, strict=True):
        for split in SPLITS:
            groups = [g for g in task.groups if g.split == split and g.val is not None]
            if len({g.epoch for g in groups}) > 1:
                _lines(axis, zoo, task.task, split)
            else:
                _strip(axis, zoo, task.task, split)
            _mean_line(axis, split, groups)
        _title(axis, task.task)
        axis.set_xlabel("epoch")
        axis.set_ylabel("validation accuracy, %")
        axis.grid(axis="y", alpha=0.25)
        epochs = sorted({g.epoch for g in task.groups})
        if len(epochs) == 1:  # two columns of dots, side by side
            axis.set_xticks(epochs, [f"{epochs[0]:g}"])
            axis.set_xlim(epochs[0] - 1, epochs[0] + 1)
    legend(page, axes, 4)
    return page


def _known(zoo: Zoo, task: str, split: str) -> list[list[Row]]:
    """Checkpoints with a known accuracy of up to `_LINES` networks, evenly through the split."""
    members = networks(zoo, task, split)
    step = max(1, -(-len(members) // _LINES))
    rows = [[zoo.rows[place] for place in places] for places in members[::step]]
    return [[row for row in path if row.val_accuracy is not None] for path in rows]


def _lines(axis: Any, zoo: Zoo, task: str, split: str) -> None:
    paths = _known(zoo, task, split)
    faint = min(0.25, max(0.06, 8 / max(1, len(paths))))  # many lines must not hide the mean
    for path in paths:
        axis.plot(
            [row.epoch for row in path],
            [row.val_accuracy for row in path],
            lw=0.6,
            alpha=faint,
            color=_style_of(split).colour,
            zorder=1,
        )


def _strip(axis: Any, zoo: Zoo, task: str, split: str) -> None:
    """One epoch alone: a dot a network."""
    rows = list(chain.from_iterable(_known(zoo, task, split)))
    style, side = _style_of(split), -0.35 if split == "train" else 0.35
    spread = side + np.random.default_rng(0).uniform(-0.2, 0.2, len(rows))
    axis.scatter(
        np.array([row.epoch for row in rows]) + spread,
        [row.val_accuracy for row in rows],
        s=14,
        alpha=0.6,
        color=style.colour,
        linewidths=0,
    )


def _mean_line(axis: Any, split: str, groups: list[Group]) -> None:
    from matplotlib.patheffects import withStroke

    style = _style_of(split)
    edge = [withStroke(linewidth=3.6, foreground="white")]  # sets it off from the lines behind it
    means = [g.val.mean for g in groups if g.val]
    if len(groups) == 1:
        x = groups[0].epoch + (-0.35 if split == "train" else 0.35)
        axis.plot(
            [x - 0.25, x + 0.25],
            [means[0]] * 2,
            lw=2.2,
            color=style.colour,
            path_effects=edge,
            label=f"{split}, mean",
        )
    elif groups:
        axis.plot(
            [g.epoch for g in groups],
            means,
            lw=2.2,
            marker=style.mark,
            ms=4.5,
            color=style.colour,
            label=f"{split}, mean",
            path_effects=edge,
            zorder=3,
        )


def spreads(zoo: Zoo, population: Population) -> Figure | None:
    """Histograms of the validation accuracy of each network's last checkpoint, a split each."""
    values = {
        (task.task, split): [
            accuracy
            for places in networks(zoo, task.task, split)
            if (accuracy := zoo.rows[places[-1]].val_accuracy) is not None
        ]
        for task in population.tasks
        for split in SPLITS
    }

    def draw(axis: Any, task: TaskPopulation) -> None:
        parts = [(split, _style_of(split), values[task.task, split]) for split in SPLITS]
        _histogram(axis, parts)
        axis.set_xlabel("validation accuracy of the last checkpoint, %")

    return _panels(population, draw) if any(values.values()) else None


def distances(population: Population) -> Figure | None:
    """Histograms of L2 distances: pairs of training networks, and to the nearest of them."""
    if not any(len(task.distances.pairs) for task in population.tasks):
        return None
    near = style_of("zoo")._replace(colour="#00664B")

    def draw(axis: Any, task: TaskPopulation) -> None:
        d = task.distances
        _histogram(
            axis,
            [
                ("two training networks", style_of("zoo")._replace(colour=_PALE), d.pairs.tolist()),
                ("training network to the nearest other", near, d.nearest.tolist()),
                (
                    "held-out network to the nearest training network",
                    style_of("flown"),
                    d.held_out.tolist(),
                ),
            ],
        )
        axis.set_xlabel("L2 distance of weights")

    return _panels(population, draw, columns=1 if len(population.tasks) == 1 else 3)


def _panels(
    population: Population, draw: Callable[[Any, TaskPopulation], None], columns: int = 3
) -> Figure:
    page, axes = panels(len(population.tasks), 5.4, 2.9, room=0.4 if columns > 1 else 0.8)
    for axis, task in zip(axes, population.tasks, strict=True):
        draw(axis, task)
        _title(axis, task.task)
        axis.set_ylabel("share, %")
        axis.grid(axis="y", alpha=0.25)
    legend(page, axes, columns)
    return page


def _histogram(axis: Any, parts: list[tuple[str, Style, list[float]]]) -> None:
    """Shares in percent over common bins: the first filled, the others outlined."""
    known = [value for _, _, values in parts for value in values]
    if not known:
        return
    low, high = min(known), max(known)
    room = 0.02 * (high - low) or 0.5
    fewest = min(len(values) for _, _, values in parts if values)
    edges = np.linspace(low - room, high + room, (_BINS if fewest > 50 else _BINS // 2) + 1)
    for number, (label, style, values) in enumerate(parts):
        if not values:
            continue
        counts = np.histogram(values, edges)[0]
        first, last = np.flatnonzero(counts)[[0, -1]]  # an outline ends where its values do
        axis.stairs(
            100 * counts[first : last + 1] / len(values),
            edges[first : last + 2],
            fill=not number,
            lw=1.8,
            color=style.colour,
            alpha=0.55 if not number else 1,
            label=label,
        )


def plane(population: Population) -> Figure | None:
    """Weights in their first two principal directions, each network's epochs joined."""
    if all(task.plane is None for task in population.tasks):
        return None
    page, axes = panels(len(population.tasks), 5.6, 4.2, room=0.4)
    for axis, task in zip(axes, population.tasks, strict=True):
        _title(axis, task.task)
        if task.plane is None:
            axis.set_visible(False)
            continue
        _trajectories(axis, task.plane)
        shade = _points(axis, task.plane)
        if shade is not None:
            bar = page.colorbar(shade, ax=axis, pad=0.02, aspect=30)
            bar.set_label("validation accuracy, %", fontsize=9)
            bar.ax.tick_params(labelsize=8)
            bar.outline.set_visible(False)
        first, second = task.plane.explained
        axis.set_xlabel(f"first direction, {first:.0f} % of the variance")
        axis.set_ylabel(f"second, {second:.0f} %")
    legend(page, axes, 3)
    return page


def _trajectories(axis: Any, shown: Plane) -> None:
    paths: dict[tuple[str, int], list[int]] = {}
    for i, row in enumerate(shown.rows):
        paths.setdefault((row.split, row.model), []).append(i)
    for (split, _), places in paths.items():
        axis.plot(
            *shown.points[places].T.numpy(),
            lw=0.6,
            alpha=0.5,
            zorder=1,
            color=_DARK if split == "held-out" else "#9AA0A6",
        )


def _points(axis: Any, shown: Plane) -> Any:
    """A mark for each checkpoint, shaded by accuracy if all are known; returns the shades."""
    values = [row.val_accuracy for row in shown.rows]
    known = [value for value in values if value is not None]
    ends = {(row.split, row.model): row.epoch for row in sorted(shown.rows, key=lambda r: r.epoch)}
    shades, limits = None, (min(known, default=0), max(known, default=1))
    for split in SPLITS:
        places = [i for i, row in enumerate(shown.rows) if row.split == split]
        if not places:
            continue
        x, y = shown.points[places].T.numpy()
        marked = [shown.rows[i] for i in places]
        sizes = [26 if row.epoch == ends[split, row.model] else 7 for row in marked]
        about: dict[str, Any] = {"color": _style_of(split).colour}
        if len(known) == len(values):
            about = {
                "c": [values[i] for i in places],
                "cmap": "viridis_r",
                "vmin": limits[0],
                "vmax": limits[1],
            }
        ring = {"edgecolors": "black", "linewidths": 0.7} if split == "held-out" else {"lw": 0}
        drawn = axis.scatter(
            x, y, s=sizes, zorder=3, **about, marker=_style_of(split).mark, label=split, **ring
        )
        shades = drawn if "c" in about else None
    return shades


def weights(task: TaskPopulation) -> Figure | None:
    """A small histogram per tensor; of many tensors the first ones."""
    shown = task.histograms[:_TENSORS]
    if not shown:
        return None
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    page, axes = figure(rows, columns, 2.25 * columns, 1.7 * rows)
    for axis, tensor in zip(axes, shown, strict=False):
        edges = np.linspace(*tensor.edges, len(tensor.counts) + 1)
        axis.stairs(
            tensor.counts.numpy(), edges, fill=True, color=style_of("zoo").colour, alpha=0.7
        )
        axis.set_title(tensor.name, fontsize=9, loc="left", pad=16)
        axis.text(
            0,
            1.03,
            f"{tensor.mean:.2g} ± {tensor.std:.2g}",
            transform=axis.transAxes,
            fontsize=8,
            color="#555555",
        )
        axis.spines["left"].set_visible(False)
        axis.set_yticks([])
        axis.locator_params(axis="x", nbins=4)
        axis.tick_params(labelsize=8)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    return page


def dead(population: Population) -> Figure | None:
    """A bar per hidden layer: the percent of its units that are dead; None without dead units."""
    shown = [task for task in population.tasks if task.dead]
    highest = max((layer.dead for task in shown for layer in task.dead or ()), default=0.0)
    if not highest:
        return None
    most = max(len(task.dead or ()) for task in shown)
    page, axes = panels(len(shown), 5.4, 0.3 * most + 1.1)
    for axis, task in zip(axes, shown, strict=True):
        layers = (task.dead or ())[::-1]
        shares = torch.tensor([layer.dead for layer in layers]).numpy()
        axis.barh(range(len(layers)), shares, height=0.6, color=style_of("zoo").colour, alpha=0.8)
        for place, layer in enumerate(layers):
            axis.text(layer.dead, place, f" {layer.dead:.1f}", va="center", fontsize=9)
        axis.set_yticks(range(len(layers)), [f"{x.name} ({x.units} units)" for x in layers])
        axis.set_xlim(0, max(1.0, 1.15 * highest))
        axis.set_xlabel("dead units, %")
        _title(axis, task.task)
    return page


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, fontsize=11, loc="left")
