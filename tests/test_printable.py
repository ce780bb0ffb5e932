"""Control characters of foreign names reach neither a terminal nor a page."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.table import Table
from rich.text import Text

from flown import cli
from flown.base.printable import Console, printable
from flown.base.progress import bar
from flown.generator import files
from flown.report import html
from flown.tasks import TaskTable

NASTY = "cat\x1b[2J\x9b31m\x07"
SHOWN = "cat�[2J�31m�"


def test_control_characters_are_replaced_and_nothing_else() -> None:
    assert printable(NASTY) == SHOWN
    assert printable("é 猫\tx\n") == "é 猫\tx\n"
    for code in (*range(32), *range(127, 160)):
        assert printable(chr(code)) == (chr(code) if chr(code) in "\t\n" else "�")


def test_a_console_keeps_its_own_colours_alone() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=60)
    table = Table("name", NASTY, title=NASTY)
    table.add_row(NASTY, Text(NASTY))
    console.print(table)
    console.print(NASTY, style="yellow")
    said = out.getvalue()
    assert "\x1b[33m" in said, "yellow"
    assert "\x1b[2J" not in said and "\x9b" not in said and "\x07" not in said
    assert said.count("cat�") == 5


def test_progress_in_a_log_and_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with bar(NASTY, 1) as update:
        update(1, NASTY)
    assert capsys.readouterr().err.startswith(f"{SHOWN}: 1/1 {SHOWN}")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with bar(NASTY, 1) as update:
        update(1, NASTY)
    said = capsys.readouterr().err
    assert "�[2J" in said and "\x1b[2J" not in said


def test_pages(tmp_path: Path) -> None:
    html.write_page(tmp_path / "page.html", NASTY, [f"<p>{NASTY}</p>"])
    assert "\x1b" not in (tmp_path / "page.html").read_text("utf-8")
    parts = {part: {"x": torch.ones(1)} for part in ("encoder", "flow", "context")}
    files.write(tmp_path, parts, {}, TaskTable({}), f"# {NASTY}")
    assert (tmp_path / "README.md").read_text("utf-8") == f"# {SHOWN}"


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / NASTY / name).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (8, 8), i).save(tmp_path / NASTY / name / f"{i}.png")
    for words in (["data", "show", str(tmp_path / NASTY)], ["data", "show", NASTY]):
        for debug in ([], ["--debug"]):
            monkeypatch.setattr(sys, "argv", ["flown", *words, *debug])
            with pytest.raises(SystemExit):
                cli.main()
            said = "".join(capsys.readouterr())
            assert SHOWN in said and "\x1b" not in said and "\x07" not in said
