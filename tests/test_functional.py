"""Errors of functions: zero for any weights of the same function, one where all networks are alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flown
from flown.base.errors import FlownError
from flown.encoders import IdentityConfig
from flown.encoders.functional import FunctionalConfig, FunctionalError, divergence, spread_error
from flown.generator.config import FlownConfig
from flown.generator.data import TrainingSet
from flown.generator.fit import fit_encoder
from flown.tasks import load
from flown.training import TrainConfig
from flown.weights.layout import JointLayout
from flown.weights.scale import NetworkScale
from flown.zoo.align.matching import groups_of, permute
from tests import examples

TASKS = ("digits", "parity")  # of ten classes and of two


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def world() -> tuple[JointLayout, NetworkScale, Tensor, Tensor]:
    """Three networks of each task: joint layout, scaling, scaled vectors (6, D + 2 T), tasks (6,)."""
    batches = [examples.networks(3, seed=i, task=task) for i, task in enumerate(TASKS)]
    joint = JointLayout.of([batch.layout for batch in batches])
    raw = torch.cat([joint.embed(4 * batch.vectors, i) for i, batch in enumerate(batches)])
    tasks = torch.tensor([0, 0, 0, 1, 1, 1])
    scale = NetworkScale(joint)
    scale.fit([(raw, tasks)])
    return joint, scale, scale(raw, tasks), tasks


def error(
    world: tuple[JointLayout, NetworkScale, Tensor, Tensor], **factors: float
) -> FunctionalError:
    joint, scale, _, _ = world
    config = FunctionalConfig.parse({"images": 20, **factors})
    splits = [examples.images(task).train for task in TASKS]
    return FunctionalError(config, joint, scale, [0, 1], splits, [{}, {}], "cpu")


def test_other_weights_of_the_same_function_have_no_error(
    world: tuple[JointLayout, NetworkScale, Tensor, Tensor],
) -> None:
    joint, scale, vectors, tasks = world
    raw, turned = scale.invert(vectors, tasks), vectors.clone()
    for task, layout in enumerate(joint.layouts):
        groups, own = groups_of(layout), tasks == task
        orders = [
            torch.stack([torch.randperm(g.size, generator=generator(k)) for k in range(3)])
            for g in groups
        ]
        weights = layout.unpack(joint.extract(raw[own], task))
        same = joint.embed(layout.pack(permute(weights, groups, orders)), task)
        turned[own] = scale(same, tasks[own])
    assert (turned - vectors).square().mean() > 0.5
    both = error(world, kl=1, spread=1)
    assert float(both(turned, vectors, tasks, generator())) == pytest.approx(0, abs=1e-6)
    assert float(both(vectors.roll(1, 0), vectors, tasks, generator())) > 0.01


def test_it_is_the_mean_over_networks_of_what_their_modules_compute(
    world: tuple[JointLayout, NetworkScale, Tensor, Tensor],
) -> None:
    joint, scale, vectors, tasks = world
    decoded = (vectors + 0.3 * torch.randn(vectors.shape, generator=generator(1))).requires_grad_()
    found = error(world, kl=1, ce=2, temperature=3)(decoded, vectors, tasks, generator(2))
    draw, expected = generator(2), []
    for task, layout in enumerate(joint.layouts):
        split, own = examples.images(TASKS[task]).train, tasks == task
        some = split[torch.randint(len(split), (20,), generator=draw)]
        x = layout.architecture.preprocess(some.images)
        for one, other in zip(decoded[own], vectors[own], strict=True):
            logits = []
            for v in (one, other):
                raw = joint.extract(scale.invert(v[None], tasks[own][:1]), task)
                logits.append(flown.WeightBatch(layout, raw.detach()).module(0)(x).detach())
            logs = [F.log_softmax(y / 3, dim=-1) for y in logits]
            kl = F.kl_div(logs[0], logs[1], reduction="batchmean", log_target=True)
            expected.append(9 * kl + 2 * F.cross_entropy(logits[0], some.labels))
    assert float(found.detach()) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    (gradient,) = torch.autograd.grad(found, decoded)
    padding = ~joint.masks[tasks]
    assert (gradient[:, : joint.size][padding] == 0).all() and (gradient.abs().sum(dim=1) > 0).all()


def test_the_gradient_is_that_of_finite_differences() -> None:
    logits, target = (
        torch.randn(3, 4, 5, generator=generator(i), dtype=torch.double) for i in range(2)
    )
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(x, target, 2.0), logits)
    assert torch.autograd.gradcheck(lambda x: spread_error(x, target), logits)


def test_spread_sees_what_the_mean_function_lacks() -> None:
    target = 3 * torch.randn(50, 6, 4, generator=generator())
    alike = target.softmax(dim=-1).mean(dim=0).log().expand_as(target)
    assert spread_error(target, target) == 0
    assert spread_error(target.flip(0), target) < 1e-10  # whichever network is which
    assert float(spread_error(alike, target)) == pytest.approx(1, abs=0.02)


def test_functions_are_learnt_whatever_the_weights(zoo: flown.Zoo, tmp_path: Path) -> None:
    training = TrainConfig(steps=80, batch_size=10, learning_rate=2e-3)
    config = FlownConfig(encoder_training=training, functional=FunctionalConfig(mse=0, kl=1))
    people, images = TrainingSet.of(zoo, config.epochs), {"digits": load("digits")}
    encoder, history = fit_encoder(people, config, images, tmp_path, False, "cpu")
    assert history[-1]["held-out reconstructed"] > 60
    held_out = people.held_out[torch.arange(len(people.held_out))]
    assert (encoder.decode(encoder.encode(held_out)) - held_out).square().mean() > 0.5  # type: ignore[operator]


def test_same_seed_same_bits(zoo: flown.Zoo, tmp_path: Path) -> None:
    config = FlownConfig(
        encoder_training=TrainConfig(steps=3, batch_size=4),
        functional=FunctionalConfig(kl=1, spread=1),
    )
    people, images = TrainingSet.of(zoo, config.epochs), {"digits": load("digits")}
    once, again = (
        fit_encoder(people, config, images, tmp_path / name, False, "cpu")[0]
        for name in ("once", "again")
    )
    for name, value in once.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_what_cannot_be_trained_is_refused(zoo: flown.Zoo, tmp_path: Path) -> None:
    people = TrainingSet.of(zoo, (-1,))
    for config, words in (
        (FlownConfig(functional=FunctionalConfig(mse=0)), "nothing to train for"),
        (FlownConfig(encoder=IdentityConfig(), functional=FunctionalConfig(kl=1)), "identity"),
    ):
        with pytest.raises(FlownError, match=words):
            fit_encoder(people, config, {"digits": load("digits")}, tmp_path, False, "cpu")
    with pytest.raises(FlownError, match="temperature"):
        FlownConfig.parse({"functional": {"temperature": 0}})
