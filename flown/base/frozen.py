"""Frozen modules as files: all tensors in half precision, the config as JSON in the header.

Half precision halves the files; loading widens the tensors again, and a loaded module saves to the same
bits. Loading changes no random state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import TypeVar

from torch import nn

from flown.base.config import Config
from flown.base.errors import FlownError
from flown.base.files import halved, load_into, load_tensors, parse_json, save_tensors
from flown.base.seeding import seeded

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C", bound=Config)


def save_frozen(
    module: nn.Module,
    path: Path | str,
    key: str,
    config: Config,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file whole; `config` is in its header under `key`, with `about`."""
    header = {key: config.model_dump_json(), **(about or {})}
    save_tensors(path, halved(module.state_dict()), header)


def load_frozen(
    path: Path | str,
    key: str,
    what: str,
    config: type[C],
    build: Callable[[C, Mapping[str, str]], M],
) -> M:
    """Reads what `save_frozen` wrote, in eval mode and without gradients.

    Args:
        key: the config's key in the header; `what` names the kind of module in errors.
        build: makes the module from its config and the header; then its tensors are filled in.

    Raises:
        FlownError: no such file, another kind of file, or tensors that do not fit the config.
    """
    tensors, header = load_tensors(path)
    if key not in header:
        raise FlownError(f"{path}: no {what}, its header has no '{key}'")
    values = parse_json(header[key], f"{path}: no {what}, '{key}' of its header")
    with seeded(None):
        module = build(config.parse(values, f"{path}: {key}"), header)
    load_into(module, tensors, path)
    return module.eval().requires_grad_(False)


def load_shipped(package: str, name: str, load: Callable[[Path], M]) -> M:
    """What `load` makes of the file `pretrained/<name>.safetensors` inside a package."""
    file = resources.files(package) / "pretrained" / f"{name}.safetensors"
    with resources.as_file(file) as path:
        return load(path)
