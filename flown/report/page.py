"""Pages: a jinja2 template each, one self-contained file; nothing is fetched, nothing runs.

Templates are in `templates/`. Each extends `base.html`, the one shell; `parts.html` has tables and
figures. Everything that is put into a template is escaped, and has no
control characters.
"""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flown.base.files import write_text
from flown.base.terminal import Table
from flown.base.text import plain
from flown.report.style import encode, style_of

if TYPE_CHECKING:
    from torch import Tensor

_SIDE = 112  # pixels of a thumbnail


class Section(NamedTuple):
    """The table of an experiment, with a heading and a note."""

    title: str
    note: str
    table: Table


def write_page(path: Path | str, template: str, title: str, **values: Any) -> None:
    """Writes a page, whole.

    Args:
        values: what the template names; `about` is the provenance at its end.

    Raises:
        FlownError: the file cannot be written.
    """
    write_text(path, _environment().get_template(template).render(title=title, **values))


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finalize,
    )
    environment.globals["generated"] = style_of("flown").label  # rows that tables set off
    environment.filters |= {"png": encode, "record": _record}
    return environment


def _finalize(value: Any) -> Any:
    """Cleans a value before it is escaped; what a macro returns is escaped already."""
    if isinstance(value, Markup) or not isinstance(value, str | PurePath):
        return value
    return plain(str(value), keep="\n\t")


def _record(about: Mapping[str, Any]) -> str:
    return json.dumps(about, indent=1, ensure_ascii=False)


def thumbnail(image: Tensor) -> str:
    """A uint8 image (1 or 3, H, W) as a JPEG, a data URI; small ones are enlarged by whole pixels."""
    from PIL import Image

    pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels)
    longest = max(picture.size)
    scale = _SIDE / longest if longest > _SIDE else max(1, _SIDE // longest)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    buffer = io.BytesIO()
    picture.resize(size, method).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
