"""A folder of class sub-folders: formats, depths, sizes, and all that can be wrong with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flown import tasks as data
from flown.base.errors import FlownError, FlownWarning
from flown.tasks import load_folder, read_image

RANDOM = np.random.default_rng(0)


def picture(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Ten grey 8x8 pictures of each of two classes, one with a space and an umlaut in its name."""
    for name in ("zebra", "Große Katze"):
        for i in range(10):
            save(tmp_path / "my pets" / name / f"bild {i} ä.png", picture(8, 8))
    return tmp_path / "my pets"


def test_classes_are_sorted_folders_and_parts_disjoint(pets: Path) -> None:
    images = data.load(pets)
    assert images.classes == ("Große Katze", "zebra")
    parts = (images.train, images.val, images.test)
    assert [len(part) for part in parts] == [14, 2, 4]
    assert all(torch.bincount(part.labels).tolist() == [len(part) // 2] * 2 for part in parts)
    seen = [{image.tobytes() for image in part.images.numpy()} for part in parts]
    assert len(set.union(*seen)) == 20
    again = data.load(str(pets))
    assert torch.equal(again.test.images, images.test.images)
    first = read_image(pets / "Große Katze" / "bild 0 ä.png")
    assert any(torch.equal(first, image) for part in parts for image in part.images)


def test_a_folder_as_support_set_is_taken_whole(pets: Path) -> None:
    support, classes = data.load_support(pets, shots=1)
    assert classes == ("Große Katze", "zebra") and support.labels.tolist() == [0] * 10 + [1] * 10
    zebras, names = data.load_support(str(pets), classes=("zebra",))
    assert names == ("zebra",) and torch.equal(zebras.images, support.images[10:])
    assert zebras.labels.tolist() == [0] * 10
    assert data.summary(pets)["train per class"] == [7, 7]


@pytest.mark.parametrize("suffix", "png bmp webp ppm tif TIFF gif jpg JPEG".split())
def test_colour_formats(tmp_path: Path, suffix: str) -> None:
    pixels = np.repeat(np.repeat(picture(1, 1, 3), 16, 0), 16, 1)  # one colour survives a JPEG
    options = {"lossless": True} if suffix == "webp" else {}
    image = read_image(save(tmp_path / f"x.{suffix}", pixels, **options))
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
    difference = (image.permute(1, 2, 0).int() - torch.from_numpy(pixels).int()).abs().max()
    assert difference <= (3 if suffix.lower() in ("jpg", "jpeg") else 0)


@pytest.mark.parametrize("suffix", ["png", "pgm", "tif", "npy"])
def test_grey_formats(tmp_path: Path, suffix: str) -> None:
    pixels = picture(6, 5)
    image = read_image(save(tmp_path / f"x.{suffix}", pixels))
    assert torch.equal(image, torch.from_numpy(pixels)[None])


def test_grey_stored_as_colour_is_grey(tmp_path: Path) -> None:
    pixels = picture(6, 5)
    image = read_image(save(tmp_path / "x.png", np.stack([pixels] * 3, -1)))
    assert torch.equal(image, torch.from_numpy(pixels)[None])


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[:2, :, 3] = 255
    image = read_image(save(tmp_path / "x.png", pixels))
    assert image[:, 0, 0].tolist() == [200, 0, 0] and image[:, 3, 3].tolist() == [255, 255, 255]
    grey = np.stack([np.full((4, 4), 10, np.uint8), np.eye(4, dtype=np.uint8) * 255], -1)
    Image.fromarray(grey, "LA").save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png")[0, :2, :2].tolist() == [[10, 255], [255, 10]]


def test_palettes(tmp_path: Path) -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "plain.png")
    assert read_image(tmp_path / "plain.png")[:, 0, 0].tolist() == [10, 20, 30]
    image.save(tmp_path / "clear.png", transparency=1)
    assert read_image(tmp_path / "clear.png").unique().tolist() == [255]


def test_pictures_stand_as_exif_says(tmp_path: Path) -> None:
    pixels = picture(4, 6, 3)
    turned = {
        3: np.rot90(pixels, 2),
        6: np.rot90(pixels, -1),
        8: np.rot90(pixels),
        2: pixels[:, ::-1],
    }
    for orientation, expected in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save(tmp_path / "x.png", pixels, exif=exif)
        assert torch.equal(read_image(path).permute(1, 2, 0), torch.from_numpy(expected.copy()))


def test_large_pictures_are_shrunk_on_request(tmp_path: Path) -> None:
    for name, mode in (("x.jpg", "RGB"), ("x.png", "RGBA"), ("x.gif", "P")):
        Image.new(mode, (400, 100)).save(tmp_path / name)
        assert read_image(tmp_path / name, largest=80).shape[1:] == (20, 80)
        assert read_image(tmp_path / name, largest=500).shape[1:] == (100, 400)


def test_sixteen_bits_keep_one_scale(tmp_path: Path) -> None:
    """A dark picture stays dark: the scale is the format's, not the picture's."""
    for value, expected in ((65535, 255), (257 * 100, 100), (200, 1), (0, 0)):
        image = read_image(save(tmp_path / "x.png", np.full((4, 4), value, np.uint16)))
        assert image.unique().tolist() == [expected]


def test_one_bit(tmp_path: Path) -> None:
    save(tmp_path / "x.png", np.eye(8, dtype=np.uint8) * 255)
    Image.open(tmp_path / "x.png").convert("1").save(tmp_path / "bit.png")
    assert read_image(tmp_path / "bit.png").unique().tolist() == [0, 255]


def test_arrays_of_floats(tmp_path: Path) -> None:
    image = read_image(save(tmp_path / "x.npy", np.array([[0.0, 0.5], [1.0, 0.2]], np.float32)))
    assert image.tolist() == [[[0, 128], [255, 51]]]
    colour = picture(4, 4, 3)
    assert torch.equal(
        read_image(save(tmp_path / "c.npy", colour)).permute(1, 2, 0), torch.from_numpy(colour)
    )


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((4, 4), np.nan), "NaN or Inf"),
        (np.full((4, 4), -np.inf), "NaN or Inf"),
        (np.full((4, 4), 2.0), r"\[0, 1\]"),
        (np.full((4, 4), 7), "int64 pixels"),
        (np.zeros((4, 4), complex), "complex128 pixels"),
        (np.zeros((3, 4, 4)), r"shape \(3, 4, 4\)"),
        (np.zeros((0, 4), np.uint8), r"shape \(0, 4\)"),
        (np.array([[None]]), "not a readable array"),
    ],
)
def test_bad_arrays_are_refused_by_name(tmp_path: Path, pixels: np.ndarray, message: str) -> None:
    path = tmp_path / "x.npy"
    np.save(path, pixels, allow_pickle=True)
    with pytest.raises(FlownError, match=rf"x\.npy: .*{message}"):
        read_image(path)


def test_float_pictures(tmp_path: Path) -> None:
    assert read_image(save(tmp_path / "x.tif", np.full((4, 4), 0.5, np.float32))).max() == 128
    for pixels, message in (
        (np.full((4, 4), np.nan, np.float32), "NaN"),
        (np.full((4, 4), -5, np.int32), "16 bits"),
    ):
        with pytest.raises(FlownError, match=rf"x\.tif: .*{message}"):
            read_image(save(tmp_path / "x.tif", pixels))


def test_other_sizes_become_the_most_frequent_one(pets: Path) -> None:
    save(pets / "zebra" / "large.png", np.full((40, 30), 77, np.uint8))
    whole = load_folder(pets).train
    assert whole.images.shape == (21, 1, 8, 8)
    assert (whole.images == 77).all(dim=3).all(dim=2).any()
    assert load_folder(pets, size=12).train.images.shape == (21, 1, 12, 12)
    with pytest.raises(FlownError, match="size 0"):
        load_folder(pets, size=0)


def test_one_coloured_image_makes_all_colour(pets: Path) -> None:
    save(pets / "zebra" / "x.png", picture(8, 8, 3))
    whole = load_folder(pets).train
    assert whole.images.shape == (21, 3, 8, 8)
    grey = (whole.images == whole.images[:, :1]).flatten(1).all(dim=1)
    assert int(grey.sum()) == 20


def test_other_and_hidden_files_are_left_out(pets: Path) -> None:
    (pets / "README.txt").write_text("pets")
    (pets / "zebra" / "notes.txt").write_text("striped")
    (pets / "zebra" / "._bild.png").write_bytes(b"a resource fork")
    (pets / ".cache").mkdir()
    with pytest.warns(FlownWarning, match=r"1 file is not read as images: .*notes\.txt"):
        assert len(load_folder(pets).train) == 20


def test_files_of_every_format_damaged_are_named(tmp_path: Path) -> None:
    refused = 0
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm", "npy"):
        path = save(tmp_path / f"x.{suffix}", picture(16, 16, 3))
        whole = path.read_bytes()
        for _ in range(30):
            scratched = bytearray(whole[: RANDOM.integers(len(whole))])
            for place in RANDOM.integers(0, max(1, min(len(scratched), 300)), 4):
                if place < len(scratched):
                    scratched[place] = RANDOM.integers(256)
            path.write_bytes(scratched)
            try:
                read_image(path)
            except FlownError as error:
                assert path.name in str(error)
                refused += 1
    assert refused > 120


def test_an_unreadable_image_stops_the_folder_by_name(pets: Path) -> None:
    (pets / "zebra" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    with pytest.raises(FlownError, match=r"torn\.png: not a readable image"):
        data.load(pets)


def test_folders_that_are_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(FlownError, match="nowhere: no such folder"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(FlownError, match="two or more classes, found none"):
        load_folder(tmp_path)
    save(tmp_path / "cat" / "x.png", picture(8, 8))
    with pytest.raises(FlownError, match="found only"):
        load_folder(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(FlownError, match="class 'dog' has no image"):
        load_folder(tmp_path)
    save(tmp_path / "dog" / "x.png", picture(8, 8))
    assert load_folder(tmp_path).classes == ("cat", "dog")
    with pytest.raises(FlownError, match=r"class 'cat': 1 .* 3 or more"):
        data.load(tmp_path)
