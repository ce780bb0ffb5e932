"""Names from outside, shown: a class or a file called ESC [2J must not clear the reader's terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich import console
from rich.segment import Segment
from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and ends of lines


def printable(text: str) -> str:
    r"""The text with a replacement character for every control character.

    >>> printable("cat\x1b[31m") == "cat\ufffd[31m"
    True
    """
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


class Console(console.Console):
    """A console that prints control characters of its own, for colours and bars, and no others."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Cleans before the width is measured; `render` catches what comes as anything but a string."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: console.RenderableType, options: console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control is None and _CONTROL.search(segment.text):
                yield Segment(printable(segment.text), segment.style)
            else:
                yield segment
