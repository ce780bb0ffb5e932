"""Zoos: what is on disk, splits by seed, agreement with a plain loop, resuming, rot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import flown
from flown import nets
from flown.base.errors import FlownError, TrainingError
from flown.base.files import write_json
from flown.tasks import load
from flown.zoo import RECIPES, Recipe, Zoo, recipe
from flown.zoo.train.shard import Shard, initial
from flown.zoo.train.train import layout_for, train_zoo
from flown.zoo.train.trainers import Trainer
from tests.conftest import DIGITS

QUICK = Recipe(
    name="quick", dataset="digits", learning_rate=1e-3, batch_size=64, epochs=2, keep=(1, 2)
)


def mark(folder: Path, **about: object) -> None:
    """Marks a folder as an output that was begun."""
    write_json(folder / "progress.json", {"format": "flown-run-1", **about})


def test_files_are_readable_without_the_library(zoo: flown.Zoo) -> None:
    about = json.loads((zoo.path / "zoo.json").read_text())
    assert about["layouts"][0]["architecture"]["outputs"] == 10
    (line,) = (zoo.path / "tasks.jsonl").read_text().splitlines()
    assert json.loads(line)["classes"] == list("0123456789")
    rows = [json.loads(line) for line in (zoo.path / "index.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and {row["epoch"] for row in rows} == {8, 10}
    tensors = load_file(zoo.path / rows[0]["shard"])
    assert tensors["0.weight"].shape == (24, 8, 1, 5, 5)
    assert not list(zoo.path.glob("progress*")), "scratch files are gone"


def test_split_is_by_network(zoo: flown.Zoo) -> None:
    splits: dict[int, set[str]] = {}
    for row in zoo.rows:
        splits.setdefault(row.model, set()).add(row.split)
    assert all(len(found) == 1 for found in splits.values())
    assert sum(found == {"held-out"} for found in splits.values()) == 2


def test_networks_learn_and_rows_say_how_well(zoo: flown.Zoo) -> None:
    last = zoo.select(epochs=[-1])
    batch = last.batch("digits")
    val = load("digits").val
    measured = flown.evaluate(batch, val.images, val.labels)
    stored = torch.tensor([row.val_accuracy for row in last.rows])
    assert torch.allclose(measured, stored, atol=0.8)  # one image of 143 may flip by rounding
    assert stored.mean() > 70


def test_batched_training_is_the_loop(tmp_path: Path) -> None:
    """Each network ends where it would have ended alone, with its own start and data order."""
    zoo = train_zoo(QUICK, 3, tmp_path / "zoo", held_out=1 / 3)
    images = load("digits")
    layout = layout_for(QUICK, images)
    x, y = layout.architecture.preprocess(images.train.images), images.train.labels
    row = next(r for r in zoo.rows if r.model == 1 and r.epoch == 2)
    net = nets.build("cnn-small", 1, 10, "tanh")
    net.load_state_dict(initial(layout, QUICK.init, row.seed))
    optimizer = torch.optim.Adam(net.parameters(), QUICK.learning_rate)
    for epoch in (1, 2):
        order = torch.randperm(
            len(x), generator=torch.Generator().manual_seed(row.seed * 1000 + epoch)
        )
        for rows in order[: len(x) - len(x) % 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    alone = layout.pack({k: v.detach()[None] for k, v in net.named_parameters()})[0]
    assert torch.allclose(zoo.batch("digits").vectors[zoo.rows.index(row)], alone, atol=1e-4)


def test_same_seed_same_bits_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_zoo(QUICK, 2, tmp_path / "a").batch("digits").vectors
    calls = []
    original = Shard._checkpoint

    def stop(self: Shard, engine: Trainer, epoch: int, kept: dict) -> None:  # type: ignore[type-arg]
        original(self, engine, epoch, kept)
        calls.append(epoch)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Shard, "_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt):
        train_zoo(QUICK, 2, tmp_path / "b")
    with pytest.raises(FlownError, match="add --resume"):
        Zoo.open(tmp_path / "b")
    resumed = train_zoo(QUICK, 2, tmp_path / "b", resume=True)
    assert calls == [1, 2]
    assert torch.equal(resumed.batch("digits").vectors, whole)
    with pytest.raises(FlownError, match="another recipe, models, seed, held_out;"):
        shutil.copytree(tmp_path / "b", tmp_path / "c")
        (tmp_path / "c" / "zoo.json").unlink()
        mark(tmp_path / "c")
        train_zoo(QUICK, 2, tmp_path / "c", resume=True)


def test_a_finished_zoo_goes_on_as_itself_alone(zoo: flown.Zoo) -> None:
    assert train_zoo(DIGITS, 12, zoo.path, resume=True).identity == zoo.identity
    others = {"recipe": (QUICK, 12, 0), "models": (DIGITS, 11, 0), "seed": (DIGITS, 12, 1)}
    for key, (how, models, seed) in others.items():
        with pytest.raises(FlownError, match=f"holds a run with another {key};"):
            train_zoo(how, models, zoo.path, resume=True, seed=seed)


def test_a_nan_model_is_named(zoo: flown.Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo.path, tmp_path / "zoo")
    shard = tmp_path / "zoo" / zoo.rows[0].shard
    tensors = load_file(shard)
    tensors["3.bias"][5, 0] = float("nan")
    save_file(tensors, shard)
    with pytest.raises(FlownError, match="is not what was written"):
        Zoo.open(tmp_path / "zoo").batch("digits")


def test_broken_zoos_are_named(zoo: flown.Zoo, tmp_path: Path) -> None:
    with pytest.raises(FlownError, match=r"zoo.json is missing"):
        Zoo.open(tmp_path)
    shutil.copytree(zoo.path, tmp_path / "zoo")
    shard = tmp_path / "zoo" / zoo.rows[0].shard
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(FlownError, match=r"weights-00000.safetensors: truncated"):
        Zoo.open(tmp_path / "zoo").batch("digits")
    (tmp_path / "zoo" / "index.jsonl").write_text("{}\n")
    with pytest.raises(FlownError, match=r"index.jsonl, line 1"):
        Zoo.open(tmp_path / "zoo")


def test_divergence_names_the_seed(tmp_path: Path) -> None:
    wild = QUICK.model_copy(update={"learning_rate": 1e30, "activation": "relu"})
    with pytest.raises(TrainingError, match="seed 0 diverged"):
        train_zoo(wild, 2, tmp_path / "zoo")


def test_join(zoo: flown.Zoo, tmp_path: Path) -> None:
    with pytest.raises(FlownError, match="two tasks have the id 'digits'"):
        Zoo.join([zoo, zoo], tmp_path / "twice")
    other = train_zoo(
        QUICK.model_copy(update={"dataset": "mnist5k", "max_train_images": 64}),
        2,
        tmp_path / "other",
    )
    both = Zoo.join([zoo, other], tmp_path / "both")
    assert list(both.tasks) == ["digits", "mnist5k"] and len(both.layouts) == 1
    for part, task in ((zoo, "digits"), (other, "mnist5k")):
        assert torch.equal(both.batch(task).vectors, part.batch(task).vectors)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
def test_recipes(name: str, scale: str) -> None:
    made = recipe(name, scale)
    made.check()
    kept = [*made.kept, *made.keep_steps]
    assert kept and kept == sorted(set(kept)), "what is kept is kept once, in order"
    assert made.net in nets.NETS and made.activation in nets.ACTIVATIONS


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(FlownError, match="Did you mean 'mnist-small'"):
        train_zoo("mnist-smal", 4, tmp_path)
    with pytest.raises(FlownError, match="at least 2 models"):
        train_zoo(QUICK, 0, tmp_path)
    with pytest.raises(FlownError, match="Did you mean 'digits'"):
        train_zoo(QUICK.model_copy(update={"dataset": "digit"}), 2, tmp_path / "z")
    with pytest.raises(FlownError, match=r"not within epochs 1..2"):
        train_zoo(QUICK.model_copy(update={"keep": (3,)}), 2, tmp_path / "y")


def test_joining_removes_no_zoo_that_it_reads(zoo: flown.Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo.path, tmp_path / "zoo")
    for out in (tmp_path / "zoo", tmp_path / "zoo" / ".." / "zoo"):
        with pytest.raises(FlownError, match="is one of the zoos to join"):
            Zoo.join([Zoo.open(tmp_path / "zoo")], out, overwrite=True)
    mark(tmp_path)
    with pytest.raises(FlownError, match="which is read"):
        Zoo.join([Zoo.open(tmp_path / "zoo")], tmp_path, overwrite=True)
    assert Zoo.open(tmp_path / "zoo").verify() == []


def test_an_unfinished_copy_is_known_as_ours(zoo: flown.Zoo, tmp_path: Path) -> None:
    mark(tmp_path / "zoo", joined=[zoo.identity])
    (tmp_path / "zoo" / "weights-000000.safetensors").write_bytes(b"half")
    with pytest.raises(FlownError, match="it was not finished: run its command again with --overw"):
        Zoo.open(tmp_path / "zoo")
    made = Zoo.join([zoo], tmp_path / "zoo", overwrite=True)
    assert made.verify() == [] and not (tmp_path / "zoo" / "progress.json").exists()
