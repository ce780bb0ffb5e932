"""Fine-tuning: the zoo's training and torch's own, schedules, resuming, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flown
from flown import cli
from flown.base.errors import FlownError, TrainingError
from flown.measure.finetune import FinetuneConfig, _Files, finetune, read_points
from flown.weights.batch import WeightBatch
from flown.zoo import Recipe
from flown.zoo.train.shard import Plan, initial
from tests import examples
from tests.test_kill import survives

SHORT = FinetuneConfig(epochs=2, batch_size=16, learning_rate=3e-3, test_at=(0,))


def torch_loop(
    batch: WeightBatch,
    i: int,
    images: flown.tasks.ImageData,
    config: FinetuneConfig,
    rates: list[float],
) -> tuple[Tensor, list[float]]:
    """One network by torch's own modules, in float64; `rates` of every step."""
    net = batch.module(i).double().train()
    optimizer = torch.optim.Adam(net.parameters(), weight_decay=config.weight_decay)
    x = batch.preprocess(images.train.images).double()
    losses, step = [], 0
    for epoch in range(1, config.epochs + 1):
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + i) * 1_000 + epoch)
        order = torch.randperm(len(x), generator=generator)
        found = []
        for rows in order[: len(x) - len(x) % config.batch_size].split(config.batch_size):
            optimizer.param_groups[0]["lr"] = rates[step]
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x[rows]), images.train.labels[rows])
            loss.backward()
            optimizer.step()
            found.append(loss.item())
            step += 1
        losses.append(sum(found) / len(found))
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach(), losses


@pytest.mark.parametrize("channels", [1, 3])  # grey images for networks of colour ones
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": "cosine", "warmup": 0.5, "weight_decay": 1e-2},
        {"schedule": "piecewise", "milestones": (0.5, 1.5), "gamma": 0.2, "seed": 3},
    ],
)
def test_networks_train_as_torch_trains_them(settings: dict[str, object], channels: int) -> None:
    config = FinetuneConfig.parse(SHORT.model_dump() | settings)
    batch, images = examples.networks(2, channels=channels), examples.images("turned")
    result = finetune(batch, images, config)
    steps = len(images.train) // config.batch_size
    rates = [config.learning_rate * float(factor) for factor in config.scale(steps)]
    for i in range(2):
        expected, losses = torch_loop(batch, i, images, config, rates)
        assert [float(p.loss[i]) for p in result.points[1:]] == pytest.approx(losses, abs=1e-4)  # type: ignore[index]
        moved = (result.networks.vectors[i] - batch.vectors[i]).double()
        assert F.cosine_similarity(moved, expected - batch.vectors[i], dim=0) > 0.9999


def test_fresh_networks_become_the_zoo_bit_for_bit(tmp_path: Path) -> None:
    recipe = Recipe(
        name="r",
        dataset="digits",
        learning_rate=3e-3,
        weight_decay=1e-3,
        batch_size=16,
        epochs=3,
        keep=(1, 3),
        init="kaiming-uniform",
    )
    images = examples.images("digits")
    zoo = flown.train_zoo(recipe, 2, tmp_path / "zoo", seed=5, images=images)
    layout, plan = zoo.layout("digits"), Plan(recipe, 2, 5, 0.5)
    starts = [initial(layout, recipe.init, plan.model_seed(i)) for i in range(2)]
    fresh = WeightBatch(
        layout, layout.pack({k: torch.stack([s[k] for s in starts]) for k in layout.names})
    )
    config = FinetuneConfig(epochs=3, learning_rate=3e-3, weight_decay=1e-3, batch_size=16, seed=5)
    result = finetune(fresh, images, config)
    assert torch.equal(result.networks.vectors, zoo.select(epochs=[3]).batch("digits").vectors)
    first = zoo.select(epochs=[1]).rows
    for i in range(2):
        stored = next(row for row in first if row.model == i).val_accuracy
        assert float(result.points[1].val[i]) == pytest.approx(stored, abs=1e-3)


def test_schedules() -> None:
    piecewise = FinetuneConfig(epochs=4, schedule="piecewise", milestones=(1, 2.5), gamma=0.5)
    assert piecewise.scale(2).tolist() == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    warm = FinetuneConfig(epochs=4, warmup=2).scale(2)
    assert warm.tolist() == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    cosine = FinetuneConfig(epochs=4, schedule="cosine").scale(2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for factor in cosine:
        assert float(factor) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torchs.step()


def test_what_is_measured_and_written(tmp_path: Path) -> None:
    batch, images = examples.networks(3), examples.images("turned")
    result = finetune(batch, images, SHORT, out=tmp_path / "nets.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nets.json", "nets.safetensors"]
    stored, points = (
        WeightBatch.load(tmp_path / "nets.safetensors"),
        read_points(tmp_path / "nets.json"),
    )
    assert torch.equal(stored.vectors, result.networks.vectors)
    assert stored.task is not None
    assert stored.task.id == "turned" and stored.task.classes == images.classes
    assert [p.epoch for p in points] == [0, 1, 2]
    assert [p.test is not None for p in points] == [True, False, True]
    assert points[0].loss is None and points[1].loss is not None
    for point, networks in ((points[0], batch), (points[2], stored)):
        for name, found in (("val", point.val), ("test", point.test)):
            part = getattr(images, name)
            assert torch.equal(found, flown.evaluate(networks, part.images, part.labels))
    content = json.loads((tmp_path / "nets.json").read_text())
    last = content["points"][2]["test"]
    assert last["mean"] == pytest.approx(sum(last["all"]) / 3)
    again = finetune(batch, images, SHORT, out=tmp_path / "nets.safetensors", resume=True)
    assert torch.equal(again.networks.vectors, stored.vectors)


def test_a_networks_course_depends_on_its_place_alone() -> None:
    batch, images = examples.networks(3), examples.images("digits")
    whole, part = finetune(batch, images, SHORT), finetune(batch[:2], images, SHORT)
    assert torch.equal(whole.networks.vectors[:2], part.networks.vectors)
    other = finetune(batch[:2], images, SHORT.model_copy(update={"seed": 1}))
    assert not torch.equal(other.networks.vectors, part.networks.vectors)


def test_resuming_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, images, calls = examples.networks(2), examples.images("digits"), []
    config = SHORT.model_copy(update={"epochs": 3, "schedule": "cosine"})
    whole = finetune(batch, images, config, out=tmp_path / "a.safetensors")
    keep = _Files.keep

    def stop(self: _Files, run: object) -> None:
        keep(self, run)  # type: ignore[arg-type]
        calls.append(run)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(_Files, "keep", stop)
    out = tmp_path / "b.safetensors"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            finetune(batch, images, config, out=out, resume=True)
    with pytest.raises(FlownError, match="exists already"):
        finetune(batch, images, config, out=out)
    with pytest.raises(FlownError, match="of other networks, data or settings"):
        finetune(batch, images, SHORT, out=out, resume=True)
    resumed = finetune(batch, images, config, out=out, resume=True)
    assert len(calls) == 4
    assert torch.equal(resumed.networks.vectors, whole.networks.vectors)
    a, b = ((tmp_path / f"{name}.json").read_text() for name in "ab")
    assert a == b


KILLED = """
import sys
from pathlib import Path
from flown.measure.finetune import FinetuneConfig, finetune
from tests import examples
config = FinetuneConfig(epochs=400, batch_size=16, learning_rate=1e-4, schedule="cosine")
finetune(examples.networks(4), examples.images("digits"), config, resume=True,
         out=Path(sys.argv[1]) / "nets.safetensors")
"""


@pytest.mark.slow
def test_killed_it_resumes_to_the_same_bits(tmp_path: Path) -> None:
    survives(KILLED, tmp_path / "whole", tmp_path / "killed", times=5)
    whole, killed = (
        WeightBatch.load(tmp_path / name / "nets.safetensors").vectors
        for name in ("whole", "killed")
    )
    assert torch.equal(whole, killed)
    one, two = ((tmp_path / name / "nets.json").read_text() for name in ("whole", "killed"))
    assert one == two


def test_subsets_with_batchnorm(tmp_path: Path) -> None:
    recipe = Recipe(
        name="n",
        dataset="digits",
        net="tests.examples:ConvNorm",
        size=10,
        activation="relu",
        subset="last-2-norms",
        base_epochs=2,
        learning_rate=3e-3,
        batch_size=16,
        epochs=1,
        keep=(1,),
    )
    zoo = flown.train_zoo(recipe, 2, tmp_path / "zoo", images=examples.images("digits"))
    images, batch = examples.images("turned"), zoo.batch("digits")
    result = finetune(
        batch,
        images,
        FinetuneConfig(epochs=10, learning_rate=2e-2, batch_size=16),
        out=tmp_path / "nets.safetensors",
    )
    tuned = WeightBatch.load(tmp_path / "nets.safetensors")
    for name, frozen in batch.frozen.items():
        if name.endswith((".weight", ".bias")):
            assert torch.equal(tuned.frozen[name], frozen)
    assert float(result.points[-1].val.mean()) > float(result.points[0].val.mean()) + 10
    again = flown.evaluate(tuned, images.test.images, images.test.labels)
    assert torch.equal(again, result.points[-1].test)
    with pytest.raises(FlownError, match="pass the frozen rest"):
        finetune(WeightBatch(batch.layout, batch.vectors), images, SHORT)


def test_whole_networks_with_batchnorm() -> None:
    net = examples.ConvNorm()
    shape = {"net": "tests.examples:ConvNorm", "size": 10}
    architecture = examples.architecture().model_copy(update=shape)
    layout = flown.WeightLayout.of(net, architecture)
    vectors = layout.pack({k: v[None].repeat_interleave(2, 0) for k, v in net.named_parameters()})
    images = examples.images("digits")
    batch = WeightBatch(layout, vectors.detach())
    result = finetune(batch, images, FinetuneConfig(epochs=6, learning_rate=1e-2, batch_size=16))
    losses = [float(p.loss.mean()) for p in result.points[1:]]  # type: ignore[union-attr]
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(result.networks.vectors[0], result.networks.vectors[1])  # two orders
    measured = flown.evaluate(result.networks, images.val.images, images.val.labels)
    assert torch.equal(measured, result.points[-1].val)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "must be 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"schedule": "piecewise"}, "needs one"),
        ({"milestones": (1,)}, "belong to `piecewise`"),
        ({"test_at": (3,)}, "not within epochs 0..2"),
        ({"batch_size": 500}, "less than a batch"),
        ({"max_train_images": 5}, "less than a batch"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    config = SHORT.model_copy(update=settings)
    with pytest.raises(FlownError, match=message):
        finetune(examples.networks(1), examples.images("digits"), config)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FlownError, match="tell 10 classes apart, 'parity' has 2"):
        finetune(examples.networks(1), examples.images("parity"), SHORT)
    with pytest.raises(FlownError, match="no network"):
        finetune(examples.networks(1)[:0], examples.images("digits"), SHORT)
    with pytest.raises(FlownError, match=r"written as \.safetensors"):
        finetune(examples.networks(1), examples.images("digits"), SHORT, out=tmp_path / "nets")
    with pytest.raises(TrainingError, match="network 0 diverged in epoch 1"):
        finetune(
            examples.networks(2),
            examples.images("digits"),
            SHORT.model_copy(update={"learning_rate": 1e30}),
        )
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FlownError, match="no curves of fine-tuning"):
        read_points(tmp_path / "other.json")


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["flown", "finetune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    file, out = tmp_path / "nets.safetensors", tmp_path / "tuned.safetensors"
    examples.networks(2).save(file)
    usual = (file, "--data", "digits", "--epochs", 2, "--out", out, "--max-train-images", 320)
    assert call(*usual, "--schedule", "piecewise", "--milestone", 1, "--test-at", 0) == 0
    said = capsys.readouterr().out
    assert "epoch 0: " in said and "epoch 2: " in said and "% of test images" in said
    assert len(WeightBatch.load(out)) == 2 and len(read_points(tmp_path / "tuned.json")) == 3
    assert call(*usual) == 2
    assert "exists already" in capsys.readouterr().err
    assert (
        call(file, "--data", "digits", "--epochs", 1, "--out", file, "--overwrite") == 0
    )  # itself
    assert WeightBatch.load(file).provenance["finetuned"]["from"] == "digits"
    capsys.readouterr()
    assert call(file, "--data", "nowhere", "--out", tmp_path / "x.safetensors") == 2
    assert "unknown dataset 'nowhere'" in capsys.readouterr().err
