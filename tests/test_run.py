"""The folder of a run goes on as what it was begun as; global generators are lent and given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.base.files import read_json, write_json
from flown.base.run import Run, digest
from flown.base.seeding import seeded
from flown.version import __version__


class Settings(Config):
    steps: int = 3
    rate: float = 0.1


PLAN = {"config": Settings().model_dump(mode="json"), "data": "digits", "images": "0f"}


def begin(out: Path, *, resume: bool = False, overwrite: bool = False, **changes: object) -> Run:
    return Run(
        out,
        PLAN | changes,
        resume=resume,
        overwrite=overwrite,
        configs={"config": Settings},
        newer=("images",),
    )


def test_a_run_is_begun_once_and_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "run"
    begin(out).begin()
    assert read_json(out / "run.json") == {"format": "flown-run-1", "flown": __version__, **PLAN}
    with pytest.raises(FlownError, match="exists already"):
        begin(out)
    assert begin(out, resume=True).path == out
    with pytest.raises(FlownError, match="holds a run with another data; choose another --out"):
        begin(out, resume=True, data="mnist")
    with pytest.raises(FlownError, match="another config, images"):
        begin(out, resume=True, config=Settings(steps=4).model_dump(mode="json"), images="1f")
    replaced = begin(out, overwrite=True, data="mnist")
    assert read_json(replaced.file)["data"] == "digits", "all stays until work begins"
    replaced.begin()
    assert read_json(replaced.file)["data"] == "mnist"


def test_what_an_earlier_version_did_not_write_is_forgiven(tmp_path: Path) -> None:
    begin(tmp_path).begin()
    about = read_json(tmp_path / "run.json")
    about["flown"] = "0.0.1"
    del about["images"], about["config"]["rate"]
    write_json(tmp_path / "run.json", about)
    begin(tmp_path, resume=True)
    write_json(tmp_path / "run.json", {"format": "flown-run-1"})
    with pytest.raises(FlownError, match="another config, data"):
        begin(tmp_path, resume=True)


def test_a_digest_is_of_types_shapes_and_values() -> None:
    zeros = torch.zeros(4)
    others = zeros.view(2, 2), zeros.int(), torch.tensor([0.0, 0, 0, 1])
    assert digest(zeros) == digest(zeros.clone()) and len(digest(zeros)) == 16
    assert len({digest(x) for x in (zeros, *others)}) == 4


def test_seeded_lends_the_global_generator() -> None:
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(2)
        with seeded(4):
            torch.rand(1)
        second = torch.rand(2)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(torch.rand(2, generator=generator), first)
    assert torch.equal(torch.rand(2, generator=generator), second)
