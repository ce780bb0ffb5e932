"""The page in Debian's chromium: things are drawn by pointer events. Alone it takes the README's picture.

python -m tests.browser docs/play.png
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flown.generator.files import locate
from flown.play.runtime import runtime
from flown.play.site import server, write_site

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
Stroke = list[tuple[float, float]]


def _turn(n: int, radius: float, rounds: float) -> Stroke:
    angles = [2 * math.pi * rounds * i / n for i in range(n + 1)]
    sizes = [1.0 if rounds == 1 else i / n for i in range(n + 1)]
    return [
        (radius * s * math.cos(a), radius * s * math.sin(a))
        for s, a in zip(sizes, angles, strict=True)
    ]


THINGS: dict[str, list[Stroke]] = {
    "ring": [_turn(24, 1, 1)],
    "cross": [[(-1, -1), (1, 1)], [(1, -1), (-1, 1)]],
    "wave": [[(-1, 0.5), (-0.5, -0.5), (0, 0.5), (0.5, -0.5), (1, 0.5)]],
    "hook": [[(-0.6, -1), (-0.6, 0.6), (0, 1), (0.6, 0.4)]],
    "snail": [_turn(36, 1, 2.2)],
}


def strokes(name: str, seed: int) -> list[Stroke]:
    """A thing as a hand draws it, in [0, 1]: turned, stretched, unsteady."""
    random = np.random.default_rng([seed, *name.encode()])
    turn, wide, high = random.normal(0, 0.12), *np.exp(random.normal(0, 0.12, 2))
    left, top = random.uniform(0.4, 0.6, 2)

    def moved(x: float, y: float) -> tuple[float, float]:
        x, y = wide * x + random.normal(0, 0.04), high * y + random.normal(0, 0.04)
        turned = (x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn))
        return left + 0.26 * turned[0], top + 0.26 * turned[1]

    return [[moved(x, y) for x, y in stroke] for stroke in THINGS[name]]


@contextlib.contextmanager
def opened(ort: Path, width: int = 1280, **options: Any) -> Iterator[tuple[Any, list[str]]]:
    """The page of flown-any, loaded, and what its console and network complain of.

    Args:
        ort: the folder of onnxruntime-web's files. options: of a Playwright page.
    """
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        write_site(locate("flown-any"), ort, Path(folder))
        serving = server(Path(folder), 0)
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 1000}, **options)
        page.set_default_timeout(200_000)  # of a busy machine
        home, wrong = f"http://127.0.0.1:{serving.server_port}/", []
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: None if _inside(r.url, home) else wrong.append(r.url))
        page.add_init_script("addEventListener('error', (e) => (window.failed = e.message))")
        page.goto(home)
        loading = "document.querySelector('#status').textContent.includes('Loading')"
        page.wait_for_function(f"window.failed || !{loading}")
        assert not wrong
        yield page, wrong
        browser.close()
        serving.shutdown()
        serving.server_close()


def _inside(url: str, home: str) -> bool:
    return url.startswith((home, "data:", f"blob:{home}"))


def draw(page: Any, pad: str, parts: list[Stroke]) -> None:
    """Draws on a pad by pointer events."""
    pad = page.locator(f"#{pad} canvas")
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    for stroke in parts:
        for i, (x, y) in enumerate(stroke):
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
            if not i:
                page.mouse.down()
        page.mouse.up()


def teach(page: Any, each: int) -> None:
    """Draws examples of all things, and names them."""
    for place, name in enumerate(THINGS):
        if place > 1:
            page.click("#more")
        page.click(f"[aria-label^='Draw for'] >> nth={place}")
        field = page.get_by_label(f"Name of thing {place + 1}")
        field.fill(name)
        field.blur()
        for i in range(each):
            draw(page, "teacher", strokes(name, i))
            page.click("#add")


def generate(page: Any) -> None:
    """Presses the button and waits for the end."""
    page.click("#generate")
    page.wait_for_function("document.querySelector('#progress').value === 1", timeout=200_000)


def answer(page: Any, name: str, seed: int) -> str:
    """What the page calls a new drawing; nothing where it says none of these."""
    page.click("#again")
    page.evaluate("delete document.querySelector('#answer').dataset.strokes")
    parts = strokes(name, seed)
    draw(page, "asker", parts)
    done = f"document.querySelector('#answer').dataset.strokes === '{len(parts)}'"
    page.wait_for_function(done)  # what was said of fewer strokes does not count
    found: str = page.locator("#answer").get_attribute("data-name")
    return found


if __name__ == "__main__":
    with opened(runtime(), device_scale_factor=1.5) as (shown, _):
        teach(shown, each=3)
        generate(shown)
        answer(shown, "snail", 100)
        shown.wait_for_timeout(3000)
        shown.screenshot(path=sys.argv[1], full_page=True)
