"""Means over tasks with their 95 % intervals; methods on the same tasks are compared in pairs.

    mean(d) ± 1.96 std(d) / sqrt(T),   d_t = a_t - b_t

What makes a task hard for both methods drops out of their difference, so that this interval may be
narrow where those of the two means are wide.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flown.measure.reference import deviation


class Interval(NamedTuple):
    """A mean over `tasks` tasks, and half the width of its 95 % interval, None of a single task."""

    mean: float
    half: float | None
    tasks: int


def interval(values: Tensor) -> Interval:
    """Of values (T,), one a task; NaN stands for a task without a value and does not count."""
    values = values[~values.isnan()]
    std, tasks = deviation(values), len(values)
    return Interval(float(values.mean()), None if std is None else 1.96 * std / tasks**0.5, tasks)
