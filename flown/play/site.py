"""The page's folder: static files that can be put anywhere, and a server for this machine."""

from __future__ import annotations

import http.server
import shutil
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from flown.anytask.model import AnyTask
from flown.base.errors import FlownError
from flown.base.files import read_json, replacing
from flown.play.graphs import GRAPHS, SIZES, WEIGHTS, digest, write_graphs

PAGE = Path(str(resources.files("flown") / "play" / "page"))
# What a folder is known by comes first and the page last: one that is not whole is not opened, and
# can be overwritten.
_BUILT = (SIZES, *(f"{name}.onnx" for name in GRAPHS))


def check_model(model: Path) -> None:
    """Raises FlownError if a model's folder holds no any-task generator."""
    if not AnyTask.is_in(model):
        raise FlownError(
            f"{model}: no any-task generator; the page draws tasks that none was fitted on"
        )


def write_site(model: Path, runtime: Path, folder: Path) -> None:
    """Writes the page for a model's folder; graphs that ship are taken where they are the model's.

    Raises:
        FlownError: as `check_model` and `write_graphs`.
    """
    check_model(model)
    if digest(model) == read_json(PAGE / SIZES)["weights"]:
        for name in _BUILT:
            _copy(PAGE / name, folder / name)
    else:
        write_graphs(model, folder)
    _copy(model / WEIGHTS, folder / WEIGHTS)
    for path in sorted(runtime.iterdir()):
        _copy(path, folder / "ort" / path.name)
    for path in sorted(PAGE.iterdir(), key=lambda path: path.suffix == ".html"):
        if path.is_file() and path.name not in _BUILT:
            _copy(path, folder / path.name)


def server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of that folder for this machine alone; port 0 is any that is free.

    Raises:
        OSError: the port is taken.
    """
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), partial(_Files, directory=folder))


class _Files(http.server.SimpleHTTPRequestHandler):
    # What the system says of these differs; a browser runs no script that is called a text.
    extensions_map = {  # noqa: RUF012  as the base class has it
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def _copy(source: Path, to: Path) -> None:
    with replacing(to) as scratch:
        shutil.copyfile(source, scratch)
