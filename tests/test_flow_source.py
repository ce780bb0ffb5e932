"""Sources: the contract of all, the rules of He et al., and the checkpoint prior of A.4.2."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.flow import SOURCES, Checkpoint, Gaussian, KaimingNormal, KaimingUniform, Source


def shapes_of(channels: int, classes: int, width: int = 8) -> list[tuple[str, tuple[int, ...]]]:
    net = nn.Sequential(
        nn.Conv2d(channels, width, 3),
        nn.BatchNorm2d(width),
        nn.Linear(width, 6),
        nn.Linear(6, classes),
    )
    return [(name, tuple(p.shape)) for name, p in net.named_parameters()]


TASKS = [shapes_of(1, 10), shapes_of(3, 4)]
JOINT = [tuple(map(max, zip(a, b, strict=True))) for (_, a), (_, b) in zip(*TASKS, strict=True)]
SIZE = sum(map(math.prod, JOINT))


def pack(tensors: dict[str, Tensor], task: int) -> Tensor:
    """Each tensor in the leading corner of its joint slot, zeros elsewhere."""
    rows = []
    for (name, shape), slot in zip(TASKS[task], JOINT, strict=True):
        assert tensors[name].shape[1:] == shape
        padded = tensors[name].new_zeros(len(tensors[name]), *slot)
        padded[(slice(None), *map(slice, shape))] = tensors[name]
        rows.append(padded.flatten(1))
    return torch.cat(rows, dim=1)


def encode(vectors: Tensor, groups: Tensor) -> Tensor:
    assert vectors.shape == (len(groups), SIZE)
    return vectors.reshape(len(vectors), 1, 1, SIZE)


def prior(channels: int = 3, classes: int = 20) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        name: 1 + torch.randn(shape, generator=generator)
        for name, shape in shapes_of(channels, classes)
    }


def build(name: str) -> Source:
    if name == "gaussian":
        return Gaussian((1, 1, SIZE))
    if name == "checkpoint":
        return Checkpoint(prior(), TASKS, pack, encode)
    return SOURCES[name](TASKS, pack, encode)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SOURCES)
def test_contract(name: str) -> None:
    source, groups = build(name), torch.tensor([0, 1, 1, 0, 1])
    drawn = source.sample(groups, seeded())
    assert drawn.shape == (5, 1, 1, SIZE)
    assert drawn.isfinite().all()
    assert torch.equal(drawn, source.sample(groups, seeded()))
    assert not torch.equal(drawn, source.sample(groups, seeded(1)))
    assert len(drawn.flatten(1).unique(dim=0)) == 5


@pytest.mark.parametrize("name", SOURCES)
def test_leaves_the_global_seed_alone(name: str) -> None:
    source = build(name)
    before = torch.get_rng_state()
    source.sample(torch.tensor([0, 1]), seeded())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["kaiming-normal", "kaiming-uniform"])
def test_rows_have_their_tasks_zeros(name: str) -> None:
    groups = torch.tensor([1, 0, 0, 1])
    drawn = build(name).sample(groups, seeded()).flatten(1)
    for row, task in zip(drawn, groups.tolist(), strict=True):
        one = {name: torch.ones(1, *shape) for name, shape in TASKS[task]}
        assert torch.equal(row == 0, pack(one, task)[0] == 0)


def test_gaussian_is_standard() -> None:
    drawn = Gaussian((4, 4, 4)).sample(torch.zeros(2_000), seeded())
    assert drawn.shape == (2_000, 4, 4, 4)
    assert drawn.mean().item() == pytest.approx(0, abs=0.01)
    assert drawn.std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("law", [KaimingNormal, KaimingUniform])
def test_kaiming_follows_torchs_rules(law: type[KaimingNormal] | type[KaimingUniform]) -> None:
    shapes = shapes_of(3, 10)
    drawn = law([shapes], pack, encode).draw(0, 4_000, seeded(), torch.device("cpu"))
    assert {name: tuple(x.shape[1:]) for name, x in drawn.items()} == dict(shapes)
    for name, fan_in in (("0", 27), ("2", 8), ("3", 6)):
        weight, bias = drawn[f"{name}.weight"], drawn[f"{name}.bias"]
        assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.02), name
        assert weight.mean().item() == pytest.approx(0, abs=0.01), name
        assert bias.abs().max().item() == pytest.approx(fan_in**-0.5, rel=0.01), name
    assert drawn["1.weight"].mean().item() == pytest.approx(1, abs=0.02)
    assert drawn["1.weight"].std().item() == pytest.approx(0.5, rel=0.02)
    assert drawn["1.bias"].abs().max() <= 8**-0.5
    if law is KaimingUniform:
        bound = math.sqrt(6 / 27)
        assert drawn["0.weight"].abs().max().item() == pytest.approx(bound, rel=0.01)


def test_checkpoint_takes_the_body_over_and_draws_the_head() -> None:
    given = prior(channels=3, classes=20)
    source = Checkpoint(given, TASKS, pack, encode, noise=0.0)
    grey, colour = (source.draw(task, 3_000, seeded(), torch.device("cpu")) for task in (0, 1))
    assert torch.equal(grey["0.weight"][7], given["0.weight"][:, :1])
    assert torch.equal(colour["0.weight"][7], given["0.weight"])
    for name in ("0.bias", "1.weight", "1.bias", "2.weight", "2.bias"):
        assert torch.equal(grey[name][0], given[name]), name
    for name in ("3.weight", "3.bias"):
        mean, std = given[name].mean().item(), given[name].std(correction=0).item()
        assert colour[name].mean().item() == pytest.approx(mean, abs=0.03), name
        assert colour[name].std().item() == pytest.approx(std, rel=0.03), name


def test_checkpoint_pads_missing_input_channels() -> None:
    given = prior(channels=1)
    source = Checkpoint(given, TASKS, pack, encode)
    first = source.draw(1, 2, seeded(), torch.device("cpu"))["0.weight"][0]
    assert torch.equal(first[:, :1], given["0.weight"])
    assert not first[:, 1:].any()


def test_checkpoint_noise_is_added_in_latent_space() -> None:
    groups = torch.zeros(4_000, dtype=torch.long)
    drawn = Checkpoint(prior(), TASKS, pack, encode, noise=0.5).sample(groups, seeded())
    body = drawn.flatten(1)[:, 0]  # the first weight of conv1, the same in every network
    assert body.mean().item() == pytest.approx(prior()["0.weight"].flatten()[0].item(), abs=0.03)
    assert body.std().item() == pytest.approx(0.5, rel=0.05)


def test_checkpoint_names_the_tensor_that_does_not_fit() -> None:
    with pytest.raises(FlownError, match=r"no tensor '2\.bias'"):
        Checkpoint({k: v for k, v in prior().items() if k != "2.bias"}, TASKS, pack, encode)
    with pytest.raises(FlownError, match=r"'0\.weight' is \(9, 3, 3, 3\).*\(8, 1, 3, 3\)"):
        wide = {name: torch.ones(shape) for name, shape in shapes_of(3, 10, width=9)}
        Checkpoint(wide, TASKS, pack, encode)
