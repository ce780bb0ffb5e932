"""The report is one file that needs nothing else, from a whole card or a brief one."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from flown.base.provenance import provenance
from flown.generator.card import Card, report_card
from flown.generator.config import FlownConfig
from flown.generator.model import Flown
from flown.measure.baselines import BASELINES
from flown.report import plots, print_card, tables, write_report
from flown.report.style import STARTS, STYLES, style_of
from flown.zoo import Zoo
from tests.examples import TASKS, images

DATA = {task: images(task) for task in TASKS}
STEPS = [float(step) for step in range(100, 600, 100)]
HISTORIES = {
    "encoder": [
        {
            "step": s,
            "loss": 50 / s,
            "train": 90.0,
            "held-out": 89.0,
            "train reconstructed": s / 6,
            "held-out reconstructed": s / 9,
        }
        for s in STEPS
    ],
    "flow": [{"step": s, "loss": 1 - s / 600} for s in STEPS],
}


@pytest.fixture(scope="module")
def cards(
    model_of_three: Flown,
    three_tasks: Zoo,
    model: Flown,
    zoo: Zoo,
) -> dict[str, Card]:
    """A whole card of three tasks, a brief one of the same, one of a lone task."""
    about = {"n": 6, "top": 2, "shots": 1, "steps": 20}
    three = model_of_three, three_tasks, DATA
    return {
        "whole": report_card(*three, **about),  # type: ignore[arg-type]
        "brief": report_card(*three, full=False, **about),  # type: ignore[arg-type]
        "lone": report_card(model, zoo, DATA, **about),  # type: ignore[arg-type]
    }


class Page(HTMLParser):
    """Collects what a browser would load, and checks that tags close."""

    void = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.headings: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loading = ("src", "href", "srcset", "data")
        self.loads += [value or "" for key, value in attrs if key in loading]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def write(path: Path, card: Card, **about: str) -> str:
    record = provenance(FlownConfig(), card.counts, 1.0, "cpu", command="flown demo")
    write_report(path, "A <title> & more", card, HISTORIES, record, **about)
    return path.read_text(encoding="utf-8")


FIGURES = [
    "Every network",
    "Does the context decide?",
    "New or copied?",
    "On the way from noise to weights",
    "Latents",
    "Training",
]


@pytest.mark.parametrize(
    ("kind", "missing"),
    [("whole", set()), ("brief", {FIGURES[1], FIGURES[3], FIGURES[4]}), ("lone", {FIGURES[1]})],
)
def test_one_file_holds_everything(
    cards: dict[str, Card], kind: str, missing: set[str], tmp_path: Path
) -> None:
    text = write(tmp_path / "report.html", cards[kind], lead="Generated <b>.")
    page = Page(text)
    assert not page.open and "script" not in page.tags and "link" not in page.tags
    assert "url(" not in text and "@import" not in text
    shown = [name for name in page.headings if name in FIGURES]
    assert shown == [name for name in FIGURES if name not in missing]
    assert len(page.loads) == len(shown) == page.tags.count("figcaption")
    for source in page.loads:  # images are part of the file, nothing else is loaded
        kind_of, _, data = source.partition(",")
        assert kind_of == "data:image/png;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert min(picture.size) > 300
    assert "A &lt;title&gt; &amp; more" in text and "Generated &lt;b&gt;." in text
    assert "flown demo" in text and "config_hash" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_figures_label_every_method(cards: dict[str, Card]) -> None:
    page = plots.accuracies(cards["whole"])
    for axis, task in zip(page.axes, TASKS, strict=False):
        shown = {label.get_text() for label in axis.get_yticklabels()}
        methods = cards["whole"].tasks[task].methods
        assert shown == {style_of(m).label for m in methods} and axis.get_title(loc="left") == task
    scatter = plots.novelty(cards["whole"])
    assert scatter is not None
    named = {text.get_text() for text in scatter.legends[0].get_texts()}
    assert {style_of(m).label for m in ("flown", "zoo", *BASELINES)} <= named


def test_confusion_writes_its_numbers(cards: dict[str, Card]) -> None:
    page = plots.confusion(cards["whole"])
    assert page is not None
    written = [text.get_text() for text in page.axes[0].texts]
    table = cards["whole"].confusion
    assert written == ["–" if v is None else f"{v:.1f}" for row in table for v in row]
    assert written.count("–") == 4


def test_text_stays_inside_and_apart(cards: dict[str, Card]) -> None:
    """No axis label, title or tick label of one panel runs into those of another."""
    card = cards["whole"]
    drawn = [
        make(card)
        for make in (
            plots.accuracies,
            plots.novelty,
            plots.latents,
            plots.trajectory,
            plots.confusion,
        )
    ]
    for page in (*drawn, plots.losses(HISTORIES)):
        assert isinstance(page, Figure)
        page.draw_without_rendering()
        boxes = [axis.get_tightbbox() for axis in page.axes if axis.get_visible()]
        assert all(box is not None for box in boxes)
        for i, a in enumerate(boxes):
            assert a.x0 > -1 and a.y0 > -1 and a.x1 < page.bbox.x1 + 1  # type: ignore[union-attr]
            for b in boxes[:i]:
                assert a.x0 >= b.x1 or b.x0 >= a.x1 or a.y0 >= b.y1 or b.y0 >= a.y1  # type: ignore[union-attr]


def test_no_history_no_figure() -> None:
    assert plots.losses({}) is None and plots.losses({"encoder": []}) is None
    plain = plots.losses({"flow": [{"step": 1.0, "loss": -1.0}]})
    assert plain is not None and plain.axes[0].get_yscale() == "linear"


def test_many_tasks_all_appear(cards: dict[str, Card]) -> None:
    some = cards["lone"].tasks["digits"]
    many = Card(**{**vars(cards["lone"]), "tasks": {f"t{i}": some for i in range(9)}})
    page = plots.trajectory(many)
    assert page is not None and len(page.legends[0].get_texts()) == 9


def test_looks_differ() -> None:
    starts = {**STARTS, "flown": STYLES["flown"], "recipe-init": STYLES["recipe-init"]}
    for drawn in (STYLES, starts):
        assert len({x.colour for x in drawn.values()}) == len({x.mark for x in drawn.values()})
        assert len({x.colour for x in drawn.values()}) == len(drawn)
    assert set(BASELINES) <= set(STYLES) and style_of("ddpm").label == "ddpm"


def test_tables_have_one_decimal(cards: dict[str, Card]) -> None:
    head, body = tables.methods(cards["whole"], "digits")
    row = next(line for line in body if line[0] == "generated")
    m = cards["whole"].tasks["digits"].methods["flown"]
    assert row[1:4] == [
        "6",
        f"{m.test.mean():.1f} ± {m.test.std():.1f}",
        f"{m.test.quantile(0.5):.1f}",
    ]
    assert row[head.index("top 2")] == f"{m.top(2).mean():.1f}"
    assert all(len(line) == len(head) for line in body)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_terminal_shows_every_figure(cards: dict[str, Card], width: int) -> None:
    for card in cards.values():
        console = Console(width=width, record=True, file=io.StringIO())
        print_card(card, console)
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        assert not any("…" in line for line in lines)  # nothing is cut off
        text = "\n".join(lines)
        methods = card.tasks["digits"].methods
        wanted = [*(style_of(m).label for m in methods), *tables.methods(card, "digits")[0], "NFE"]
        assert all(word in text for word in wanted)
        assert ("others' context" in text) == card.compares_tasks
