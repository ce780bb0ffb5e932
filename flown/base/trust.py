"""Which code may be run by its name: what the user named, never what a file names.

Networks, backbones and rewards of the user's own are written `package.module:function`. To import
such a name runs code, so a name is imported only after `allow`. Command lines and recipes allow the
names that the user gives there; headers of weights, zoos and models cannot.
"""

from __future__ import annotations

import importlib
from typing import Any

from flown.base.errors import FlownError

_allowed: set[str] = set()


def is_code(name: str) -> bool:
    """Whether a name is `package.module:function` rather than a registered one."""
    return ":" in name


def allow(name: str) -> str:
    """Lets `package.module:function` be imported and called in this process; returns the name.

    Registered names need no permission.
    """
    if is_code(name):
        _allowed.add(name)
    return name


def check(name: str, what: str) -> None:
    """Raises FlownError for code that nobody allowed; `what` says which file or part names it."""
    if is_code(name) and name not in _allowed:
        raise FlownError(
            f"{what} names code, '{name}', and a file's word is not enough to run it; if you trust "
            f"it, add --trust {name}, or call flown.trust({name!r}) in Python"
        )


def load_code(name: str, what: str) -> Any:
    """What `package.module:function` names. Importing it runs its module.

    Raises:
        FlownError: nobody allowed the name, or it cannot be imported or called.
    """
    check(name, what)
    module, _, attribute = name.partition(":")
    try:
        if not (module and attribute):
            raise ValueError("both parts are needed")
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise FlownError(
            f"{what} '{name}': cannot be imported as package.module:function ({error})"
        ) from None
    if not callable(found):
        raise FlownError(f"{what} '{name}': is {type(found).__name__}, expected a function")
    return found
