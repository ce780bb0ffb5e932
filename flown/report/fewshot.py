"""A labelled folder as a page: every image, its class and the confidence."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from flown.base.terminal import Table
from flown.heads.labelling import UNKNOWN, Labelled
from flown.report.page import thumbnail, write_page

_MOST = 500  # images that a page shows


class _Shown(NamedTuple):
    """An image and its prediction; without a share there is none."""

    picture: str  # a thumbnail: hundreds of images need not fit into memory
    file: Path
    first: str = ""  # class
    share: float | None = None  # confidence
    second: tuple[str, float] | None = None  # class and confidence
    true: str = ""  # class
    verdict: str = ""  # right, wrong, or nothing where the class is not known


def write_labelled(path: Path | str, found: Labelled) -> None:
    """Writes the page.

    Raises:
        FlownError: the file cannot be written.
    """
    support = len(found.support)
    write_page(
        path,
        "labelled.html",
        f"{len(found.classes)} classes from {support} image{'s' * (support != 1)}",
        found=found,
        figures=_figures(found),
        queries=_queries(found),
        support=_support(found),
        known=found.queries is not None and bool((found.queries.labels >= 0).any()),
        most=_MOST,
    )


def _figures(found: Labelled) -> Table:
    body = [
        [name, str(count), f"{accuracy:.1f}", f"{error:.1f}"]
        for name, count, accuracy, error in found.figures()
    ]
    return ["images", "n", "accuracy, %", "expected calibration error, %"], body


def _queries(found: Labelled) -> list[tuple[str, list[_Shown]]] | None:
    """The images of each predicted class, the highest confidence first."""
    if found.queries is None or found.probabilities is None:
        return None
    confidence, chosen = found.probabilities.max(dim=1)
    rows = confidence.argsort(descending=True, stable=True)[:_MOST].tolist()
    strange = [i for i in rows if found.is_unknown(i)]
    named = [
        (name, [_query(found, i) for i in rows if chosen[i] == label and i not in strange])
        for label, name in enumerate(found.classes)
    ]
    return [*named, *([(UNKNOWN, [_query(found, i) for i in strange])] if strange else [])]


def _query(found: Labelled, i: int) -> _Shown:
    assert found.queries is not None and found.probabilities is not None
    p, true = found.probabilities[i], int(found.queries.labels[i])
    best, second = p.topk(2).indices.tolist()
    return _Shown(
        thumbnail(found.queries.image(i)),
        found.queries.files[i],
        found.classes[best],
        float(p[best]),
        (found.classes[second], float(p[second])),
        "" if true < 0 else found.classes[true],
        "" if true < 0 else ("right" if true == best else "wrong"),
    )


def _support(found: Labelled) -> list[tuple[str, list[_Shown]]]:
    """The labelled images of each class, with predictions for those that were left out in turn."""
    left_out = {}
    if found.left_out is not None:
        left_out = {row: found.left_out[i] for i, row in enumerate(found.rows.tolist())}
    classes = []
    for label, name in enumerate(found.classes):
        shown = []
        for row in (found.support.labels == label).nonzero().flatten().tolist()[:_MOST]:
            picture, file = thumbnail(found.support.images[row]), found.support.files[row]
            if row not in left_out:
                shown.append(_Shown(picture, file))
                continue
            p = left_out[row]
            best = int(p.argmax())
            verdict = "right" if best == label else "wrong"
            shown.append(
                _Shown(picture, file, found.classes[best], float(p[best]), verdict=verdict)
            )
        classes.append((name, shown))
    return classes
