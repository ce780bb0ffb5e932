"""Flown end to end on real digits: fit, generate, keep, resume; and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import flown
from flown.base.errors import FlownError
from flown.experiments.unconditional import share_encoder
from flown.generator import files as modelfiles
from flown.generator.config import FlownConfig
from flown.tasks import draw_support, load
from flown.tasks import load as load_data
from tests import examples


def support(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images = load("digits")
    some = draw_support(images.train, 10, 3, torch.Generator().manual_seed(seed))
    return some.images, some.labels


def test_generated_networks_classify(model: flown.Flown, zoo: flown.Zoo) -> None:
    """Weights from noise are about as good as the zoo's: the product, not a mock of it."""
    val = load("digits").val
    batch = model.generate(*support(), n=12, seed=1, steps=20)
    accuracies = flown.evaluate(batch, val.images, val.labels)
    zoo_mean = flown.evaluate(
        zoo.select(epochs=[-1]).batch("digits"), val.images, val.labels
    ).mean()
    assert accuracies.shape == (12,)
    assert accuracies.mean() > zoo_mean - 15, (accuracies, zoo_mean)
    assert len({tuple(v.tolist()) for v in batch.vectors}) == 12, "samples differ"


def test_same_seed_same_weights(model: flown.Flown) -> None:
    one, two, three = (model.generate(*support(), n=3, seed=s, steps=5) for s in (4, 4, 5))
    assert torch.equal(one.vectors, two.vectors)
    assert not torch.equal(one.vectors, three.vectors)


def test_module_is_a_plain_network(model: flown.Flown) -> None:
    images, labels = support()
    batch = model.generate(images, labels, n=2, steps=5)
    net, x = batch.module(1), batch.preprocess(images)
    assert not net.training
    assert torch.allclose(net(x), batch.logits(x)[1], atol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4", "dopri5"])
def test_true_nfe(model: flown.Flown, solver: str) -> None:
    samples = model.sample(*support(), n=2, steps=4, solver=solver, trajectory=True)
    assert samples.path is not None and samples.path.shape[:2] == (5, 2)
    per_step = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
    assert samples.nfe == 4 * per_step[solver] if solver in per_step else samples.nfe > 0


def test_kept_and_loaded_model_is_the_same(model: flown.Flown, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    again = flown.Flown.from_pretrained(tmp_path / "m")
    assert torch.equal(
        model.generate(*support(), n=2, steps=3).vectors,
        again.generate(*support(), n=2, steps=3).vectors,
    )
    assert "Limits" in (tmp_path / "m" / "README.md").read_text()


def test_encode_decode(model: flown.Flown, zoo: flown.Zoo) -> None:
    batch = zoo.select(split="train", epochs=[-1]).batch("digits")
    latents = model.encode(batch)
    assert latents.shape == (10, *model.space.shape)
    assert latents.flatten(1).std() == pytest.approx(1, abs=0.1)
    assert model.reconstruct(batch).vectors.shape == batch.vectors.shape


def test_fit_resumes_to_the_same_model(
    run: Path, zoo: flown.Zoo, config: FlownConfig, tmp_path: Path
) -> None:
    """Cut off in the middle of the flow's training, a run ends where the whole one ended."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "model")
    (out / "flow.checkpoint.safetensors").unlink()
    resumed = flown.Flown.fit(zoo, config, out=out, resume=True)
    whole = flown.Flown.from_pretrained(run / "model")
    for (name, mine), theirs in zip(
        resumed.state_dict().items(), whole.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    with pytest.raises(FlownError, match="holds a run with another config;"):
        other = config.model_copy(update={"seed": 9})
        flown.Flown.fit(zoo, other, out=out, resume=True)
    with pytest.raises(FlownError, match="--overwrite"):
        flown.Flown.fit(zoo, config, out=out)


def test_a_run_from_before_a_key_was_there_goes_on(
    run: Path, zoo: flown.Zoo, config: FlownConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    about = json.loads((out / "run.json").read_text())
    del about["config"]["flow"]["path"], about["config"]["path_training"]
    (out / "run.json").write_text(json.dumps(about))
    assert list(flown.Flown.fit(zoo, config, out=out, resume=True).tasks) == ["digits"]
    about["config"]["flow"]["pth"] = "linear"  # of a version to come, or a slip
    (out / "run.json").write_text(json.dumps(about))
    with pytest.raises(FlownError, match="pth"):
        flown.Flown.fit(zoo, config, out=out, resume=True)


def test_a_run_of_another_version_goes_on_and_one_with_other_images_does_not(
    run: Path, zoo: flown.Zoo, config: FlownConfig, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(run, out)
    about = json.loads((out / "run.json").read_text())
    assert about["format"].startswith("flown-")
    about["flown"] = "0.0.0"
    (out / "run.json").write_text(json.dumps(about))
    images = load_data("digits")
    assert about["images"]["digits"]["train"] == len(images.train)
    flown.Flown.fit(zoo, config, out=out, resume=True)
    other = replace(images, train=replace(images.train, images=images.train.images.flip(0)))
    with pytest.raises(FlownError, match="holds a run with another images;"):
        flown.Flown.fit(zoo, config, out=out, resume=True, images={"digits": other})


def test_history_tells_reconstruction_accuracy(run: Path) -> None:
    last = json.loads((run / "history.json").read_text())["encoder"][-1]
    assert {"train", "train reconstructed", "held-out", "held-out reconstructed"} <= set(last)
    assert last["train reconstructed"] > last["train"] - 15


@pytest.mark.parametrize("source", ["kaiming-normal", "kaiming-uniform", "checkpoint"])
def test_other_sources(
    run: Path, zoo: flown.Zoo, config: FlownConfig, tmp_path: Path, source: str
) -> None:
    zoo.batch("digits")[:1].save(tmp_path / "prior.safetensors")
    flow = {"source": source, "prior": str(tmp_path / "prior.safetensors"), "coupling": "ot"}
    values = config.model_dump(mode="json") | {"flow": flow}
    values["flow_training"]["steps"] = 5
    share_encoder(run, tmp_path / "run")
    model = flown.Flown.fit(zoo, FlownConfig.parse(values), out=tmp_path / "run", resume=True)
    again = flown.Flown.from_pretrained(tmp_path / "run" / "model")
    assert torch.equal(
        model.generate(*support(), n=3, steps=2).vectors,
        again.generate(*support(), n=3, steps=2).vectors,
    )


def _refused(model: flown.Flown, message: str, **changes: object) -> None:
    images, labels = support()
    arguments = {"images": images, "labels": labels, "n": 2, "steps": 2} | changes
    with pytest.raises(FlownError, match=message):
        model.generate(**arguments)  # type: ignore[arg-type]


def test_bad_support_sets_are_named(model: flown.Flown) -> None:
    images, labels = support()
    _refused(model, "at least one network", n=0)
    _refused(model, "class 4", images=images[labels != 4], labels=labels[labels != 4])
    _refused(
        model,
        "has 1 classes, the model generates networks of 10",
        images=images[:1],
        labels=labels[:1],
    )
    _refused(model, r"expected \(N, 1 or 3, H, W\)", images=images[:, 0, 0])
    _refused(model, r"expected \(N, 1 or 3, H, W\)", images=images.expand(-1, 2, -1, -1))
    _refused(model, "NaN", images=images.float() / 0 * 0)
    _refused(model, "-1 is out of range 0..8", labels=labels - 1)
    _refused(model, "class 9 of 12 has no image", labels=torch.where(labels == 9, 11, labels))
    _refused(model, "unknown solver 'eulr'. Did you mean 'euler'", solver="eulr")
    _refused(model, r"layout 1 is out of range 0\.\.0", layout=1)
    _refused(model, "context_dropout", guidance=2.0)
    _refused(model, "at least one", steps=0)


def test_broken_model_folders_are_named(run: Path, tmp_path: Path) -> None:
    parts = (f"{part}.safetensors" for part in ("encoder", "flow", "context"))
    for name in ("config.json", "tasks.jsonl", *parts):
        folder = tmp_path / f"without-{name}"
        shutil.copytree(run / "model", folder)
        (folder / name).unlink()
        with pytest.raises(FlownError, match=f"{name} is missing"):
            flown.Flown.from_pretrained(folder)
    shutil.copytree(run / "model", tmp_path / "cut")
    file = tmp_path / "cut" / "flow.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(FlownError, match=r"flow.safetensors: truncated"):
        flown.Flown.from_pretrained(tmp_path / "cut")
    with pytest.raises(FlownError, match="Did you mean 'flown-small'"):
        flown.Flown.from_pretrained("flown-smal")


def test_export_is_half_the_size_and_as_good(model: flown.Flown, run: Path, tmp_path: Path) -> None:
    modelfiles.export(run / "model", tmp_path / "small")
    whole, small = (
        sum(f.stat().st_size for f in p.glob("*.safetensors"))
        for p in (run / "model", tmp_path / "small")
    )
    assert small < 0.6 * whole
    val = load("digits").val
    accuracies = [
        flown.evaluate(m.generate(*support(), n=8, steps=10), val.images, val.labels).mean()
        for m in (model, flown.Flown.from_pretrained(tmp_path / "small"))
    ]
    assert abs(accuracies[0] - accuracies[1]) < 2


def test_generated_networks_say_what_their_outputs_are(model: flown.Flown) -> None:
    names = tuple("abcdefghij")
    batch = model.generate(*support(), n=1, steps=2, classes=names)
    assert batch.task is not None and batch.task.classes == names
    assert model.generate(*support(), n=1, steps=2).task.classes == tuple("0123456789")  # type: ignore[union-attr]


def test_models_of_another_format_are_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "model", tmp_path / "old")
    about = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(about | {"format": "flown-model-1"}))
    with pytest.raises(FlownError, match=r"a model of flown 0\.1.*fit it again: flown zoo convert"):
        flown.Flown.from_pretrained(tmp_path / "old")


def test_tasks_of_different_numbers_of_classes_share_a_model(model_of_three: flown.Flown) -> None:
    """A support set of two classes gives networks of two outputs."""
    for task, count in examples.TASKS.items():
        data = examples.images(task)
        support = draw_support(data.val, count, 3, torch.Generator().manual_seed(0))
        batch = model_of_three.generate(*support, n=2, steps=3)
        x = batch.preprocess(data.test.images)
        assert batch.logits(x).shape == (2, len(data.test), count)
    few = draw_support(examples.images("digits").val, 10, 1, torch.Generator(), range(3))
    with pytest.raises(FlownError, match="has 3 classes, the model generates networks of 2, 10"):
        model_of_three.generate(*few, n=1)
