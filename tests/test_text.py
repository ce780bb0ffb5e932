"""Names from outside reach neither terminal nor page with control characters in them."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from flown.base import progress
from flown.base.terminal import print_facts, print_table, say
from flown.base.text import plain
from flown.generator import files
from flown.report.page import write_page
from flown.report.style import encode, legend, panels
from flown.tasks import TaskTable
from tests.test_cli import call

ESC = "\x1b]0;gone\x07\x1b[31mcat"  # a terminal's title, then red
NAMES = [
    ESC,
    "left\u202eright",
    "c1 \x9b31m",
    "byte \udcff",
    "line\u2028break",
    "草 ☃ नमस्ते",
    "[red]dog",
]


def harmless(text: str) -> bool:
    return not any(sign in text for sign in "\x1b\x07\x9b\u202e\u2028\udcff")


@given(st.text())
def test_plain_text_stays_and_orders_are_written_out(text: str) -> None:
    shown = plain(text)
    assert harmless(shown) and plain(shown) == shown
    assert not any(ord(sign) < 32 or 127 <= ord(sign) < 160 for sign in shown)
    assert shown.encode("utf-8").decode("utf-8") == shown
    if text.isprintable():
        assert shown == text


def test_escapes_say_what_was_there() -> None:
    assert plain("草\x1b[1m\udcff\n") == r"草\x1b[1m\udcff\n"
    assert plain("a\nb\tc\x00", keep="\n\t") == "a\nb\tc\\x00"


@pytest.mark.parametrize("name", NAMES)
def test_the_terminal(name: str) -> None:
    console = Console(file=io.StringIO(), width=100)
    say(console, name)
    print_table(console, name, ([name, "b"], [[name, name]]))
    print_table(console, "", ([name, "b"], [["a", name]]), prose=True)
    print_facts(console, [(name, name)])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert harmless(text) and text.count(plain(name)) == 9, "and nothing is read as markup"


def test_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar(ESC, 1) as update:
        update(1, ESC)
    assert capsys.readouterr().err == f"{plain(ESC)}: 1/1 {plain(ESC)}\n"
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal
    with progress.bar(ESC, 1) as update:
        update(1, ESC)
    said = capsys.readouterr().err
    assert plain("\x1b]0;gone\x07") in said and "\x1b]0" not in said


@pytest.mark.parametrize("name", NAMES)
def test_pages(name: str, tmp_path: Path) -> None:
    figure, _ = panels(1, 3, 2)
    path = tmp_path / "page.html"
    content = ([name, "b"], [[name, name]])
    record = {"name": name}
    write_page(
        path,
        "novelty.html",
        name,
        distance=figure,
        errors=figure,
        tables=[(name, content)],
        about=record,
    )
    assert harmless(text := path.read_text(encoding="utf-8")) and plain(name) in text


def test_the_card_of_a_model(tmp_path: Path) -> None:
    parts = {part: {"x": torch.ones(1)} for part in ("encoder", "flow", "context")}
    files.write(tmp_path, parts, {}, TaskTable({}), f"# {ESC}\n")
    assert (tmp_path / "README.md").read_text("utf-8") == f"# {plain(ESC)}\n"


@pytest.mark.parametrize("name", [*NAMES, "$x_{", r"$\frac$", "line\nbreak"])
def test_figures(name: str) -> None:
    """Neither a font without the glyph nor a formula that is none ends in a warning or an error."""
    page, axes = panels(1, 3, 2)
    axes[0].plot([0, 1], [0, 1], label=name)
    axes[0].set_title(name)
    axes[0].set_xticks([0, 1], [name, "b"])
    legend(page, axes, 1)
    assert encode(page).startswith("data:image/png;base64,")
    assert axes[0].get_title() == plain(name, keep="\n")
    assert harmless("".join(label.get_text() for label in axes[0].get_xticklabels()))


def test_powers_of_ten_stay_formulas() -> None:
    page, axes = panels(1, 3, 2)
    axes[0].plot([1, 1000], [0, 1])
    axes[0].set_xscale("log")
    encode(page)
    label = next(x for x in axes[0].get_xticklabels() if x.get_text().startswith("$"))
    assert label.get_parse_math()


def test_class_names_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in (ESC.replace("/", ""), os.fsdecode(b"byte \xff")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    assert call(monkeypatch, "data", "show", tmp_path / "photos") == 0
    assert call(monkeypatch, "data", "show", f"{tmp_path}/{ESC}") == 2
    assert call(monkeypatch, "--debug", "data", "show", f"{tmp_path}/{ESC}") == 2
    written = capfd.readouterr()
    assert harmless(written.out) and plain(ESC) in written.out
    assert harmless(written.err) and plain(ESC) in written.err
    assert "Traceback" in written.err
    sys.stdout.flush()
