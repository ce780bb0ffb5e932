"""Imports: others' checkpoints in, nothing run, nothing lost without a word."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flown.base import trust
from flown.base.errors import FlownError
from flown.nets.architecture import Architecture
from flown.report.imports import import_lines
from flown.tasks.task import Task
from flown.zoo import Zoo
from flown.zoo.imports import job as imports
from flown.zoo.imports.checkpoints import (
    Skipped,
    from_checkpoints,
    from_matrix,
    from_modelzoos,
)

State = dict[str, Tensor]
TASK = Task(id="digits", dataset="digits", classes=tuple("0123456789"))
DIGITS = Architecture(
    net="cnn-small", channels=1, size=28, outputs=10, activation="tanh", mean=0.5, std=0.5
)


def normed(channels: int, classes: int) -> nn.Module:
    """A network with buffers, and a name of its own for every tensor."""
    body = nn.Sequential(nn.Linear(channels, 4), nn.BatchNorm1d(4))
    return nn.Sequential(body, nn.Linear(4, classes))


NORMED = trust.allow(f"{__name__}:normed")


SMALL = DIGITS.model_copy(update={"net": NORMED, "outputs": 3, "size": 1, "channels": 2})
THREE = Task(id="three", dataset="three", classes=("a", "b", "c"))


def state(seed: int, architecture: Architecture = DIGITS) -> State:
    module = architecture.build()
    generator = torch.Generator().manual_seed(seed)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.uniform_(-1, 1, generator=generator)
    return {name: value.clone() for name, value in module.state_dict().items()}


def save(value: Any, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(value, path) if path.suffix == ".safetensors" else torch.save(value, path, **options)


def same(zoo: Zoo, place: int, expected: State) -> bool:
    layout = zoo.layouts[0]
    wanted = layout.pack({name: expected[name][None] for name in layout.names})[0]
    return torch.equal(zoo.read([place])[0], wanted)


def report(out: Path) -> Any:
    return json.loads((out / "import.json").read_text())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two models: one good, one to be spoilt by the test."""
    save(state(1), tmp_path / "source" / "good.pt")
    return tmp_path / "source"


def reason(source: Path, **options: Any) -> Skipped:
    """The one thing that is skipped, the good model being imported."""
    zoo, skipped = from_checkpoints(source, DIGITS, TASK, source.parent / "zoo", **options)
    assert len(zoo) == 1 and len(skipped) == 1
    assert report(zoo.path)["skipped"] == [skipped[0]._asdict()]
    return skipped[0]


def test_a_folder_of_checkpoints_comes_back_exactly(tmp_path: Path) -> None:
    names = [
        "a.pt",
        "b.pth",
        "c.safetensors",
        "run/epoch_2.pt",
        "run/epoch_10.pt",
        "run/d.bin",
        "hf/checkpoint-500/pytorch_model.bin",
        "hf/checkpoint-1000/pytorch_model.bin",
    ]
    for seed, name in enumerate(names):
        save(state(seed), tmp_path / "source" / name)
    save(state(99), tmp_path / "source" / ".hidden.pt")
    zoo, skipped = from_checkpoints(tmp_path / "source", DIGITS, TASK, tmp_path / "zoo")
    assert skipped == [] and zoo.verify() == []
    expected = [6, 7, 3, 4, 0, 1, 2, 5]  # epochs of one model first, in their order
    assert all(same(zoo, place, state(seed)) for place, seed in enumerate(expected))
    assert [row.model for row in zoo.rows] == [0, 0, 1, 1, 2, 3, 4, 5]
    assert [row.epoch for row in zoo.rows] == [500, 1000, 2, 10, 0, 0, 0, 0]
    assert {(row.train_accuracy, row.val_accuracy) for row in zoo.rows} == {(None, None)}
    assert sum(row.split == "held-out" for row in {r.model: r for r in zoo.rows}.values()) == 1
    assert len({(row.model, row.split) for row in zoo.rows}) == 6, "a model is in one split"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_files(tmp_path: Path, suffix: str) -> None:
    tensors, source = state(1), tmp_path / "source"
    parts = {name: f"model-{1 + (i > 3)}-of-2.{suffix}" for i, name in enumerate(tensors)}
    for part in set(parts.values()):
        save({name: tensors[name] for name in tensors if parts[name] == part}, source / part)
    index = source / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": parts}))
    zoo, skipped = from_checkpoints(source, DIGITS, TASK, tmp_path / "zoo")
    assert len(zoo) == 1 and skipped == [] and same(zoo, 0, tensors)
    (source / f"model-2-of-2.{suffix}").unlink()
    with pytest.raises(FlownError, match=r"index.json: its part 'model-2-of-2\.\w+' is missing"):
        from_checkpoints(source, DIGITS, TASK, tmp_path / "zoo", overwrite=True)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(parts, "../elsewhere.bin")}))
    with pytest.raises(FlownError, match="is not a file beside it"):
        from_checkpoints(source, DIGITS, TASK, tmp_path / "zoo", overwrite=True)


@pytest.mark.parametrize("kind", ["yaml", "json", "dict"])
def test_mapping(tmp_path: Path, kind: str) -> None:
    names = {"conv.weight": "0.weight", "module.conv.bias": "0.bias"}  # with a prefix or without
    mapping = {**names, "extra": None}
    theirs = {ours: name.removeprefix("module.") for name, ours in names.items()}
    tensors = {f"module.{theirs.get(name, name)}": value for name, value in state(1).items()}
    save(tensors | {"module.extra": torch.zeros(3)}, tmp_path / "source" / "a.pt")
    file = tmp_path / f"names.{kind}"
    file.write_text(json.dumps(mapping))
    given = mapping if kind == "dict" else file
    zoo, _ = from_checkpoints(tmp_path / "source", DIGITS, TASK, tmp_path / "zoo", mapping=given)
    assert same(zoo, 0, state(1)) and report(zoo.path)["mapping"] == mapping
    with pytest.raises(FlownError, match=r"'module\.conv\.weight' is not the network's, whose"):
        from_checkpoints(tmp_path / "source", DIGITS, TASK, tmp_path / "zoo2")
    with pytest.raises(FlownError, match=r"Did you mean '0\.weight'"):
        from_checkpoints(
            tmp_path / "source", DIGITS, TASK, tmp_path / "zoo2", mapping={"a": "0.weigh"}
        )
    with pytest.raises(
        FlownError, match=r"'module\.conv\.weight' and 'module\.conv\.bias' both become"
    ):
        from_checkpoints(
            tmp_path / "source",
            DIGITS,
            TASK,
            tmp_path / "zoo2",
            mapping={"conv.weight": "0.bias", "conv.bias": "0.bias"},
        )


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_files_are_skipped(source: Path, name: str, share: float) -> None:
    save(state(2), source / name)
    whole = (source / name).read_bytes()
    (source / name).write_bytes(whole[: int(len(whole) * share)])
    skipped = reason(source)
    assert skipped.path == name and skipped.reason.startswith("truncated")


def spoil(bias: Tensor) -> State:
    return {**state(2), "0.bias": bias}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (spoil(torch.full((8,), float("nan"))), "'0.bias' holds NaN or Inf"),
        (spoil(torch.full((8,), 1e300, dtype=torch.float64)), "'0.bias' holds NaN or Inf"),
        (spoil(torch.ones(7)), "'0.bias' is (7,), expected (8,)"),
        (spoil(torch.ones(8).int()), "'0.bias' holds int32"),
        (spoil(torch.ones(8).to_sparse()), "'0.bias' is sparse"),
        (spoil(torch.ones(8, device="meta")), "has no data"),
        ({**state(2), "more": torch.ones(1)}, "'more' is not the network's"),
        (spoil(3), "'0.bias' is of type int, expected a tensor"),  # type: ignore[arg-type]
        (dict(list(state(2).items())[1:]), "'0.weight' is missing"),
        ({"state": {}, "param_groups": [1]}, "no state dict: no tensor"),
        ([1, 2], "no state dict: holds a list"),
        (state(1), "exactly those of good.pt"),
    ],
)
def test_what_is_not_the_networks_is_named(source: Path, value: Any, expected: str) -> None:
    save(value, source / "other.pt")
    skipped = reason(source)
    assert skipped.path == "other.pt" and expected in skipped.reason


def test_mixed_classes_say_both_numbers(source: Path) -> None:
    save(state(2, DIGITS.model_copy(update={"outputs": 2})), source / "two.pt")
    skipped = reason(source)
    assert (
        skipped.path == "two.pt" and "'11.weight' is (2, 20), expected (10, 20)" in skipped.reason
    )
    assert "a network of 2 classes, the task has 10" in skipped.reason


def test_buffers_are_dropped_and_counted(tmp_path: Path) -> None:
    for seed in range(3):
        save(state(seed, SMALL), tmp_path / "source" / f"{seed}.pt")
    zoo, skipped = from_checkpoints(tmp_path / "source", SMALL, THREE, tmp_path / "zoo")
    assert skipped == [] and same(zoo, 2, state(2, SMALL))
    dropped = ["0.1.num_batches_tracked", "0.1.running_mean", "0.1.running_var"]
    assert report(zoo.path)["dropped_buffers"] == dict.fromkeys(dropped, 3)


def test_half_precision_is_converted_and_counted(tmp_path: Path) -> None:
    halves = {name: value.half() for name, value in state(1).items()}
    save(halves, tmp_path / "source" / "half.safetensors")
    zoo, _ = from_checkpoints(tmp_path / "source", DIGITS, TASK, tmp_path / "zoo")
    assert same(zoo, 0, {name: value.float() for name, value in halves.items()})
    assert report(zoo.path)["checkpoints"]["converted from float16"] == 1


def test_a_copy_beside_its_epochs_is_no_model(tmp_path: Path) -> None:
    """Else the best epoch of a training model could be held out."""
    for epoch in (1, 2):
        save(state(epoch), tmp_path / "source" / f"run_epoch_{epoch}.pt")
    save(state(2), tmp_path / "source" / "best.pt")
    zoo, skipped = from_checkpoints(tmp_path / "source", DIGITS, TASK, tmp_path / "zoo")
    assert [(row.model, row.epoch) for row in zoo.rows] == [(0, 1), (0, 2)]
    assert skipped == [Skipped("best.pt", "its weights are exactly those of run_epoch_2.pt")]


def test_shards_are_written_as_they_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(7):
        save(state(seed), tmp_path / "source" / f"{seed}.pt")
    held: list[int] = []
    original = imports._Writer.add

    def add(self: imports._Writer, *arguments: Any) -> None:
        original(self, *arguments)
        held.append(len(self.vectors))

    monkeypatch.setattr(imports, "_ROWS", 3)
    monkeypatch.setattr(imports._Writer, "add", add)
    zoo, _ = from_checkpoints(tmp_path / "source", DIGITS, TASK, tmp_path / "zoo")
    assert held == [1, 2, 0, 1, 2, 0, 1]
    assert [row.offset for row in zoo.rows] == [0, 1, 2, 0, 1, 2, 0]
    assert len(list(zoo.path.glob("weights-*"))) == 3
    assert all(same(zoo, seed, state(seed)) for seed in range(7))


def test_same_files_same_bytes(tmp_path: Path) -> None:
    for seed in (3, 1, 2):
        save(state(seed), tmp_path / "source" / f"{seed}.pt")
    (tmp_path / "source" / "broken.pt").write_bytes(b"?")
    for out in ("a", "b"):
        from_checkpoints(tmp_path / "source", DIGITS, TASK, tmp_path / out, seed=5)
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == [
        "import.json",
        "index.jsonl",
        "tasks.jsonl",
        "weights-00000.safetensors",
        "zoo.json",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_interrupted_import_is_no_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2):
        save(state(seed), tmp_path / "source" / f"{seed}.pt")
    arguments = tmp_path / "source", DIGITS, TASK, tmp_path / "zoo"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(imports, "_ROWS", 1)
        patch.setattr(
            imports.Import, "_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        from_checkpoints(*arguments)
    assert list((tmp_path / "zoo").glob("weights-*")), "it had begun"
    with pytest.raises(FlownError, match="no zoo here"):
        Zoo.open(tmp_path / "zoo")
    with pytest.raises(FlownError, match="exists already"):
        from_checkpoints(*arguments)
    zoo, _ = from_checkpoints(*arguments, overwrite=True)
    assert len(zoo) == 2 and len(list(zoo.path.glob("weights-*"))) == 1


def test_nothing_to_import(tmp_path: Path) -> None:
    empty = tmp_path / "source"
    for import_, message in [
        (from_checkpoints, "no .bin, .ckpt, .pt, .pth"),
        (from_modelzoos, "no trial"),
    ]:
        with pytest.raises(FlownError, match="no such folder"):
            import_(tmp_path / "nowhere", DIGITS, TASK, tmp_path / "zoo")
        empty.mkdir(exist_ok=True)
        with pytest.raises(FlownError, match=message):
            import_(empty, DIGITS, TASK, tmp_path / "zoo")
    for name in ("a", "b", "c", "d", "e"):
        (empty / f"{name}.pt").write_bytes(b"?")
    with pytest.raises(FlownError, match=r"a\.pt: truncated.*c\.pt: truncated.*\(and 2 more\)"):
        from_checkpoints(empty, DIGITS, TASK, tmp_path / "zoo")
    assert not (tmp_path / "zoo").exists()
    for out in (empty, empty / "zoo", tmp_path):
        with pytest.raises(FlownError, match="overlaps"):
            from_checkpoints(empty, DIGITS, TASK, out, overwrite=True)
    with pytest.raises(FlownError, match="Did you mean 'cnn-small'"):
        from_checkpoints(
            empty, DIGITS.model_copy(update={"net": "cnn-smal"}), TASK, tmp_path / "zoo"
        )
    with pytest.raises(FlownError, match="held_out"):
        from_checkpoints(empty, DIGITS, TASK, tmp_path / "zoo", held_out=1.0)


def trial(
    folder: Path,
    seed: int,
    epochs: dict[str, dict[str, float]],
    params: dict[str, Any] | None = None,
    prefix: str = "module_list.",
) -> None:
    """A trial as Model Zoos leaves it; `epochs` are results by the checkpoint folder's spelling."""
    lines = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in epochs.items():
        epoch = int(name.removeprefix("checkpoint_"))
        tensors = {prefix + key: value for key, value in state(seed + epoch).items()}
        save(tensors, folder / name / "checkpoints")
        lines.append(json.dumps({"training_iteration": epoch, **result}))
    (folder / "result.json").write_text("\n".join(lines) + "\n")
    if params is not None:
        (folder / "params.json").write_text(json.dumps(params))


@pytest.fixture
def modelzoo(tmp_path: Path) -> Path:
    zoo = tmp_path / "source" / "NN_tune_zoo_mnist_uniform"
    accuracies = {"train_acc": 0.5, "validation_acc": 0.25, "test_acc": 0.75}
    trial(
        zoo / "NN_a",
        100,
        {"checkpoint_000002": accuracies, "checkpoint_000010": accuracies},
        {"seed": 7, "model::nlin": "tanh"},
    )
    trial(zoo / "NN_b", 200, {"checkpoint_2": {"val_acc": 0.125}, "checkpoint_10": {}}, {})
    return tmp_path / "source"


def test_modelzoos(modelzoo: Path, tmp_path: Path) -> None:
    zoo, skipped = from_modelzoos(modelzoo, DIGITS, TASK, tmp_path / "zoo")
    assert skipped == [] and [row.epoch for row in zoo.rows] == [2, 10, 2, 10]
    assert all(same(zoo, i, state(seed)) for i, seed in enumerate((102, 110, 202, 210)))
    assert [(row.model, row.seed) for row in zoo.rows] == [(0, 7), (0, 7), (1, 1), (1, 1)]
    accuracies = [(row.train_accuracy, row.val_accuracy) for row in zoo.rows]
    assert accuracies == [(50.0, 25.0), (50.0, 25.0), (None, 12.5), (None, None)]
    assert report(zoo.path)["renamed"]["module_list.0.weight"] == "0.weight"
    some, _ = from_modelzoos(modelzoo, DIGITS, TASK, tmp_path / "some", epochs=[10])
    assert [row.epoch for row in some.rows] == [10, 10]
    with pytest.raises(FlownError, match="NN_a: has no checkpoint of epoch 3"):
        from_modelzoos(modelzoo, DIGITS, TASK, tmp_path / "none", epochs=[3])
    with pytest.raises(FlownError, match="add --format modelzoos"):
        from_checkpoints(modelzoo, DIGITS, TASK, tmp_path / "none")


def test_test_accuracy_is_never_taken(modelzoo: Path, tmp_path: Path) -> None:
    trial(modelzoo / "NN_c", 300, {"checkpoint_000002": {"test_acc": 0.9, "train_acc": 0.8}})
    zoo, _ = from_modelzoos(modelzoo, DIGITS, TASK, tmp_path / "zoo")
    row = zoo.rows[0]  # "NN_c" is before "NN_tune_zoo_..."
    assert same(zoo, 0, state(302)) and (row.train_accuracy, row.val_accuracy) == (80.0, None)
    assert report(zoo.path)["checkpoints"]["with test_acc only, not taken"] == 1
    assert all(row.val_accuracy not in (75.0, 90.0) for row in zoo.rows)


def test_trials_lack_files(modelzoo: Path, tmp_path: Path) -> None:
    trials = modelzoo / "NN_tune_zoo_mnist_uniform"
    trial(trials / "NN_c", 300, {"checkpoint_000002": {}, "checkpoint_2": {}})
    trial(trials / "NN_d", 400, {}, {"seed": 1})
    trial(trials / "NN_e", 500, {"checkpoint_3": {}}, {"model::nlin": "gelu"})
    (trials / "NN_b" / "checkpoint_10" / "checkpoints").unlink()
    (trials / "NN_a" / "params.json").unlink()
    with (trials / "NN_a" / "result.json").open("a") as file:
        file.write('{"training_iteration": 2, "val_acc": NaN}\n{"training_iter')
    zoo, skipped = from_modelzoos(modelzoo, DIGITS, TASK, tmp_path / "zoo")
    assert [(row.epoch, row.val_accuracy) for row in zoo.rows] == [
        (2, None),
        (10, 25.0),
        (2, 12.5),
        (2, None),
    ]
    reasons = {one.path.partition("/")[2]: one.reason for one in skipped}
    assert reasons == {
        "NN_b/checkpoint_10": "holds no file `checkpoints`",
        "NN_c/checkpoint_2": "the same epoch as checkpoint_000002",
        "NN_d": "has no checkpoint",
        "NN_e": "its activation is 'gelu', 'tanh' was given",
    }
    notes = "\n".join(report(zoo.path)["notes"])
    assert "NN_a: result.json, line 4: not a result" in notes
    assert "NN_a: no readable params.json" in notes


def test_modelzoos_names_by_the_order_of_shapes(tmp_path: Path) -> None:
    tensors = state(1, SMALL)
    theirs = dict(
        zip(
            [
                "fc.weight",
                "fc.bias",
                "bn.weight",
                "bn.bias",
                "bn.running_mean",
                "bn.running_var",
                "bn.num_batches_tracked",
                "head.weight",
                "head.bias",
            ],
            tensors.values(),
            strict=True,
        )
    )
    save(theirs, tmp_path / "source" / "NN_a" / "checkpoint_1" / "checkpoints")
    backwards = dict(reversed(theirs.items()))
    save(backwards, tmp_path / "source" / "NN_b" / "checkpoint_1" / "checkpoints")
    zoo, skipped = from_modelzoos(tmp_path / "source", SMALL, THREE, tmp_path / "zoo")
    assert len(zoo) == 1 and same(zoo, 0, tensors)
    about = report(zoo.path)
    assert about["checkpoints"]["named by the order of shapes"] == 1
    assert about["renamed"]["bn.weight"] == "0.1.weight"
    assert skipped[0].path.startswith("NN_b") and "is not the network's" in skipped[0].reason


def test_splits_are_a_trained_zoos(tmp_path: Path) -> None:
    """The same number of models and seed hold out the same models, however they came about."""
    from flown.zoo.train.shard import splits

    for seed in range(6):
        save(state(seed), tmp_path / "source" / f"{seed}.pt")
    zoo, _ = from_checkpoints(
        tmp_path / "source", DIGITS, TASK, tmp_path / "zoo", seed=4, held_out=1 / 3
    )
    expected = splits(6, 4, 1 / 3)
    assert [row.split for row in zoo.rows] == expected


def test_links_are_followed_and_the_rest_is_named(tmp_path: Path) -> None:
    runs, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    save(state(1), runs / "a" / "net.PT")
    save(state(2), elsewhere / "b" / "net.pth.tar")
    (runs / "b").symlink_to(elsewhere / "b")
    (elsewhere / "b" / "again").symlink_to(runs)
    (runs / "gone.pt").symlink_to(tmp_path / "nowhere")
    (runs / "notes.txt").write_text("?")
    zoo, skipped = from_checkpoints(runs, DIGITS, TASK, tmp_path / "zoo")
    assert len(zoo) == 2 and skipped == [] and zoo.verify() == []
    about = report(zoo.path)
    assert about["files not used"] == ["gone.pt", "notes.txt"]
    assert import_lines(about) == ["2 files not used: gone.pt, notes.txt"]


def grown(seed: int, epoch: int) -> State:
    """A network after some epochs, near to what it was before."""
    return {name: value + 1e-3 * epoch for name, value in state(seed).items()}


NAMED = {
    "metrics": ("run{}", "epoch={:02d}-val_loss={figure:.3f}.ckpt"),
    "one folder": ("", "run{}_ep{}_acc{figure:.1f}.pt"),
    "steps": ("run{}", "checkpoint-{}00/model.pt"),
}


@pytest.mark.parametrize("scheme", NAMED)
def test_epochs_of_a_run_are_one_model(tmp_path: Path, scheme: str) -> None:
    folder, name = NAMED[scheme]
    for seed in range(6):
        for epoch in (1, 2, 3):
            numbers = (seed, epoch) if "{}_ep" in name else (epoch,)
            file = name.format(*numbers, figure=9 / epoch + seed / 100)
            save(grown(seed, epoch), tmp_path / "source" / folder.format(seed) / file)
    zoo, _ = from_checkpoints(tmp_path / "source", DIGITS, TASK, tmp_path / "zoo")
    assert len({row.model for row in zoo.rows}) == 6
    assert not report(zoo.path)["held-out networks are neighbours"]


def test_figures_tell_models_apart_where_epochs_would_meet(tmp_path: Path) -> None:
    for seed, rate in enumerate((0.1, 0.01)):
        for epoch in (1, 2):
            save(grown(seed, epoch), tmp_path / "source" / f"rate{rate}_epoch_{epoch}.pt")
    zoo, _ = from_checkpoints(tmp_path / "source", DIGITS, TASK, tmp_path / "zoo")
    assert sorted((row.model, row.epoch) for row in zoo.rows) == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_a_pattern_groups_what_names_do_not(tmp_path: Path) -> None:
    for seed in range(6):
        for epoch in (1, 2, 3):
            save(grown(seed, epoch), tmp_path / "source" / f"{seed}" / f"{epoch:04d}.pt")
    save(state(9), tmp_path / "source" / "best.pt")
    source = tmp_path / "source"
    zoo, _ = from_checkpoints(source, DIGITS, TASK, tmp_path / "guessed")
    about = report(zoo.path)
    assert about["models"] == 19 and about["held-out networks are neighbours"]
    assert any("--pattern" in line for line in import_lines(about))
    pattern = r"(?P<model>\d+)/(?P<epoch>\d+)"
    zoo, _ = from_checkpoints(source, DIGITS, TASK, tmp_path / "zoo", pattern=pattern)
    about = report(zoo.path)
    assert about["models"] == 6 and about["files not used"] == ["best.pt"]
    assert {row.epoch for row in zoo.rows} == {1, 2, 3} and import_lines(about)
    for pattern, message in (("(", "no regular expression"), ("a", "names no model")):
        with pytest.raises(FlownError, match=message):
            from_checkpoints(source, DIGITS, TASK, tmp_path / "none", pattern=pattern)
    with pytest.raises(FlownError, match=r"finds nothing in its files' paths, as 'best\.pt'"):
        from_checkpoints(source, DIGITS, TASK, tmp_path / "none", pattern="(?P<model>x)")


def test_pixels_scaled_by_channel(tmp_path: Path) -> None:
    means = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    colour = DIGITS.model_copy(update={"channels": 3, **means})
    images = torch.randint(256, (5, 3, 28, 28), dtype=torch.uint8)
    units = [torch.tensor(means[key])[:, None, None] for key in ("mean", "std")]
    wanted = (images / 255 - units[0]) / units[1]
    torch.testing.assert_close(colour.preprocess(images), wanted)
    torch.testing.assert_close(
        colour.preprocess(images[:, :1]), (images[:, :1] / 255 - units[0]) / units[1]
    )
    save(state(1, colour), tmp_path / "source" / "a.pt")
    zoo, _ = from_checkpoints(tmp_path / "source", colour, TASK, tmp_path / "zoo")
    assert Zoo.open(zoo.path).layouts[0].architecture == colour
    with pytest.raises(FlownError, match="mean has 3 numbers, images 1 channels"):
        Architecture.parse(colour.model_dump() | {"channels": 1})
    with pytest.raises(FlownError, match="std of pixels is 0"):
        Architecture.parse(DIGITS.model_dump() | {"std": 0})


def test_a_subset_comes_with_its_rest(tmp_path: Path) -> None:
    """As p-diff keeps them: statistics too, and the whole network in a file of its own."""
    whole = state(0, SMALL)
    subset = [name for name in whole if name.startswith("0.1.")]
    save({"model": whole}, tmp_path / "source" / "pretrained.pth")
    for seed in range(1, 5):
        some = {name: state(seed, SMALL)[name] for name in subset}
        save(some, tmp_path / "source" / f"{seed}_acc0.{seed}.pth")
    save(state(9, SMALL), tmp_path / "source" / "whole.pth")
    rest = tmp_path / "source" / "pretrained.pth"
    zoo, skipped = from_checkpoints(tmp_path / "source", SMALL, THREE, tmp_path / "zoo", rest=rest)
    assert [one.path for one in skipped] == ["whole.pth"] and len(zoo) == 4
    batch = zoo.batch("three")
    assert batch.layout.names == ("0.1.weight", "0.1.bias")
    assert torch.equal(batch.frozen["1.weight"], whole["1.weight"])
    assert torch.equal(batch.frozen["0.1.running_mean"], whole["0.1.running_mean"])
    assert torch.equal(batch.module(1).state_dict()["0.1.bias"], state(2, SMALL)["0.1.bias"])
    with pytest.raises(FlownError, match="nowhere: no such file"):
        from_checkpoints(
            tmp_path / "source", SMALL, THREE, tmp_path / "b", rest=tmp_path / "nowhere"
        )
    with pytest.raises(FlownError, match=r"1_acc0\.1\.pth: tensor '0\.0\.weight' is missing"):
        other = tmp_path / "source" / "1_acc0.1.pth"
        from_checkpoints(tmp_path / "source", SMALL, THREE, tmp_path / "b", rest=other)
    (tmp_path / "whole").mkdir()
    save(state(9, SMALL), tmp_path / "whole" / "a.pth")
    with pytest.raises(FlownError, match="holds the whole network, which needs no rest"):
        from_checkpoints(tmp_path / "whole", SMALL, THREE, tmp_path / "b", rest=rest)


def matrix(folder: Path, count: int) -> None:
    folder.mkdir()
    states = [state(seed) for seed in range(count)]
    np.save(
        folder / "weights.npy",
        np.stack([torch.cat([x.flatten() for x in one.values()]).numpy() for one in states]),
    )
    lines, at = [",varname,start_idx,end_idx,shape"], 0
    for i, (name, tensor) in enumerate(states[0].items()):
        lines.append(f'{i},{name},{at},{at + tensor.numel()},"{tuple(tensor.shape)}"')
        at += tensor.numel()
    (folder / "layout.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    rows = [f"{i // 2},{80 + i},0.5,0.9{i}" for i in range(count)]
    text = "modelid,step,train_accuracy,test_accuracy\n" + "\n".join(rows)
    (folder / "metrics.csv.gz").write_bytes(gzip.compress(text.encode()))


def test_a_zoo_in_one_matrix(tmp_path: Path) -> None:
    matrix(tmp_path / "source", 6)
    with pytest.raises(FlownError, match=r"weights\.npy looks like .* add --format matrix"):
        from_checkpoints(tmp_path / "source", DIGITS, TASK, tmp_path / "zoo")
    zoo, skipped = from_matrix(tmp_path / "source", DIGITS, TASK, tmp_path / "zoo")
    assert skipped == [] and all(same(zoo, i, state(i)) for i in range(6))
    assert [(row.model, row.epoch) for row in zoo.rows[:3]] == [(0, 80), (0, 81), (1, 82)]
    assert {(row.train_accuracy, row.val_accuracy) for row in zoo.rows} == {(50.0, None)}
    assert report(zoo.path)["checkpoints"]["with test_acc only, not taken"] == 6
    layout = tmp_path / "source" / "layout.csv"
    layout.write_text(layout.read_text("utf-8-sig").replace(",0,200,", ",0,2000,"))
    with pytest.raises(FlownError, match=r"line 2: '0\.weight' .* does not lie at 0 to 2000"):
        from_matrix(tmp_path / "source", DIGITS, TASK, tmp_path / "none")
    (tmp_path / "source" / "metrics.csv.gz").write_bytes(b"?")
    with pytest.raises(FlownError, match=r"metrics\.csv\.gz: cannot be read|layout"):
        from_matrix(tmp_path / "source", DIGITS, TASK, tmp_path / "none")
