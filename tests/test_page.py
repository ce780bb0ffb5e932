"""Pages come from templates that extend one shell; what is put into them is escaped."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from flown.report.page import write_page
from flown.report.style import panels
from tests.test_report import Page

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "flown" / "report"
TEMPLATES = sorted(REPORT.glob("templates/*.html"))
NAME = '<b onload="x">&"quoted"'


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_there_is_one_shell() -> None:
    assert [path.name for path in TEMPLATES if "<html" in text(path)] == ["base.html"]
    pages = [path for path in TEMPLATES if path.name not in ("base.html", "parts.html")]
    assert pages and all(text(page).startswith('{% extends "base.html" %}') for page in pages)
    code = [path for path in ROOT.glob("flown/**/*.py") if re.search(r"</?\w+[^<]*>\"", text(path))]
    assert code == [], "HTML belongs into templates"
    assert "| safe" not in "".join(map(text, TEMPLATES))


def test_templates_are_package_data() -> None:
    listed = re.search(r"package-data\]\nflown = (\[.*\])$", text(ROOT / "pyproject.toml"), re.M)
    assert listed is not None
    patterns = json.loads(listed[1])
    for template in TEMPLATES:
        name = template.relative_to(ROOT / "flown").as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns)


def novelty(path: Path, name: str) -> Page:
    figure, _ = panels(1, 3, 2)
    content = ["networks", name], [["generated", name], [name, "1"]]
    tables = [(name, content)]
    about = {"command": name}
    write_page(
        path, "novelty.html", name, distance=figure, errors=figure, tables=tables, about=about
    )
    return Page(text(path))


def test_values_are_escaped(tmp_path: Path) -> None:
    page = novelty(tmp_path / "page.html", NAME)
    assert not page.open and "b" not in page.tags
    assert "<b onload" not in text(tmp_path / "page.html")
    assert NAME in page.headings


def test_pages_suit_phones_and_dark_rooms(tmp_path: Path) -> None:
    page = novelty(tmp_path / "page.html", "digits")
    content = text(tmp_path / "page.html")
    assert 'name="viewport" content="width=device-width' in content
    assert "prefers-color-scheme: dark" in content and "color-scheme: light dark" in content
    colours = re.findall(r"#[0-9a-fA-F]{3,6}\b", content.partition("}\nbody")[2])
    assert colours == [], "colours are variables, so that each has a dark value"
    assert content.count("<img") == len(re.findall(r'<img alt="[^"]+"', content)) == len(page.loads)


def test_a_template_without_its_value_is_refused(tmp_path: Path) -> None:
    from jinja2 import UndefinedError

    with pytest.raises(UndefinedError, match="distance"):
        write_page(tmp_path / "page.html", "novelty.html", "title")
    assert list(tmp_path.iterdir()) == []


def test_thumbnails_are_pictures() -> None:
    from flown.report.page import thumbnail

    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    assert thumbnail(image).startswith("data:image/jpeg;base64,")
