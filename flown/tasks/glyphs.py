"""Characters rendered from the fonts that matplotlib ships: classes without end, without a download.

Left out, so that nothing measured on them is a matter of training: digits of every script, Latin
letters, the scripts of Omniglot's evaluation and validation alphabets, accented letters, patterns
without a shape of their own (braille, dominoes), and whatever looks like a digit or a Latin letter,
turned by any quarter.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flown.base.files import replacing
from flown.tasks import npz
from flown.tasks.splits import ManyClass

SIDE = 32
_INK = 24  # pixels of the longer side of a glyph
_PIXELS = 48  # of the font, before it is fitted
_VERSION = 1  # raised when the same fonts give other images
_ALIKE = 0.88  # correlation from which two glyphs look alike
_KNOWN = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_LEFT_OUT = (
    *("LATIN CAPITAL LETTER", "LATIN SMALL LETTER", "CYRILLIC", "COPTIC", "GLAGOLITIC"),
    *("HIRAGANA", "KATAKANA", "HANGUL", "ETHIOPIC", "GURMUKHI", "KANNADA", "MALAYALAM", "MEETEI"),
    *("MONGOLIAN", "ORIYA", "SYLOTI", "SYRIAC", "TIBETAN", "AVESTAN"),
    *("BRAILLE", "DOMINO", "PLAYING", "TETRAGRAM", "HEXAGRAM", "BOX DRAWINGS", "MODIFIER LETTER"),
)


def load_glyphs(folder: Path) -> ManyClass:
    """The pool, rendered once and kept in `folder`: images (N, 1, 32, 32), ink bright.

    A class is a character, with one image for each font that has it; all classes are of the part
    `train`.
    """
    import matplotlib

    path = folder / f"glyphs-{_VERSION}-{matplotlib.__version__}.npz"
    if not path.exists():
        images, labels, names = _render()
        with replacing(path) as scratch, scratch.open("wb") as file:
            np.savez_compressed(
                file,
                images=images[:, 0].numpy(),
                labels=labels.numpy(),
                class_names=np.array(names),
                class_split=np.array(["train"] * len(names)),
            )
    pool = npz.read_many(path)
    return ManyClass("glyphs", pool.classes, pool.images, pool.labels, pool.class_split)


def _render() -> tuple[Tensor, Tensor, list[str]]:
    fonts = [_font(path) for path in _font_files()]
    known = torch.cat([_glyph(font, character) for font in fonts for character in _KNOWN])
    known = _compared(known)
    images: list[Tensor] = []
    labels: list[int] = []
    names: list[str] = []
    coded = [set(font.get_charmap()) for font in fonts]
    for character in _characters(set().union(*coded)):
        having = [f for f, codes in zip(fonts, coded, strict=True) if ord(character) in codes]
        glyphs = torch.cat([_glyph(font, character) for font in having])
        if not len(glyphs) or _like(glyphs, known):
            continue
        images.append(glyphs)
        labels += [len(names)] * len(glyphs)
        names.append(unicodedata.name(character).lower())
    return torch.cat(images), torch.tensor(labels), names


def _font_files() -> list[Path]:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = sorted([*folder.glob("DejaVuS*.ttf"), *folder.glob("STIXGeneral*.ttf")])
    return [path for path in files if "Display" not in path.name]


def _font(path: Path):  # type: ignore[no-untyped-def]
    from matplotlib.ft2font import FT2Font

    font = FT2Font(str(path))
    font.set_size(_PIXELS, 72)
    return font


def _characters(codes: set[int]) -> Iterator[str]:
    for character in map(chr, sorted(codes)):
        name = unicodedata.name(character, "")
        plain = unicodedata.normalize("NFKD", character) == character or "ARABIC" in name
        kind = unicodedata.category(character)
        if name and plain and kind in ("Lu", "Ll", "Lo", "Sm", "So") and "DIGIT" not in name:
            if not name.startswith(_LEFT_OUT):
                yield character


def _glyph(font, character: str) -> Tensor:  # type: ignore[no-untyped-def]
    """A character fitted into the middle of an image, uint8 (1, 1, 32, 32); none if it has no ink."""
    font.clear()
    font.set_text(character, 0.0)
    font.draw_glyphs_to_bitmap(antialiased=True)
    pixels = torch.from_numpy(np.array(font.get_image(), dtype=np.float32))
    ink = pixels > 0
    if ink.sum() < 4:
        return torch.empty(0, 1, SIDE, SIDE, dtype=torch.uint8)
    rows, columns = ink.any(1).nonzero().flatten(), ink.any(0).nonzero().flatten()
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = _INK / max(pixels.shape)
    height, width = (max(1, round(side * scale)) for side in pixels.shape)
    fitted = F.interpolate(
        pixels[None, None], (height, width), mode="bilinear", antialias=True, align_corners=False
    )
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    framed = F.pad(fitted, (left, SIDE - width - left, top, SIDE - height - top))
    return framed.round().clamp(0, 255).to(torch.uint8)


def _compared(glyphs: Tensor) -> Tensor:
    """Unit vectors (n, 256) whose products are correlations of coarse images."""
    coarse = F.avg_pool2d(F.avg_pool2d(glyphs.float(), 3, 1, 1), 2).flatten(1)
    return F.normalize(coarse - coarse.mean(dim=1, keepdim=True), dim=1)


def _like(glyphs: Tensor, known: Tensor) -> bool:
    """Whether glyphs (n, 1, 32, 32) look like one of `known` (m, 256), turned by any quarter."""
    turned = torch.cat([glyphs.rot90(turns, (2, 3)) for turns in range(4)])
    return bool((_compared(turned) @ known.T).max() > _ALIKE)
