"""A labelled folder as one self-contained page: every image, its class, how sure that is."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from torch import Tensor

from flown.heads.labelling import Labelled
from flown.report import html

_SIDE = 112  # pixels of a thumbnail
_MOST = 500  # images that a page shows
_CSS = """
.grid { display: flex; flex-wrap: wrap; gap: .7rem; margin: .5rem 0 1.4rem; }
.card { width: 7.4rem; font-size: .78rem; line-height: 1.3; overflow-wrap: anywhere; color: #444; }
.card img { width: 7rem; height: 7rem; object-fit: contain; background: #f2f2f2; display: block;
            border: .2rem solid transparent; border-radius: .25rem; }
.card.right img { border-color: #009E73; } .card.wrong img { border-color: #D55E00; }
.bar { height: .3rem; background: #e6e6e6; margin: .25rem 0 .2rem; }
.bar div { height: 100%; background: #0072B2; }
.card b { color: #1a1a1a; font-variant-numeric: tabular-nums; }
ul.warnings { color: #8a4500; font-size: .9rem; }
"""


def write_labelled(path: Path | str, found: Labelled) -> None:
    """Writes the page.

    Raises:
        FlownError: the file cannot be written.
    """
    title = f"{len(found.classes)} classes from {_count(len(found.support))}"
    parts = [
        html.note(_lead(found)),
        _warnings(found),
        _figures(found),
        _queries(found),
        _support(found),
    ]
    html.write_page(path, title, parts, css=_CSS)


def _lead(found: Labelled) -> str:
    text = ""
    if found.queries is not None:
        text = f"{_count(len(found.queries))} labelled in {found.seconds:.1f} seconds. "
    text += f"Features: {found.backbone}. Head: {found.method}. "
    if found.left_out is None:
        return text + (
            f"Confidences have a temperature of {found.temperature:.2g}, which was right for other "
            "classes: with one image in a class there is none to fit it on."
        )
    return text + (
        f"Confidences have a temperature of {found.temperature:.2g}, fitted on the labelled images, "
        "each left out in turn."
    )


def _warnings(found: Labelled) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in found.warnings)
    return f'<h2>Warnings</h2><ul class="warnings">{lines}</ul>' if lines else ""


def _figures(found: Labelled) -> str:
    body = [
        [name, str(count), f"{accuracy:.1f}", f"{error:.1f}"]
        for name, count, accuracy, error in found.figures()
    ]
    if not body:
        return ""
    note = (
        "Percent of images whose class is known. Calibration error: how far confidences are from "
        "the share that is right, on average over ten bins of confidence; from few images it is "
        "a rough figure, and never near 0."
    )
    head = ["images", "n", "right, %", "expected calibration error, %"]
    return "<h2>How far to trust it</h2>" + html.note(note) + html.table_html(head, body)


def _queries(found: Labelled) -> str:
    """A section a class; the surest image first."""
    if found.queries is None or found.probabilities is None:
        return ""
    confidence, chosen = found.probabilities.max(dim=1)
    rows = confidence.argsort(descending=True, stable=True)[:_MOST].tolist()
    parts = [
        "<h2>Labelled images</h2>",
        html.note(
            "Under each image its confidence and, in brackets, the class that comes second."
            + (" Green: as its folder says. Orange: another class." if _known(found) else "")
            + (
                f" The {_MOST} surest of {len(found.queries)} are shown; all are in predictions.csv."
                if len(found.queries) > _MOST
                else ""
            )
        ),
    ]
    for label, name in enumerate(found.classes):
        cards = [_query(found, i) for i in rows if chosen[i] == label]
        parts.append(f"<h3>{escape(name)} ({_count(len(cards))})</h3>" + _grid(cards))
    return "\n".join(parts)


def _known(found: Labelled) -> bool:
    return found.queries is not None and bool((found.queries.labels >= 0).any())


def _query(found: Labelled, i: int) -> str:
    assert found.queries is not None and found.probabilities is not None
    p, true = found.probabilities[i], int(found.queries.labels[i])
    best, second = p.topk(2).indices.tolist()
    said = "" if true < 0 else ("right" if true == best else "wrong")
    is_ = "" if said != "wrong" else f"; is {escape(found.classes[true])}"
    text = (
        f"<b>{100 * float(p[best]):.0f} %</b> ({escape(found.classes[second])} "
        f"{100 * float(p[second]):.0f} %){is_}"
    )
    return _card(found.queries.images[i], found.queries.files[i], said, float(p[best]), text)


def _support(found: Labelled) -> str:
    """The labelled images; where they were left out, what was then said of them."""
    seen = (
        {row: found.left_out[i] for i, row in enumerate(found.rows.tolist())}
        if found.left_out is not None
        else {}
    )
    note = "What was learnt from."
    if seen:
        note += " Under each image what a head says of it that has not seen it."
    parts = ["<h2>Given</h2>", html.note(note)]
    for label, name in enumerate(found.classes):
        rows = (found.support.labels == label).nonzero().flatten().tolist()
        cards = []
        for row in rows[:_MOST]:
            image, file = found.support.images[row], found.support.files[row]
            if row not in seen:
                cards.append(_card(image, file, "", None, ""))
                continue
            best = int(seen[row].argmax())
            text = f"<b>{escape(found.classes[best])}</b> {100 * float(seen[row][best]):.0f} %"
            said = "right" if best == label else "wrong"
            cards.append(_card(image, file, said, float(seen[row][best]), text))
        parts.append(f"<h3>{escape(name)} ({_count(len(rows))})</h3>" + _grid(cards))
    return "\n".join(parts)


def _grid(cards: list[str]) -> str:
    return f'<div class="grid">{"".join(cards)}</div>' if cards else html.note("None.")


def _card(image: Tensor, file: Path, said: str, share: float | None, text: str) -> str:
    """`said` is right, wrong or nothing; `share` the length of the bar; `text` is HTML."""
    picture = f'src="data:image/jpeg;base64,{_thumbnail(image)}"'
    lines = [f'<img alt="" title="{escape(str(file))}" {picture}>']
    if share is not None:
        lines.append(f'<div class="bar"><div style="width:{100 * share:.0f}%"></div></div>')
    lines.append("<br>".join(filter(None, (text, escape(file.name)))))
    return f'<div class="card {said}">{"".join(lines)}</div>'


def _thumbnail(image: Tensor) -> str:
    """A JPEG in base64; small images are enlarged by whole pixels, so that they stay sharp."""
    from PIL import Image

    pixels = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels)
    longest = max(picture.size)
    scale = _SIDE / longest if longest > _SIDE else max(1, _SIDE // longest)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    buffer = io.BytesIO()
    picture.resize(size, method).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def _count(images: int) -> str:
    return f"{images} image" + ("" if images == 1 else "s")
