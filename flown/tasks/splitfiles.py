"""Sets of many classes in the format of mini-ImageNet's official split files (Ravi & Larochelle).

train.csv, val.csv, test.csv    rows `filename,label`, no class in two of them
images/                         all images
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from flown.base.errors import FlownError
from flown.tasks.pictures import read_image, stack
from flown.tasks.splits import ManyClass

PARTS = ("train", "val", "test")


def load_split_files(folder: Path, size: int = 84) -> ManyClass:
    """A set of many classes from a folder of split files; images are resized to `size`.

    Raises:
        FlownError: a split file is missing or has other columns, a class is in two of them, or an
            image is missing or unreadable (it is named).
    """
    listed = {part: _rows(folder / f"{part}.csv") for part in PARTS}
    part_of: dict[str, str] = {}
    for part, rows in listed.items():
        for _, label in rows:
            if part_of.setdefault(label, part) != part:
                raise FlownError(
                    f"{folder}: class '{label}' is in {part_of[label]}.csv and {part}.csv"
                )
    names = tuple(sorted(part_of))
    number = {name: i for i, name in enumerate(names)}
    images, labels = [], []
    for rows in listed.values():
        for file, label in rows:
            path = folder / "images" / file
            if not path.is_file():
                raise FlownError(f"{path}: no such image; the split files name it")
            # Resized one by one: sixty thousand pictures of full size would not fit into memory.
            images.append(stack([read_image(path)], size)[0])
            labels.append(number[label])
    parts = {part: torch.tensor([number[n] for n in names if part_of[n] == part]) for part in PARTS}
    return ManyClass(folder.name, names, stack(images, size), torch.tensor(labels), parts)


def _rows(path: Path) -> list[tuple[str, str]]:
    """File names and labels."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel begins with a mark
            rows = [row for row in csv.reader(file) if any(row)]
    except (OSError, UnicodeDecodeError) as error:
        raise FlownError(f"{path}: cannot be read ({error})") from None
    if rows and rows[0][0].strip() == "":  # an index, as pandas writes it
        rows = [row[1:] for row in rows]
    if not rows or [name.strip() for name in rows[0]] != ["filename", "label"]:
        raise FlownError(f"{path}: its first line is not 'filename,label'")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != 2 or not all(row):
            raise FlownError(f"{path}, line {number}: expected a file name and a label, got {row}")
    if len(rows) == 1:
        raise FlownError(f"{path}: names no image")
    return [(file, label) for file, label in rows[1:]]
