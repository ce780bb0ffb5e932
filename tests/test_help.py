"""The command line's own words: what the documents tell people to type parses, and --help says it all."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from flown import cli
from tests.test_cli import call

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FLOWN: Any = typer.main.get_command(cli.app)
IN_ORDER = """
    demo fit generate evaluate export bench finetune adapt fewshot play reproduce data zoo
""".split()


def leaves(command: Any = FLOWN, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command with its whole name, groups of commands included."""
    yield " ".join(("flown", *path)), command
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(below, (*path, name))


def parse(words: list[str], command: Any = FLOWN, parent: Any = None) -> None:
    """Parses the words after a command's name, down to its last sub-command, and runs nothing.

    Three dots stand for what is left out: then only the commands' names are read.
    """
    if not hasattr(command, "commands"):
        if "..." not in words and "--help" not in words:
            command.make_context(command.name, list(words), parent=parent)
        return
    name, *rest = words
    if name not in ("--help", "..."):
        assert name in command.commands, f"no command '{name}'"
        parse(rest, command.commands[name], parent)


def written(text: str) -> Iterator[str]:
    """The command lines of a page in Markdown: lines of its blocks, and code in its sentences.

    A sentence may name a command without saying how it is called.
    """
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for block in blocks:
        for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines():
            yield re.split(r"\s{2,}", line.strip())[0]  # what follows says what it does
    sentences = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    names = {name for name, _ in leaves()}
    for code in re.findall(r"`([^`]+)`", sentences):
        line = " ".join(code.split())
        yield f"{line} ..." if line in names else line


def flowns(text: str) -> Iterator[list[str]]:
    """The words after `flown` of each command line; variables and `time` may stand before it."""
    for line in written(text):
        if found := re.match(r"(?:\w+=\S+ |time )*flown (.*)", line):
            yield shlex.split(found[1], comments=True)


def test_pages_are_read_as_people_read_them() -> None:
    block = "```\nA=b flown z --out c  why\nflown d \\\n -e # f\n```\n"
    page = f"`a` and `flown x\n-n 2`, `flown.y`, `flown fit`\n\n{block}"
    in_sentences = [["x", "-n", "2"], ["fit", "..."]]
    assert list(flowns(page)) == [["z", "--out", "c"], ["d", "-e"], *in_sentences]
    with pytest.raises(AssertionError, match="no command 'zo'"):
        parse(["zo", "train"])
    with pytest.raises(Exception, match="--modls"):
        parse(["zoo", "train", "x", "--out", "y", "--modls", "3"])
    with pytest.raises(Exception, match="out"):
        parse(["zoo", "train", "x"])


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_command_lines_of_documents_parse(page: Path) -> None:
    lines = list(flowns(page.read_text("utf-8")))
    assert lines or page.name != "README.md"
    for words in lines:
        try:
            parse(words)
        except Exception as error:
            said = error.format_message() if hasattr(error, "format_message") else error
            pytest.fail(f"{page.name}: flown {shlex.join(words)}: {said}")


def test_all_commands_are_found() -> None:
    assert list(FLOWN.commands) == IN_ORDER
    assert len([name for name, x in leaves() if not hasattr(x, "commands")]) == 11 + 2 + 6


@pytest.mark.parametrize(("name", "command"), list(leaves()), ids=[name for name, _ in leaves()])
def test_help_says_what_why_and_how(
    name: str, command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A description, an example that parses, and a sentence for every argument and option."""
    first = (command.help or "").strip().partition("\n\n")[0]
    assert first[:1].isupper() and first.endswith(".") and len(first) > 20, "no description"
    assert (command.epilog or "").startswith("Example: "), "no example"
    (words,) = flowns(f"`{command.epilog.removeprefix('Example: ')}`")
    assert " ".join(("flown", *words)).startswith(name), "an example of another command"
    parse(words)
    for option in command.params:
        text = option.help or ""
        assert text.endswith("."), f"{option.name} has no sentence: '{text}'"
        assert option.name == "out" or len(text) > 10, f"{option.name}: '{text}'"
    monkeypatch.setenv("COLUMNS", "100")
    assert call(monkeypatch, *name.split()[1:], "--help") == 0
    said = capsys.readouterr().out
    assert "Usage" in said and "Example: " in said and "…" not in said, "nothing is cut off"
