"""Outputs: nothing of the user's is removed, and one process at a time writes them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flown.base.errors import FlownError
from flown.base.files import write_json
from flown.base.output import OutputFile, OutputFolder
from flown.base.run import Run
from flown.experiments.begin import begin as experiment
from tests.test_cli import call
from tests.test_data_folder import picture, save


def test_output_is_not_overwritten_unasked(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("x")
    with pytest.raises(FlownError, match="--overwrite"):
        OutputFile(file, overwrite=False)
    OutputFile(file, overwrite=True)
    OutputFile(file, overwrite=False, resume=True)
    with pytest.raises(FlownError, match="f: a file; name a folder"):
        OutputFolder(file, overwrite=True)
    with pytest.raises(FlownError, match="a folder; name a file"):
        OutputFile(tmp_path, overwrite=True)
    assert file.read_text() == "x"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"architectures": ["BertModel"], "model_type": "bert"}'),
        ("config.json", '{"format": "pt"}'),
        ("config.json", '{"format": "flown-finetune-1"}'),
        ("results.json", '{"format": "flown-results-1"}'),
        ("run.json", '["flown-run-1"]'),
        ("progress.json", "not JSON"),
        ("cat.png", "x"),
    ],
)
def test_a_folder_that_is_not_ours_stays(
    tmp_path: Path, name: str, content: str, resume: bool
) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / name).write_text(content)
    (folder / "thesis.txt").write_text("three years")
    with pytest.raises(FlownError, match="did not write"):
        OutputFolder(folder, overwrite=True, resume=resume)
    assert (folder / name).read_text() == content
    assert (folder / "thesis.txt").read_text() == "three years"


def begin(folder: Path) -> None:
    """Marks a folder as this library's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "progress.json", {"format": "flown-run-1"})


def marked(folder: Path) -> bool:
    return (folder / "progress.json").exists()


def test_a_folder_of_ours_is_replaced_or_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run(out, {"seed": 3}, resume=False, overwrite=False).begin()
    with pytest.raises(FlownError, match="pass --overwrite"):
        OutputFolder(out, overwrite=False)
    (out / "part").mkdir()
    OutputFolder(out, overwrite=True, resume=True).begin()
    replaced = OutputFolder(out, overwrite=True)
    assert len(list(out.iterdir())) == 2, "all stays until work begins"
    replaced.begin()
    assert not list(out.iterdir())
    (out / ".run.json.x1.tmp").write_text("{")  # killed while it wrote its first file
    OutputFolder(out, overwrite=False).begin()
    assert not list(out.iterdir())


def test_no_place_of_the_users_is_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = tmp_path / "home", tmp_path / "work" / "here"
    for folder in (home, work, tmp_path, work.parent):
        begin(folder)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(home))
    for place, message in (
        (".", "is the working folder"),
        ("..", "holds the working folder"),
        (home, "is your home folder"),
        (tmp_path, "holds"),
        ("/", "holds the working folder"),
    ):
        with pytest.raises(FlownError, match=message):
            OutputFolder(place, overwrite=True)
    (tmp_path / "real").mkdir()
    begin(tmp_path / "real")
    (work / "link").symlink_to(tmp_path / "real")
    with pytest.raises(FlownError, match="link: a link"):
        OutputFolder("link", overwrite=True)
    assert marked(home) and marked(work) and marked(tmp_path / "real")


def test_what_is_read_is_not_removed(tmp_path: Path) -> None:
    begin(tmp_path / "run")
    (tmp_path / "run" / "zoo").mkdir()
    for source in (tmp_path / "run", tmp_path / "run" / "zoo"):
        with pytest.raises(FlownError, match="which is read"):
            OutputFolder(tmp_path / "run", overwrite=True, sources=[source])
    assert (tmp_path / "run" / "zoo").exists()


WRITER = """
import sys, time
from pathlib import Path
from flown.base.output import OutputFile
from flown.base.run import Run
path = Path(sys.argv[1])
if path.suffix:
    mine = OutputFile(path, overwrite=True)
else:
    mine = Run(path, {"seed": 3}, resume=True, overwrite=False)
    mine.begin()
print("begun", flush=True)
time.sleep(600)
"""


@contextmanager
def another_writer(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has begun to write there."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        try:
            yield process
        finally:
            process.kill()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    before = Run(out, {"seed": 3}, resume=False, overwrite=False)  # looked before the other began
    with another_writer(out):
        with pytest.raises(FlownError, match="run: another process writes there; wait for its end"):
            before.begin()
        for options in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
            with pytest.raises(FlownError, match="another process"):
                Run(out, {"seed": 3}, **options).begin()
        assert (out / "run.json").exists()
    with pytest.raises(FlownError, match="exists already"):
        before.begin()  # the other was killed, and its claim went with it
    Run(out, {"seed": 3}, resume=True, overwrite=False).begin()


def test_two_processes_do_not_share_a_file(tmp_path: Path) -> None:
    file = tmp_path / "nets.safetensors"
    with another_writer(file):
        with pytest.raises(FlownError, match=r"nets.safetensors: another process writes there"):
            OutputFile(file, overwrite=True)
        OutputFile(tmp_path / "others.safetensors", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == [".nets.safetensors.lock"]  # it was killed
    claims = [OutputFile(file, overwrite=False), OutputFile(tmp_path / "a" / "b" / "c", False)]
    assert (tmp_path / "a" / "b").is_dir()
    claims.clear()
    assert not list(tmp_path.iterdir())


def test_a_process_may_claim_again_what_it_has(tmp_path: Path) -> None:
    first = Run(tmp_path / "run", {}, resume=False, overwrite=False)
    first.begin()
    Run(tmp_path / "run", {}, resume=True, overwrite=False).begin()
    files = [OutputFile(tmp_path / "a", overwrite=False) for _ in range(2)]
    assert len(files) == 2


def test_an_experiment_keeps_its_folder_while_it_runs(tmp_path: Path) -> None:
    running = experiment(tmp_path / "out", "table1", "smoke", 0, False, False)
    script = "import sys; from flown.cli import main; main()"
    arguments = ["reproduce", "table1", "--scale", "smoke", "--out", str(running.path), "--resume"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "another process writes there" in done.stderr


def test_the_mark_of_a_folder_is_removed_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    Run(out, {}, resume=False, overwrite=False).begin()
    (out / "sub").mkdir()

    def refuse(path: object) -> None:
        raise PermissionError(1, os.strerror(1), str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(FlownError, match="sub: cannot be removed"):
        Run(out, {}, resume=False, overwrite=True).begin()
    monkeypatch.undo()
    Run(out, {}, resume=False, overwrite=True).begin()
    assert [path.name for path in out.iterdir()] == ["run.json"]


@pytest.mark.parametrize("command", ["export", "zoo import", "play"])
def test_what_is_to_be_replaced_stays_if_nothing_can_replace_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path / "old")
    (tmp_path / "source" / "sub").mkdir(parents=True)
    (tmp_path / "source" / "a.pt").write_text("no checkpoint")
    more = ["--net", "cnn-small", "--data", "digits"] if "import" in command else []
    options = [*more, "--out", tmp_path / "old", "--overwrite"]
    assert call(monkeypatch, *command.split(), tmp_path / "source", *options) == 2
    assert marked(tmp_path / "old")


def test_an_output_within_the_images_is_no_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        for i in range(2):
            save(tmp_path / name / f"{i}.png", picture(8, 8, 3))
    for _ in range(2):
        arguments = ["fewshot", tmp_path, "--out", tmp_path / "labelled", "--overwrite"]
        assert call(monkeypatch, *arguments, "--head", "centroid") == 0
