"""The page: its graphs are the model, its linear algebra is ours, and in a browser it does what it says."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flown.anytask.evidence import weigh
from flown.anytask.model import AnyTask
from flown.anytask.ridge import confidence, left_out, ridge
from flown.base.errors import FlownError
from flown.generator.files import shipped
from flown.heads.unknown import distances, limit
from flown.play.graphs import GRAPHS, NET, SIZES, digest, write_graphs
from flown.play.runtime import FILES, runtime
from flown.play.site import PAGE, server, write_site
from tests import browser
from tests.test_cli import call


@pytest.fixture(scope="module")
def model() -> AnyTask:
    return AnyTask.from_pretrained(shipped("flown-any"))


def fake_runtime(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text("")
    return folder


def check_graphs(folder: Path, model: AnyTask, ways: int) -> None:
    """What the graphs of a folder compute is what the model computes."""
    import onnxruntime

    run = {name: onnxruntime.InferenceSession(folder / f"{name}.onnx").run for name in GRAPHS}
    writer, layers = model.writer(NET), json.loads((folder / SIZES).read_text("utf-8"))["layers"]
    images, labels = torch.randn(2 * ways, 3, 32, 32), torch.arange(2 * ways) % ways
    members = torch.nn.functional.one_hot(labels, ways).float()
    classes, shares = run["see"](None, {"images": images.numpy(), "members": members.numpy()})
    seen = model.trunk.see(images[None], labels[None], ways)
    np.testing.assert_allclose(classes, seen.classes, atol=1e-4)
    np.testing.assert_allclose(shares, seen.shares, atol=1e-6)
    x = torch.randn(1, len(writer.neurons) + ways, model.config.numbers)
    given = {"x": x.numpy(), "t": np.float32([0.25]), "classes": seen.classes.numpy()}
    (end,) = run["end"](None, given)
    wanted = model.end(x, 0.25, writer.neurons, seen.classes)
    np.testing.assert_allclose(end, wanted, atol=1e-4)
    given = {"x": end, "shares": seen.shares.numpy(), "images": images.numpy()}
    features, shrink, scale, correction, *tensors = run["write"](None, given)
    hidden, rows = wanted.split([len(writer.neurons), ways], dim=1)
    body, wanted_features = writer.write_body(hidden, seen.shares, images)
    np.testing.assert_allclose(features, wanted_features[0], atol=1e-3)
    found = dict(zip(layers, tensors, strict=True))
    for name, tensor in body.items():
        np.testing.assert_allclose(found[name], tensor[0], atol=1e-4, err_msg=name)
    wanted_shrink, wanted_scale = writer.shrink_and_scale(rows, seen.shares)
    np.testing.assert_allclose(shrink, wanted_shrink[0], rtol=1e-4)
    np.testing.assert_allclose(scale, wanted_scale[0], rtol=1e-4)
    np.testing.assert_allclose(correction, writer.correction(rows)[0], atol=1e-5)
    (computed,) = run["compute"](None, {"images": images.numpy(), **found})
    np.testing.assert_allclose(computed, features, atol=1e-3)


@pytest.mark.parametrize("ways", [2, 20])
def test_the_graphs_that_ship_are_the_model_that_ships(
    model: AnyTask, tmp_path: Path, ways: int
) -> None:
    write_site(shipped("flown-any"), fake_runtime(tmp_path / "runtime"), tmp_path / "site")
    assert digest(shipped("flown-any")) == json.loads((PAGE / SIZES).read_text())["weights"]
    assert (tmp_path / "site" / "see.onnx").read_bytes() == (PAGE / "see.onnx").read_bytes()
    assert sum((PAGE / f"{name}.onnx").stat().st_size for name in GRAPHS) < 200_000, "no weights"
    check_graphs(tmp_path / "site", model, ways)


def test_another_model_gets_graphs_of_its_own(model: AnyTask, tmp_path: Path) -> None:
    config = model.config.model_copy(
        update={"nets": {NET: 1.0}, "width": 16, "depth": 1, "seed": 5}
    )
    AnyTask(config).save(tmp_path / "model")
    write_site(tmp_path / "model", fake_runtime(tmp_path / "runtime"), tmp_path / "site")
    check_graphs(tmp_path / "site", AnyTask.from_pretrained(tmp_path / "model"), ways=3)
    config = model.config.model_copy(update={"nets": {"cnn-small": 1.0}})
    AnyTask(config).save(tmp_path / "small")
    with pytest.raises(FlownError, match="conv4-32"):
        write_graphs(tmp_path / "small", tmp_path / "none")


NODE = shutil.which("node")
SCRIPT = f"""
import * as heads from "{(PAGE / "heads.js").as_uri()}";
import {{ readFileSync }} from "node:fs";
const {{ features, labels, told, queries }} = JSON.parse(readFileSync(0));
const found = {{
  ridge: heads.ridge(features, labels, 3, 0.1),
  leftOut: heads.leftOut(features, labels, 3, 0.1),
  confidence: heads.confidence(told, labels),
  distances: heads.distances(queries, features, labels, 3),
  shares: heads.weigh([0.3, 0.7], told, labels),
  limit: heads.limit(features.map((row) => row[0]), 0.2),
}};
console.log(JSON.stringify(found, (_, x) => (ArrayBuffer.isView(x) ? [...x] : x)));
"""


class Told:
    """A writer whose two base networks say what they are given, logits (2, K, C)."""

    neurons = head_decoder = torch.zeros(1, 1)

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def write_body(self, x: Any, shares: torch.Tensor, images: Any) -> tuple[Any, torch.Tensor]:
        return {}, shares

    def left_out(self, x: Any, shares: torch.Tensor, features: Any, labels: Any) -> torch.Tensor:
        return self.logits[[int(shares.argmax())]]


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 1, 2, 0], [0, 1, 1, 2, 2, 2, 1]])
def test_the_pages_linear_algebra_is_ours(labels: list[int]) -> None:
    made = torch.Generator().manual_seed(0)
    features, queries, told = (
        torch.randn(*shape, generator=made, dtype=torch.float64)
        for shape in ((7, 5), (4, 5), (2, 7, 3))
    )
    given = {"features": features, "queries": queries, "told": told}
    text = json.dumps({key: value.tolist() for key, value in given.items()} | {"labels": labels})
    command = [str(NODE), "--input-type=module", "--eval", SCRIPT]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, y = json.loads(done.stdout), torch.tensor(labels)
    gate = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    wanted = {
        "shares": weigh(Told(told), gate, queries, y)[0],
        "ridge": ridge(features[None], y[None], 3, 0.1)[0],
        "leftOut": left_out(features[None], y, 3, 0.1)[0],
        "confidence": torch.tensor(confidence(told, y)),
        "distances": distances(features[None], y, 3, queries[None]),
        "limit": torch.tensor(limit(features[:, 0], 0.2)),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6, err_msg=name)


def test_scripts_are_served_as_scripts_to_this_machine_alone(tmp_path: Path) -> None:
    for name in ("a.js", "b.mjs", "c.wasm"):
        (tmp_path / name).write_text("1")
    serving = server(tmp_path, 0)
    assert serving.server_address[0] == "127.0.0.1"
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    kinds = {}
    for name in ("a.js", "b.mjs", "c.wasm"):
        asking = http.client.HTTPConnection("127.0.0.1", serving.server_port)
        asking.request("GET", f"/{name}")
        kinds[name] = asking.getresponse().headers["Content-Type"]
        asking.close()
    serving.shutdown()
    serving.server_close()
    assert kinds == {
        "a.js": "text/javascript",
        "b.mjs": "text/javascript",
        "c.wasm": "application/wasm",
    }


def test_a_runtime_of_another_making_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLOWN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other.tgz").write_bytes(b"1")
    for name, message in (("other.tgz", "other.tgz: is not onnxruntime-web"), ("none", "no such")):
        out = ("--out", tmp_path / "out", "--runtime", tmp_path / name)
        assert call(monkeypatch, "play", "flown-any", *out) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_fixed_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlownError, match="no any-task generator"):
        write_site(shipped("flown-small"), fake_runtime(tmp_path / "runtime"), tmp_path / "site")


def test_the_page_asks_nobody_else() -> None:
    """No address of another host stands in what the browser loads."""
    for path in PAGE.glob("*.*"):
        if path.suffix in (".js", ".css", ".html"):
            assert not re.findall(r"https?://|//cdn", path.read_text("utf-8")), path.name


@pytest.fixture(scope="module")
def ort() -> Path:
    """The runtime, from the user's own cache."""
    pytest.importorskip("playwright")
    if browser.CHROMIUM is None:
        pytest.skip("chromium is not installed")
    try:
        return runtime()
    except FlownError as error:
        pytest.skip(str(error))


@pytest.fixture
def page(ort: Path) -> Iterator[tuple[Any, list[str]]]:
    with browser.opened(ort) as found:
        yield found


def status(page: Any) -> str:
    found: str = page.locator("#status").inner_text()
    return found


@pytest.mark.timeout(600)
def test_what_is_drawn_is_told_apart(page: tuple[Any, list[str]]) -> None:
    shown, wrong = page
    browser.teach(shown, each=3)
    browser.generate(shown)
    facts = shown.locator("#facts").inner_text()
    assert "of 15" in facts and "labels were shuffled" in facts
    asked = [(name, seed) for name in browser.THINGS for seed in range(100, 104)]
    right = sum(browser.answer(shown, name, seed) == name for name, seed in asked)
    assert right / len(asked) > 0.8
    assert not wrong


@pytest.mark.timeout(600)
def test_bad_input_is_told_and_drawings_are_kept(
    page: tuple[Any, list[str]], tmp_path: Path
) -> None:
    shown, wrong = page
    shown.click("#add")
    assert "Draw something" in status(shown)
    browser.draw(shown, "teacher", browser.strokes("ring", 0))
    shown.click("#add")
    assert "no example" in status(shown) and shown.locator("#generate").is_disabled()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    files = shown.locator("#classes input[type=file]")
    files.nth(1).set_input_files(tmp_path / "broken.png")
    shown.wait_for_function("document.querySelector('#status').textContent.includes('broken.png')")
    from PIL import Image

    Image.new("1", (8000, 6250)).save(tmp_path / "huge.png")
    files.nth(1).set_input_files(tmp_path / "huge.png")
    shown.wait_for_function(
        "document.querySelector('#status').textContent.includes('50 megapixels')"
    )
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "same.png")
    for place in (0, 1):
        files.nth(place).set_input_files(tmp_path / "same.png")
        shown.wait_for_timeout(300)
    assert "The same picture is in" in status(shown)
    assert shown.locator("#classes canvas").count() == 3, "what was drawn is kept"
    shown.get_by_label("Remove thing 2").click()
    assert "One thing cannot be told apart" in status(shown)
    assert not wrong


@pytest.mark.timeout(600)
def test_the_keyboard_and_a_phone_do_all_of_it(ort: Path) -> None:
    with browser.opened(ort, width=360, color_scheme="dark", has_touch=True) as (shown, wrong):
        for line in (("ArrowRight",) * 6, ("ArrowDown",) * 6):
            for _ in range(2):
                shown.locator("#teacher canvas").focus()
                for key in (" ", *line, " ", "Enter"):
                    shown.keyboard.press(key)
            shown.locator("[aria-label='Draw for thing 2']").press("Enter")
        assert shown.locator("#classes canvas").count() == 4
        shown.locator("#count").select_option("1")
        shown.locator("#generate").press("Enter")
        shown.wait_for_function("document.querySelector('#progress').value === 1", timeout=200_000)
        assert shown.evaluate("document.documentElement.scrollWidth") <= 360
        unnamed = shown.evaluate(
            "[...document.querySelectorAll('main button, main input, main canvas[role]')].filter("
            "e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).length"
        )
        assert unnamed == 0
        assert not wrong
