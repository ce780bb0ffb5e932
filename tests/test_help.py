"""Every command's help teaches: a description, an example that parses, a text for each option."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from flown import cli
from tests.test_cli import call

ROOT: Any = typer.main.get_command(cli.app)
IN_ORDER = """
    demo fit generate evaluate export bench finetune adapt fewshot reproduce data zoo
""".split()


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


EVERYTHING = dict(walk(ROOT))
COMMANDS = {path: x for path, x in EVERYTHING.items() if not hasattr(x, "commands")}


def named(path: tuple[str, ...]) -> str:
    return " ".join(("flown", *path))


def test_all_commands_are_found() -> None:
    assert list(ROOT.commands) == IN_ORDER
    assert len(COMMANDS) == 10 + 2 + 6


@pytest.mark.parametrize("path", EVERYTHING, ids=named)
def test_help_is_printed(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert call(monkeypatch, *path, "--help") == 0
    said = capsys.readouterr().out
    assert "Usage" in said and "…" not in said, "nothing is cut off"
    assert path not in COMMANDS or "Example: " in said


@pytest.mark.parametrize("path", EVERYTHING, ids=named)
def test_it_says_what_it_does(path: tuple[str, ...]) -> None:
    first = EVERYTHING[path].help.strip().partition("\n\n")[0]
    assert first[0].isupper() and first.endswith(".") and len(first) > 20


@pytest.mark.parametrize("path", COMMANDS, ids=named)
def test_each_option_has_a_text(path: tuple[str, ...]) -> None:
    for option in COMMANDS[path].params:
        text = option.help or ""
        assert text.endswith("."), f"{named(path)}: {option.name} has no sentence: '{text}'"
        assert option.name == "out" or len(text) > 10, f"{named(path)}: {option.name}: '{text}'"


@pytest.mark.parametrize("path", COMMANDS, ids=named)
def test_the_example_parses(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    line = command.epilog.removeprefix("Example: ").removeprefix("FLOWN_DATA=data ")
    assert line.startswith(named(path)), line
    given = shlex.split(line)[1 + len(path) :]
    context = command.make_context(named(path), given)  # refuses unknown and missing options
    assert context.args == []
