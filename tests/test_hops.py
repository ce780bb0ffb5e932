"""How many files of the package a reader has to open to follow one call, counted by running it.

The limits are where the code is: a file more has to earn its place, and a file less lowers them.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import flown
from flown.generator.config import FlownConfig
from flown.training import TrainConfig
from tests import examples

PACKAGE = Path(flown.__file__).parent


def hops(call: Callable[[], Any]) -> list[str]:
    """The files of the package in whose functions code runs during a call, on any thread."""
    seen: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen.add((frame.f_code.co_filename, frame.f_code.co_name))

    before = sys.getprofile()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)
    files = {Path(file) for file, function in seen if function != "<module>"}
    return sorted(str(x.relative_to(PACKAGE)) for x in files if x.is_relative_to(PACKAGE))


def test_generate_is_followed_through_few_files(model: flown.Flown) -> None:
    train = examples.images("digits").train
    found = hops(lambda: model.generate(train.images, train.labels, n=2, steps=2))
    assert len(found) <= 18, "\n".join(found)


def test_fit_is_followed_through_few_files(
    run: Path, zoo: flown.Zoo, config: FlownConfig, tmp_path: Path
) -> None:
    """`run` has imported everything that a fit needs."""
    brief = TrainConfig(steps=3, batch_size=4)
    values = {"encoder_training": brief, "flow_training": brief}
    found = hops(
        lambda: flown.Flown.fit(zoo, config.model_copy(update=values), out=tmp_path / "run")
    )
    assert len(found) <= 56, "\n".join(found)
