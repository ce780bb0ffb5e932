"""The study of unknown classes in small: figures, resumption, page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flown.experiments.unknown import METHODS, UnknownStudy, _judged, run
from flown.experiments.unseen import Unseen

TINY = UnknownStudy(
    samples=2, rate=0.1, rows=(Unseen(set="digits", ways=5, shots=5, tasks=4),), seed=0
)


def test_images_of_other_classes_are_found_by_the_written_networks(tmp_path: Path) -> None:
    rows = run(TINY, tmp_path, "smoke").rows
    assert [row["method"] for row in rows] == list(METHODS)
    written = rows[1]
    assert written["auroc"] > 85 and written["detected"] > 30 and written["false_alarms"] < 25
    assert "false alarms" in (tmp_path / "report.html").read_text("utf-8")
    before = (tmp_path / "results.json").stat().st_mtime_ns
    assert run(TINY, tmp_path, "smoke").rows == rows
    assert (tmp_path / "results.json").stat().st_mtime_ns > before


def test_figures_of_known_scores() -> None:
    scores = torch.tensor([1.0, 2, 3, 4, 3, 5])
    inside = torch.tensor([True, True, True, True, False, False])
    detected, alarms, area = _judged(scores, inside, 3.5)
    assert (detected, alarms) == (50, 25)
    assert area == pytest.approx(100 * (2.5 + 4) / 8)
