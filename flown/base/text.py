"""Text from outside (class names, file names, task ids), made fit to be shown."""

from __future__ import annotations

import re
import unicodedata

# What is not a sign but an order to the terminal or browser: C0 and C1 (ESC starts colours, titles,
# links), marks that turn the direction of writing, line separators, and the surrogates that stand for
# bytes of a file name that are no text.
_ORDERS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: str, keep: str = "") -> str:
    r"""The text with control characters written out, ESC as `\x1b`.

    >>> plain("a\x1b[31mb")
    'a\\x1b[31mb'

    Args:
        keep: control characters that stay, such as the line breaks of a message.
    """
    return _ORDERS.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def name_of(file: str) -> str:
    r"""The name that a file's name says: composed Unicode; bytes that are no text written out.

    >>> name_of("caf\udce9")
    'caf\\xe9'
    """
    text = file.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")
