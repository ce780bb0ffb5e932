"""Ways to train the any-task generator: where gradients flow, what a bank holds, training and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from flown import training
from flown.anytask import bank as banks
from flown.anytask import ways
from flown.anytask.bank import Bank, permuted
from flown.anytask.config import AnyTaskConfig, BankConfig, Way
from flown.anytask.fit import fit, fit_bases
from flown.anytask.model import AnyTask
from flown.anytask.written import logits, seen
from flown.base.errors import FlownError
from flown.base.seeding import seeded
from flown.tasks import Episodes, draw_support, load
from flown.tasks.stream import Draws, TaskStream
from flown.training import LoopConfig
from tests.test_anytask import TINY

WAYS = get_args(Way)
SMALL = TINY.model_copy(update={"bank": BankConfig(draws=3, steps=4)})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_way(way: str, **others: object) -> AnyTaskConfig:
    return SMALL.model_copy(update={"way": way, **others})


def opened(config: AnyTaskConfig) -> AnyTask:
    """Untrained, but for end points that are not all zeros."""
    model = AnyTask(config)
    with seeded(0):
        model.trunk.leave.reset_parameters()
    banks.open_heads(model)
    return model


@pytest.fixture(scope="module")
def draws() -> Draws:
    return TaskStream(SMALL.tasks).draws()


@pytest.fixture(scope="module")
def tasks(draws: Draws) -> Episodes:
    return draws.at(1)


def last_evaluations(model: AnyTask, tasks: Episodes, ends: ways.Ends, seed: int) -> list[Tensor]:
    """Gradients at the latents that each evaluation of the flow was given; None where none came."""
    given: list[Tensor] = []

    def keep(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *others = inputs
        x = x.detach().requires_grad_() if not x.requires_grad else x
        x.retain_grad()
        given.append(x)
        return (x, *others)

    handle = model.trunk.register_forward_pre_hook(keep)
    writer = model.writer("conv4-8")
    classes, shares = seen(model, tasks, 2)
    x = ends(model, writer, classes, generator(seed))
    handle.remove()
    logits(writer, tasks, x, shares).square().sum().backward()
    return [x.grad for x in given]


def test_the_gradient_goes_through_all_steps_of_the_solver(tasks: Episodes) -> None:
    model = opened(of_way("solver"))
    grads = last_evaluations(model, tasks, ways.through, 0)
    assert len(grads) == model.config.steps
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_the_gradient_stops_at_t_on_the_way_to_an_end_point(tasks: Episodes) -> None:
    model, counts = opened(of_way("end-point")), set()
    for seed in range(8):
        *before, last = last_evaluations(model, tasks, ways.stopped, seed)
        assert all(grad is None for grad in before)
        assert last is not None and last.abs().sum() > 0
        counts.add(len(before) + 1)
    assert counts == {1, 2, 3, 4}, "every time of the flow is trained"


def test_a_bank_lowers_the_loss_of_its_tasks(draws: Draws, tmp_path: Path) -> None:
    config = of_way("matching", bank=BankConfig(draws=4, steps=12))
    model, path = opened(config), tmp_path / "bank.safetensors"
    bank = Bank.at(path, model, draws)
    assert {entry.net for entry in bank.entries} == set(config.nets)
    for net, seed, x in bank.entries:
        tasks, writer = draws.at(seed), model.writer(net)
        shares = seen(model, tasks, 1).shares
        before = banks.error(writer, tasks, torch.zeros_like(x), shares)
        assert banks.error(writer, tasks, x, shares) < 0.9 * before
        assert x[:, -tasks.ways :].std() > 0.1, "class tokens have moved as well"
    written = path.stat().st_mtime_ns
    again = Bank.at(path, opened(config), draws)
    assert path.stat().st_mtime_ns == written
    for (net, seed, x), (net_, seed_, x_) in zip(bank.entries, again.entries, strict=True):
        assert (net, seed) == (net_, seed_) and torch.equal(x, x_)


def test_permuted_classes_permute_a_banks_rows(tasks: Episodes) -> None:
    """Networks of permuted latents answer permuted tasks as before, by other numbers."""
    model = opened(of_way("matching"))
    writer, ways_ = model.writer("conv4-8"), tasks.ways
    x = torch.randn(
        len(tasks.labels), len(writer.neurons) + ways_, model.config.numbers, generator=generator()
    )
    order = torch.rand(tasks.classes.shape, generator=generator(1)).argsort(dim=1)
    turned, x_ = permuted(tasks, x, order)
    assert torch.equal(turned.labels, tasks.labels) and not torch.equal(
        turned.support, tasks.support
    )
    for i in range(len(order)):
        assert torch.equal(x_[i, -ways_:], x[i, -ways_:][order[i]])
        assert torch.equal(turned.classes[i], tasks.classes[i][order[i]])
    assert torch.equal(x_[:, :-ways_], x[:, :-ways_])
    found, wanted = (
        logits(writer, some, latents, seen(model, some, 1).shares)[:, 0]
        for some, latents in ((turned, x_), (tasks, x))
    )
    shots, each = tasks.shots, tasks.query.shape[1] // ways_
    parts = wanted.split([ways_ * shots, ways_ * each], dim=1)
    for i in range(len(order)):
        rows = [part[i].unflatten(0, (ways_, -1))[order[i]].flatten(0, 1) for part in parts]
        assert torch.allclose(found[i], torch.cat(rows)[:, order[i]], atol=1e-3)


def test_classes_of_a_bank_stand_in_another_order_each_time(draws: Draws) -> None:
    model = opened(of_way("matching"))
    tasks = draws.at(1)
    shares = seen(model, tasks, 1).shares
    x = banks.solve(model.writer(None), tasks, shares, SMALL.bank, SMALL.numbers, generator())
    bank = Bank(draws, [banks.Entry("cnn-small", 1, x)])
    first, again, other = (bank.next(generator(seed))[1].classes for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first.sort().values, other.sort().values)


def test_matching_alone_leaves_base_networks_and_decoders(draws: Draws) -> None:
    model = opened(of_way("matching", bank=BankConfig(draws=4, steps=1)))
    bank = Bank(draws, banks._find(model, draws))
    alone, judged = ways.Matched(model, bank, False), ways.Matched(opened(SMALL), bank, True)
    for objective in (alone, judged):
        for seed in range(6):
            objective(generator(seed)).backward()
        missing = [
            name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None
        ]
        assert missing == [], "these parts learn nothing"
    still = {name for name, p in alone.named_parameters() if not p.requires_grad}
    assert {name.split(".")[3] for name in still if ".writers." in name} == {
        "base",
        "units",
        "decoders",
        "head_decoder",
        "regression",
        "ridge",
    }
    assert all(".writers." in name or name.startswith("model.trunk.gate.") for name in still)


def test_a_model_without_noise_gives_one_network_n_times() -> None:
    model = opened(of_way("point")).eval().requires_grad_(False)
    support = draw_support(load("digits").train, 5, 3, generator(), [*range(5)])
    batch = model.generate(*support, n=3, seed=1)
    assert len(batch) == 3 and (batch.vectors == batch.vectors[0]).all()
    assert torch.equal(batch.vectors, model.generate(*support, n=3, seed=2).vectors)
    assert batch.provenance["nfe"] == 1
    assert not torch.allclose(batch.vectors[0], model.base(*support).vectors[0], atol=1e-3)
    with pytest.raises(FlownError, match="steps: 1 for a model without noise, got 4"):
        model.generate(*support, n=1, steps=4)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bases")
    fit_bases(SMALL, out=out)
    return out


@pytest.mark.parametrize("way", WAYS)
def test_each_way_trains_and_goes_on_where_it_was(
    way: str, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = of_way(way)
    whole = fit(config, out=tmp_path / "whole", bases=bases).state_dict()
    begun = AnyTask(config).state_dict()
    moved = [key for key in whole if not torch.equal(whole[key], begun[key])]
    assert any(key.startswith("trunk.blocks") for key in moved)
    save = training._Run.save

    def saving(self: training._Run, path: Path, step: int) -> None:
        save(self, path, step)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(training._Run, "save", saving)
    with pytest.raises(KeyboardInterrupt):
        fit(config, out=tmp_path / "killed", bases=bases)
    monkeypatch.setattr(training._Run, "save", save)
    resumed = fit(config, out=tmp_path / "killed", bases=bases, resume=True).state_dict()
    for key, value in resumed.items():
        assert torch.equal(value, whole[key]), key


def test_a_fit_begins_with_trained_bases(bases: Path, tmp_path: Path) -> None:
    """Of another width, too, where images have as many features; what is no base is refused."""
    trained = fit_bases(SMALL, out=bases, resume=True)
    alone = fit(SMALL, out=tmp_path / "alone").state_dict()
    after = fit(SMALL, out=tmp_path / "after", bases=bases).state_dict()
    assert all(torch.equal(after[key], alone[key]) for key in alone)
    one = SMALL.training.model_copy(update={"steps": 1, "learning_rate": 0.0})
    wide = SMALL.model_copy(update={"width": 24, "features": SMALL.width, "training": one})
    found = fit(wide, out=tmp_path / "wide", bases=bases).state_dict()
    for key, value in trained.state_dict().items():
        if ".base." in key or ".units." in key or key.startswith(("trunk.images", "trunk.gate")):
            assert torch.equal(found[key], value), key
    with pytest.raises(FlownError, match="belongs to another model"):
        fit(SMALL.model_copy(update={"width": 24}), out=tmp_path / "other", bases=bases)
    with pytest.raises(FlownError, match="no such file"):
        fit(SMALL, out=tmp_path / "none", bases=tmp_path / "nothing")
    with pytest.raises(FlownError, match="another bases"):
        fit(SMALL, out=tmp_path / "after", resume=True)


def test_a_fit_trains_a_model_further(tmp_path: Path) -> None:
    """All its weights are where it begins; a model of another size is refused, and so is another one."""
    first = fit(SMALL, out=tmp_path / "first")
    still = LoopConfig(steps=1, learning_rate=0.0)
    base = SMALL.base.model_copy(update={"training": still})
    config = SMALL.model_copy(update={"base": base, "training": still})
    further = fit(config, out=tmp_path / "further", begin=tmp_path / "first" / "model")
    for key, value in first.state_dict().items():
        # What is read from a file has been in half precision.
        assert torch.allclose(further.state_dict()[key], value, rtol=1e-3, atol=1e-4), key
    wide = config.model_copy(update={"width": 24, "heads": 2})
    with pytest.raises(FlownError, match="expected"):
        fit(wide, out=tmp_path / "wide", begin=tmp_path / "first" / "model")
    with pytest.raises(FlownError, match="another begin"):
        fit(config, out=tmp_path / "further", resume=True)
