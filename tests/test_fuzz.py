"""Files that are not what we wrote: every kind, broken in thousands of ways, is read or refused in words.

A reader may raise FlownError alone. Mutations are drawn from a seed, so that a failure comes again.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import flown
from flown.anytask.config import AnyTaskConfig
from flown.anytask.model import AnyTask
from flown.base.config import read_mapping
from flown.base.errors import FlownError
from flown.generator.config import FlownConfig
from flown.heads.features import Standardised, load_backbone
from flown.tasks import npz
from flown.tasks.splitfiles import load_split_files
from flown.weights.batch import WeightBatch
from flown.zoo import Recipe
from flown.zoo.imports.statefiles import open_states, parts_of

EACH, SECONDS = 150, 10  # mutations a file in the fast run; the longest that one may take


@dataclass(frozen=True)
class Kind:
    """A kind of file: a folder that holds a good one, which file is broken, and how it is read."""

    folder: Path
    file: str
    read: Callable[[Path], object]


def zoo_of(path: Path) -> object:
    zoo = flown.Zoo.open(path)
    zoo.verify()
    return [zoo.joint.size, [zoo.batch(task).name for task in zoo.tasks], zoo.select(epochs=[-1])]


def networks_of(path: Path) -> object:
    batch = WeightBatch.load(path / "nets.safetensors")
    return batch.module(0) if len(batch) else None


def trials_of(path: Path) -> object:
    from flown.zoo.imports.modelzoos import trials

    return trials(path, "tanh", None)


def resumed(path: Path) -> object:
    from flown.base.run import Run

    return Run(path, {"config": {}}, resume=True, overwrite=False, configs={"config": FlownConfig})


@pytest.fixture(scope="module")
def kinds(
    zoo: flown.Zoo, model: flown.Flown, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Kind]:
    """Good files of every kind, small ones."""
    at = tmp_path_factory.mktemp("good")
    found: dict[str, Kind] = {}

    def add(folder: Path, file: str, read: Callable[[Path], object]) -> None:
        found[f"{folder.name}/{file}"] = Kind(folder, file, read)

    for file in ("zoo.json", "tasks.jsonl", "index.jsonl"):
        add(zoo.path, file, zoo_of)
    add(zoo.path, next(zoo.path.glob("weights-*")).name, zoo_of)
    model.save_pretrained(str(at / "model"))
    for file in ("config.json", "tasks.jsonl", "encoder.safetensors", "flow.safetensors"):
        add(at / "model", file, lambda path: flown.Flown.from_pretrained(str(path)))
    small = AnyTaskConfig(nets={"cnn-small": 1.0}, width=16, depth=1)
    AnyTask(small).save(at / "any")
    for file in ("config.json", "generator.safetensors"):
        add(at / "any", file, lambda path: flown.Flown.from_pretrained(str(path)))
    (at / "nets").mkdir()
    zoo.batch("digits")[:2].save(at / "nets" / "nets.safetensors")
    add(at / "nets", "nets.safetensors", networks_of)
    (at / "run").mkdir()
    content = {
        "format": "flown-run-1",
        "flown": "0.2",
        "config": FlownConfig().model_dump(mode="json"),
    }
    (at / "run" / "run.json").write_text(json.dumps(content))
    add(at / "run", "run.json", resumed)
    (at / "texts").mkdir()
    recipe = Recipe(name="x", dataset="digits", grid={"learning_rate": [1e-3, 1e-2]})
    for file, value, read in (
        ("recipe.json", recipe, Recipe.load),
        ("config.json", FlownConfig(), FlownConfig.load),
        ("any.json", small, AnyTaskConfig.load),
    ):
        (at / "texts" / file).write_text(value.model_dump_json())
        add(at / "texts", file, lambda path, file=file, read=read: read(path / file))
    (at / "texts" / "names.yaml").write_text("a.weight: '0.weight'\nb: null\nc: [1, {d: 2}]\n")
    add(at / "texts", "names.yaml", lambda path: read_mapping(path / "names.yaml"))
    (at / "trials" / "a" / "checkpoint_1").mkdir(parents=True)
    (at / "trials" / "a" / "checkpoint_1" / "checkpoints").write_bytes(b"")
    (at / "trials" / "a" / "params.json").write_text('{"seed": 3, "model::nlin": "tanh"}')
    (at / "trials" / "a" / "result.json").write_text(
        '{"training_iteration": 1, "train_acc": 0.5}\n'
    )
    for file in ("a/params.json", "a/result.json"):
        add(at / "trials", file, trials_of)
    (at / "states").mkdir()
    torch.save({"model": model.space.encoder.state_dict(), "epoch": 3}, at / "states" / "a.pt")
    torch.save(
        {"x": torch.ones(3), "y": np.float64(2)},
        at / "states" / "old.pt",
        _use_new_zipfile_serialization=False,
    )
    save_file({"x": torch.ones(2, 3)}, at / "states" / "a.safetensors")
    for file in ("a.pt", "old.pt", "a.safetensors"):
        add(at / "states", file, lambda path, file=file: open_states(path / file))
    (at / "states" / "m.bin.index.json").write_text('{"weight_map": {"x": "a.pt", "y": "b.pt"}}')
    add(at / "states", "m.bin.index.json", lambda path: parts_of(path / "m.bin.index.json"))
    (at / "images").mkdir()
    pixels, labels = np.zeros((20, 8, 8), np.uint8), np.arange(20) % 2
    parts = {
        f"{part}_{k}": v
        for part in ("train", "test")
        for k, v in (("images", pixels), ("labels", labels))
    }
    np.savez(at / "images" / "a.npz", class_names=["a", "b"], **parts)
    add(at / "images", "a.npz", lambda path: npz.read_parts(path / "a.npz"))
    split = np.array(["train", "val"])
    np.savez(
        at / "images" / "many.npz",
        images=pixels,
        labels=labels,
        class_names=["a", "b"],
        class_split=split,
    )
    add(at / "images", "many.npz", lambda path: npz.read_many(path / "many.npz"))
    (at / "splits").mkdir()
    for part in ("train", "val", "test"):
        (at / "splits" / f"{part}.csv").write_text(f"filename,label\nx.png,{part}\n")
    add(at / "splits", "train.csv", lambda path: load_split_files(path))
    (at / "backbones").mkdir()
    shipped = load_backbone("resnet12-small")
    assert isinstance(shipped, Standardised)
    shipped.save(at / "backbones" / "b.safetensors")
    add(at / "backbones", "b.safetensors", lambda path: load_backbone(path / "b.safetensors"))
    return found


ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**70, 10**400, -(10**30), 0.5, 1e308, -1e308),
    *(
        float("nan"),
        float("inf"),
        "",
        "x",
        "../../etc/passwd",
        "/etc/passwd",
        "\ud800",
        "\x1b[31m",
        "[/b]",
    ),
    *([], {}, [[]], [1], {"a": 1}, [None] * 3, "9" * 5000, [0] * 2000),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(found for key, entry in inner for found in places(entry, (*path, key)))]


def change(value: Any, draw: random.Random) -> Any:
    """A JSON value with something in it replaced, removed, doubled, or put deep inside others."""
    path = draw.choice(places(value))
    how = draw.randrange(6)
    if not path:
        return draw.choice(ODD)
    place = value
    for key in path[:-1]:
        place = place[key]
    if how == 0:
        del place[path[-1]]
    elif how == 1 and isinstance(place, list):
        place.append(place[path[-1]])
    elif how == 2:
        deep: Any = place[path[-1]]
        for _ in range(draw.choice((1, 5, 3000))):
            deep = [deep]
        return Deep(value, path, deep)
    elif how == 3 and isinstance(place, dict):
        place[draw.choice(("x", path[-1] + "s", "../y"))] = draw.choice(ODD)
    else:
        place[path[-1]] = draw.choice(ODD)
    return value


@dataclass
class Deep:
    """A value with one entry nested deeper than `json` writes."""

    value: Any
    path: tuple[Any, ...]
    deep: Any


def dumps(value: Any) -> str:
    if not isinstance(value, Deep):
        return json.dumps(value)
    depth, inner = 0, value.deep
    while isinstance(inner, list) and len(inner) == 1:
        depth, inner = depth + 1, inner[0]
    place = value.value
    for key in value.path[:-1]:
        place = place[key]
    place[value.path[-1]] = "DEEP"
    nested = "[" * depth + json.dumps(inner) + "]" * depth
    return json.dumps(value.value).replace('"DEEP"', nested, 1)


def mutate_text(text: str, draw: random.Random) -> str:
    if text.lstrip()[:1] not in "{[":
        return mutate_bytes(text.encode(), draw).decode(errors="replace")
    lines = text.splitlines() if text.count("\n{") else [text]
    chosen = draw.randrange(len(lines))
    lines[chosen] = dumps(change(json.loads(lines[chosen]), draw))
    if draw.random() < 0.05:
        lines.append(lines[chosen])
    return "\n".join(lines) + "\n"


def mutate_header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    meta = header.get("__metadata__", {})
    named = [key for key in meta if meta[key][:1] in "{["]
    if named and draw.random() < 0.6:
        key = draw.choice(named)
        meta[key] = dumps(change(json.loads(meta[key]), draw))
        text = json.dumps(header)
    else:
        text = dumps(change(header, draw))
    raw = text.encode()
    length = draw.choice((len(raw), len(raw), len(raw), 2**62, 0, len(data)))
    return struct.pack("<Q", length) + raw + data[8 + size :]


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    how = draw.randrange(4)
    if how == 0:
        return data[: draw.randrange(len(data))]
    if how == 1:
        start = draw.randrange(len(data))
        return data[:start] + draw.randbytes(draw.randrange(40)) + data[start:]
    for _ in range(draw.choice((1, 3, 40))):
        changed[draw.randrange(min(len(changed), draw.choice((200, 10**9))))] = draw.randrange(256)
    return bytes(changed)


def mutate(file: Path, good: bytes, draw: random.Random) -> None:
    suffix = file.suffix
    if suffix in (".json", ".jsonl") and draw.random() < 0.85:
        file.write_bytes(mutate_text(good.decode(), draw).encode(errors="surrogatepass"))
    elif suffix == ".safetensors" and draw.random() < 0.8:
        file.write_bytes(mutate_header(good, draw))
    else:
        file.write_bytes(mutate_bytes(good, draw))


class Watch:
    """What is written, made, renamed or removed while it is on: an audit hook, which stays for good."""

    EVENTS = (
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
    )

    def __init__(self) -> None:
        self.on, self.changes = False, list[str]()
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            flags = arguments[2]
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and arguments[0] != os.devnull:
                self.changes.append(f"open {arguments[0]}")
        elif event in self.EVENTS:
            self.changes.append(f"{event} {arguments[0]}")


WATCH = Watch()


def broken(kinds: dict[str, Kind], scratch: Path, each: int, seed: int = 0) -> list[str]:
    """What readers did other than read or refuse."""
    wrong = []
    for name, kind in kinds.items():
        folder = scratch / name.replace("/", "_")
        shutil.copytree(kind.folder, folder)
        file, draw = folder / kind.file, random.Random(f"{seed} {name}")
        good = file.read_bytes()
        for number in range(each):
            mutate(file, good, draw)
            start = time.process_time()
            WATCH.changes, WATCH.on = [], True
            try:
                kind.read(folder)
            except FlownError as error:
                if re.search(r"\w(Error|Exception)\b", str(error)) or "\n" in str(error).strip():
                    wrong.append(f"{name} #{number}: {error!s:.200}")
            except Exception as error:
                wrong.append(f"{name} #{number}: {type(error).__name__}: {error!s:.160}")
            finally:
                WATCH.on = False
            wrong += [f"{name} #{number}: {change}" for change in WATCH.changes]
            if time.process_time() - start > SECONDS:
                wrong.append(f"{name} #{number}: took {time.process_time() - start:.0f} s")
    return wrong


def test_the_watch_sees_what_is_written(tmp_path: Path) -> None:
    WATCH.changes, WATCH.on = [], True
    (tmp_path / "a").write_text("")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b").read_text()
    WATCH.on = False
    assert [change.split()[0] for change in WATCH.changes] == ["open", "os.rename"]


def test_broken_files_are_read_or_refused(kinds: dict[str, Kind], tmp_path: Path) -> None:
    assert len(kinds) * EACH >= 2000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong = broken(kinds, tmp_path, EACH)
    assert not wrong, f"{len(wrong)} of {len(kinds) * EACH}:\n" + "\n".join(wrong[:60])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "a gigabyte"


@pytest.mark.slow
def test_many_more_are(kinds: dict[str, Kind], tmp_path: Path) -> None:
    for seed in range(1, 11):
        wrong = broken(kinds, tmp_path / str(seed), 10 * EACH, seed)
        assert not wrong, "\n".join(wrong[:60])
