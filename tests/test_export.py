"""Exported networks compute what PyTorch computes, in onnxruntime and compiled by a C compiler."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import flown
from flown.base.errors import FlownError
from flown.nets import INPUT_SIZES
from flown.nets.architecture import Architecture
from flown.nets.cnn import ACTIVATIONS
from flown.tasks import Task
from flown.weights.batch import WeightBatch
from flown.weights.export.c import write_c
from flown.weights.export.write import export
from flown.weights.layout import WeightLayout
from tests.test_cli import call, refused

__all__ = ["refused"]  # a fixture

COMPILER = shutil.which("gcc") or shutil.which("cc")
NORM = "tests.examples:ConvNorm"
compiled = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")


def networks(net: str, n: int = 2, channels: int = 1, activation: str = "tanh") -> WeightBatch:
    kind = Architecture(
        net=net,
        channels=channels,
        size=INPUT_SIZES.get(net, 12),
        outputs=4,
        activation=activation,
        mean=0.3,
        std=0.25,
    )
    layout = WeightLayout.of(kind.build(), kind)
    generator = torch.Generator().manual_seed(0)
    vectors = 0.2 * torch.randn(n, layout.size, generator=generator)
    task = Task(id="t", dataset="t", classes=("a", 'b"??/*', "ü", "d\n"))
    return WeightBatch(layout, vectors, {"support": 'a folder */ "x"', "seed": 3}, task=task)


def pixels(count: int, channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator
    )


def vote(batch: WeightBatch, images: Tensor) -> Tensor:
    return batch.logits(batch.preprocess(images)).softmax(dim=-1).mean(dim=0)


def in_c(path: Path, images: Tensor, outputs: int) -> tuple[Tensor, list[int], list[bytes]]:
    """Probabilities, answers and class names of a C file, compiled with warnings as errors."""
    library = path.with_suffix(".so")
    flags = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fPIC", "-shared"]
    subprocess.run([str(COMPILER), *flags, str(path), "-o", str(library), "-lm"], check=True)
    loaded = ctypes.CDLL(str(library))
    classify = getattr(loaded, f"{path.stem}_classify")
    found, answers = torch.empty(len(images), outputs), []
    for image, row in zip(images, found, strict=True):
        answers.append(classify(image.numpy().tobytes(), ctypes.c_void_p(row.data_ptr())))
    names = (ctypes.c_char_p * outputs).in_dll(loaded, f"{path.stem}_classes")
    return found, answers, list(names)


@pytest.mark.parametrize("net", ["cnn-small", "conv4-8", NORM])
def test_onnx_agrees_at_any_number_and_size_of_images(net: str, tmp_path: Path) -> None:
    channels = 3 if net == NORM else 1
    batch = networks(net, 2, channels, "relu")
    if net == NORM:
        batch = batch.calibrated(pixels(64, 3, 32, 32), batches=1)
    batch.to_onnx(tmp_path / "nets.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "nets.onnx")
    for count, height, width in ((1, 28, 28), (3, 32, 32), (2, 41, 20), (5, 7, 9)):
        images = pixels(count, channels, height, width)
        (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, vote(batch, images), atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == list(batch.task.classes)
    assert json.loads(about["provenance"]) == batch.provenance


@compiled
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_c_agrees_for_every_activation(activation: str, tmp_path: Path) -> None:
    batch = networks("cnn-medium", 2, 3, activation)
    write_c(batch, tmp_path / "nets.c")
    images = pixels(20, 3, 32, 32)
    found, answers, names = in_c(tmp_path / "nets.c", images, 4)
    torch.testing.assert_close(found, vote(batch, images), atol=1e-4, rtol=0)
    assert answers == found.argmax(dim=1).tolist()
    assert [name.decode() for name in names] == list(batch.task.classes)


@compiled
def test_c_scales_pixels_by_channel(tmp_path: Path) -> None:
    batch = networks("cnn-small", 2, 3)
    units = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    kind = batch.layout.architecture.model_copy(update=units)
    layout = batch.layout.model_copy(update={"architecture": kind})
    batch = WeightBatch(layout, batch.vectors, task=batch.task)
    write_c(batch, tmp_path / "nets.c")
    images = pixels(20, 3, 28, 28)
    found, _, _ = in_c(tmp_path / "nets.c", images, 4)
    torch.testing.assert_close(found, vote(batch, images), atol=1e-4, rtol=0)


@compiled
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(max_examples=12, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.sampled_from(["same", "valid", (0, 1), (2, 0)]),
    dilation=st.integers(1, 2),
    ceil=st.booleans(),
    bias=st.booleans(),
)
def test_c_knows_the_settings_of_layers(
    tmp_path_factory: pytest.TempPathFactory,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: str | tuple[int, int],
    dilation: int,
    ceil: bool,
    bias: bool,
) -> None:
    def build(channels: int, classes: int, activation: str, size: int) -> nn.Module:
        steps = (1, 1) if padding == "same" else stride
        conv = nn.Conv2d(channels, 3, kernel, steps, padding, dilation, bias=bias)
        pool = nn.MaxPool2d((2, 3), stride, (1, 1), ceil_mode=ceil)
        width = nn.Sequential(conv, pool, nn.Flatten())(torch.zeros(1, channels, size, size))
        head = nn.Linear(width.shape[1], classes, bias=bias)
        return nn.Sequential(conv, nn.ReLU(), pool, nn.Flatten(), head)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build(2, 3, "relu", 13)
    folder = tmp_path_factory.mktemp("c")
    batch = _batch_of(module, channels=2, size=13, outputs=3)
    write_c(batch, folder / "net.c")
    images = pixels(4, 2, 13, 13)
    x = (images.float() / 255 - 0.4) / 0.3
    wanted = module.eval()(x).softmax(dim=-1).detach()
    found, _, _ = in_c(folder / "net.c", images, 3)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def _batch_of(module: nn.Module, channels: int, size: int, outputs: int) -> WeightBatch:
    """A module as a batch of one, whose `network` it is."""
    kind = Architecture(
        net="cnn-small",
        channels=channels,
        size=size,
        outputs=outputs,
        activation="relu",
        mean=0.4,
        std=0.3,
    )
    layout = WeightLayout.of(module, kind)
    tensors = {name: p.detach()[None] for name, p in module.named_parameters()}
    batch = WeightBatch(layout, layout.pack(tensors))
    batch.__dict__["network"] = module
    return batch


@compiled
def test_int8_is_a_quarter_as_large_and_as_accurate(tmp_path: Path) -> None:
    digits = flown.load_data("digits")
    some = flown.tasks.draw_support(
        digits.train, classes=10, shots=5, generator=torch.Generator().manual_seed(0)
    )
    model = flown.Flown.from_pretrained("flown-any")
    batch = model.generate(some.images, some.labels, n=1, net="conv4-8")
    sizes = write_c(batch, tmp_path / "f.c"), write_c(batch, tmp_path / "q.c", int8=True)
    assert sizes[1].constants < 0.35 * sizes[0].constants
    side = batch.layout.architecture.size
    images = nn.functional.interpolate(
        digits.test.images.float(), (side, side), mode="bilinear", antialias=True
    )
    images = images.round().to(torch.uint8)
    right = [
        100
        * float(
            (torch.tensor(in_c(tmp_path / name, images, 10)[1]) == digits.test.labels)
            .float()
            .mean()
        )
        for name in ("f.c", "q.c")
    ]
    assert right[0] > 80
    assert abs(right[0] - right[1]) <= 1


def test_the_size_in_bytes_is_what_the_compiler_makes(tmp_path: Path) -> None:
    if COMPILER is None or shutil.which("size") is None:
        pytest.skip("needs a C compiler and binutils")
    for int8 in (False, True):
        size = write_c(networks("cnn-small", 3), tmp_path / "net.c", int8)
        made = tmp_path / "net.o"
        subprocess.run(
            [str(COMPILER), "-std=c99", "-O1", "-c", tmp_path / "net.c", "-o", made], check=True
        )
        listed = subprocess.run(["size", "-A", made], check=True, capture_output=True, text=True)
        sections = dict(
            line.split()[:2] for line in listed.stdout.splitlines() if line.startswith(".")
        )
        assert int(sections[".bss"]) == pytest.approx(size.memory, abs=64)
        assert int(sections[".rodata"]) == pytest.approx(size.constants, abs=256)


def test_weights_of_one_network_are_the_modules_own(tmp_path: Path) -> None:
    batch = networks("cnn-small", 3)[[1]]
    export(batch, tmp_path / "net.safetensors", "safetensors")
    export(batch, tmp_path / "net.pt", "state_dict")
    wanted = batch.state_dict(0)
    for state in (
        load_file(tmp_path / "net.safetensors"),
        torch.load(tmp_path / "net.pt", weights_only=True),
    ):
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def test_the_command_writes_a_file_and_says_what_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    networks("cnn-small", 3).save(nets := tmp_path / "nets.safetensors")
    out = tmp_path / "net.c"
    asked = ("--to", "c", "--int8", "--network", 2, "--out", out)
    assert call(monkeypatch, "export", nets, *asked) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "network 2 of 3" in said and "bytes of constants" in said
    card = (tmp_path / "net.c.md").read_text("utf-8")
    assert "a folder" in card and "seed 3" in card
    source = out.read_text("ascii")
    assert source.count("*/") == source.count("/*")
    out = tmp_path / "net.onnx"
    assert call(monkeypatch, "export", nets, "--to", "onnx", "--out", out) == 0
    assert out.exists() and "network" not in capsys.readouterr().out.split("wrote")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--to: name a format"),
        (["--to", "tflite"], "unknown format 'tflite'"),
        (["--to", "onnx", "--int8"], "--int8: is for --to c"),
        (["--to", "c", "--network", "3"], "--network 3"),
        (["--to", "safetensors", "--network", "0", "--network", "1"], "choose one"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    refused: Callable[..., None], tmp_path: Path, arguments: list[str], message: str
) -> None:
    networks("cnn-small", 3).save(nets := tmp_path / "nets.safetensors")
    refused(message, "export", nets, *arguments, "--out", tmp_path / "net")


def test_networks_that_c_cannot_say_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FlownError, match="take --to onnx"):
        write_c(networks(NORM, 1, 3, "relu"), tmp_path / "net.c")
    with pytest.raises(FlownError, match="no networks"):
        write_c(networks("cnn-small", 0), tmp_path / "net.c")
