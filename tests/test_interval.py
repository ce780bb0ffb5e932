"""Means and paired differences with 95 % intervals, against their closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flown.measure.interval import interval


def test_a_paired_difference_in_closed_form() -> None:
    ours, theirs = np.array([70.0, 52.0, 91.0, 64.0]), np.array([66.0, 50.0, 83.0, 62.0])
    found = interval(torch.tensor(ours) - torch.tensor(theirs))
    d = ours - theirs  # 4, 2, 8, 2: mean 4, squared deviations 0 + 4 + 16 + 4
    assert found.mean == pytest.approx(d.mean()) == pytest.approx(4)
    half = 1.96 * d.std(ddof=1) / np.sqrt(len(d))
    assert found.half == pytest.approx(half) == pytest.approx(1.96 * np.sqrt(8) / 2)
    alone = interval(torch.tensor(ours)).half
    assert alone is not None and found.half < alone / 2, "what tasks have in common drops out"


def test_it_holds_the_mean_as_often_as_it_says() -> None:
    draws = 5 + 3 * torch.randn(2000, 100, generator=torch.Generator().manual_seed(0))
    found = [interval(row) for row in draws]
    inside = sum(abs(x.mean - 5) <= x.half for x in found if x.half is not None)
    assert 0.93 < inside / len(found) < 0.965


def test_tasks_without_a_value_do_not_count() -> None:
    found = interval(torch.tensor([torch.nan, 2.0, 4.0]))
    assert found.tasks == 2 and found.mean == 3
    assert interval(torch.tensor([7.0])) == (7.0, None, 1)
