"""The house holds: imports point down, files and functions are small, importing does nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import flown

ROOT = Path(__file__).parents[1]
FILES = {path: ast.parse(path.read_text("utf-8")) for path in sorted(ROOT.glob("flown/**/*.py"))}

ROOMS = """
    version base tasks nets weights training zoo encoders context flow measure anytask generator
    heads report experiments bench play cli __init__ __main__
""".split()
APART = {"encoders", "context", "flow"}  # they meet in `generator` and know nothing of each other
HEAVY = {
    "diffusers",
    "matplotlib",
    "mlxtend",
    "numba",
    "sklearn",
    "timm",
    "torchvision",
}


def room(path: Path) -> str:
    return path.relative_to(ROOT / "flown").parts[0].removesuffix(".py")


def imported(node: ast.AST) -> Iterator[str]:
    """The rooms a statement imports from, wherever it stands: in a function, for types only."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = "flown" if node.level else str(node.module)  # relative: refused
        names = [f"flown.{a.name}" for a in node.names] if base == "flown" else [base]
    for head, *rest in (name.split(".") for name in names):
        if head == "flown":
            yield rest[0] if rest and rest[0] in ROOMS else "__init__"


def test_a_file_imports_only_from_rooms_below() -> None:
    wrong = []
    for path, tree in FILES.items():
        here = room(path)
        if here not in ROOMS:
            wrong.append(f"{path.relative_to(ROOT)}:1: give '{here}' its place in ROOMS")
            continue
        for node in ast.walk(tree):
            for there in imported(node):
                up = ROOMS.index(there) > ROOMS.index(here)
                if up or (here != there and {here, there} <= APART):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {here} imports {there}")
    assert not wrong, "\n".join(wrong)


def statements(tree: ast.AST) -> int:
    return sum(isinstance(node, ast.stmt) for node in ast.walk(tree))


def test_files_and_functions_stay_small() -> None:
    """Statements are counted, not lines: a limit on lines is met by writing them longer."""
    wrong = []
    for path, tree in FILES.items():
        where = path.relative_to(ROOT)
        if (count := statements(tree)) > 250:
            wrong.append(f"{where}: {count} statements, 250 are allowed")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if (count := statements(node) - 1) > 45:
                    wrong.append(
                        f"{where}:{node.lineno}: {node.name} has {count} statements, not 45"
                    )
    assert not wrong, "\n".join(wrong)


def test_the_public_names_are_few_and_listed() -> None:
    assert len(set(flown.__all__)) == len(flown.__all__) <= 14
    assert [name for name in flown.__all__ if not hasattr(flown, name)] == []
    ours = {
        name
        for name, value in vars(flown).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("flown")
    }
    assert ours <= set(flown.__all__)


def test_importing_has_no_effects(tmp_path: Path) -> None:
    places = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "FLOWN_CACHE"), str(tmp_path))
    code = f"import sys, flown; print(*sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
        env=os.environ | places | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], "importing flown imports these"
    assert list(tmp_path.rglob("*")) == [], "importing flown writes files"
