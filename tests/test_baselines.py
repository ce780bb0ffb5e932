"""One contract for every baseline, and each one's moments."""

from __future__ import annotations

import math

import pytest
import torch

from flown import FlownError
from flown.measure.baselines import BASELINES, random_init
from tests.examples import networks


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", BASELINES)
def test_contract(name: str) -> None:
    train = networks(20)
    before = train.vectors.clone()
    drawn = BASELINES[name](train, 30, seeded())
    assert drawn.layout == train.layout and len(drawn) == 30
    assert torch.isfinite(drawn.vectors).all()
    assert torch.equal(train.vectors, before)  # the pool is not written into
    drawn.vectors.zero_()
    assert torch.equal(train.vectors, before)  # nor shared
    again = BASELINES[name](train, 30, seeded()).vectors
    assert torch.equal(again, BASELINES[name](train, 30, seeded()).vectors)
    assert not torch.equal(again, BASELINES[name](train, 30, seeded(1)).vectors)


@pytest.mark.parametrize("name", BASELINES)
def test_global_random_numbers_are_left_alone(name: str) -> None:
    train = networks(3)
    before = torch.get_rng_state()
    BASELINES[name](train, 2, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_nearest_repeats_none_before_all_were_drawn() -> None:
    train = networks(6)
    for n in (4, 6, 9):
        same = torch.cdist(BASELINES["nearest"](train, n, seeded()).vectors, train.vectors) < 1e-4
        assert same.any(dim=1).all()
        assert same.sum(dim=0).max() == -(-n // 6)


@pytest.mark.parametrize("scale", [0.06, 0.12])
def test_noise_has_each_tensors_size(scale: float) -> None:
    train = networks(1)
    drawn = BASELINES[f"noise-{scale}"](train, 200, seeded())
    for name, tensor in train.layout.unpack(drawn.vectors - train.vectors).items():
        spread = train.layout.unpack(train.vectors)[name].std(correction=0)
        assert float(tensor.std() / spread) == pytest.approx(scale, rel=0.1), name


def test_average_is_of_sixteen_different_ones() -> None:
    train = networks(16)
    drawn = BASELINES["average-16"](train, 2, seeded())
    torch.testing.assert_close(drawn.vectors, train.vectors.mean(dim=0).expand(2, -1))
    few = BASELINES["average-16"](train[:5], 1, seeded())
    torch.testing.assert_close(few.vectors[0], train.vectors[:5].mean(dim=0))


def test_gaussian_has_the_zoos_moments() -> None:
    train = networks(50)
    drawn = BASELINES["gaussian"](train, 2000, seeded()).vectors
    error = (drawn.mean(dim=0) - train.vectors.mean(dim=0)) / train.vectors.std(dim=0)
    assert error.abs().max() < 0.15  # six standard errors
    ratio = drawn.std(dim=0) / train.vectors.std(dim=0, correction=0)
    assert (ratio - 1).abs().max() < 0.12


def test_random_init_follows_pytorch_or_the_recipe() -> None:
    train = networks(2)
    tensors = train.layout.unpack(random_init(train, 100, seeded()).vectors)
    for name, tensor in tensors.items():
        fan_in = math.prod(tensors[name.replace("bias", "weight")].shape[2:])
        assert float(tensor.abs().max()) == pytest.approx(fan_in**-0.5, rel=0.05), name
        assert float(tensor.std()) == pytest.approx((3 * fan_in) ** -0.5, rel=0.1), name
    positive = random_init(train, 2, seeded(), init="uniform").vectors
    assert positive.min() >= 0 and positive.max() > 0.9


def test_an_empty_zoo_is_refused() -> None:
    for name in ("nearest", "noise-0.06", "average-16", "gaussian"):
        with pytest.raises(FlownError, match="no training network of 'cnn-small for digits'"):
            BASELINES[name](networks(2)[:0], 3, seeded())
