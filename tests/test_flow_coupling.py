"""Couplings: what they exchange, and the exactness of optimal transport."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor

from flown.flow import COUPLINGS


def batches(n: int) -> tuple[Tensor, Tensor]:
    both = torch.randn(2, n, 1, 2, 2, generator=torch.Generator().manual_seed(n))
    return both[0], both[1]


def cost(x0: Tensor, x1: Tensor) -> float:
    return (x0 - x1).double().square().sum().item()


@pytest.mark.parametrize("name", COUPLINGS)
def test_exchanges_source_samples_within_their_group(name: str) -> None:
    x0, x1 = batches(30)
    groups = torch.arange(30) % 4
    coupled = COUPLINGS[name](x0, x1, groups, torch.Generator().manual_seed(0))
    assert coupled.shape == x0.shape
    for group in range(4):
        before, after = (x[groups == group].flatten(1).tolist() for x in (x0, coupled))
        assert sorted(before) == sorted(after)


def test_independent_leaves_the_draw_alone() -> None:
    x0, x1 = batches(10)
    assert torch.equal(COUPLINGS["independent"](x0, x1, None, None), x0)


def test_ot_finds_the_best_permutation() -> None:
    x0, x1 = batches(6)
    best = min(cost(x0[list(order)], x1) for order in permutations(range(6)))
    assert cost(COUPLINGS["ot"](x0, x1, None, None), x1) == pytest.approx(best)


def test_ot_recovers_a_shuffle() -> None:
    x0, _ = batches(20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(COUPLINGS["ot"](x0[order], x0, None, None), x0)


def test_ot_within_groups_is_ot_of_each_group() -> None:
    x0, x1 = batches(24)
    groups = torch.arange(24) % 3
    coupled = COUPLINGS["ot"](x0, x1, groups, None)
    for group in range(3):
        rows = groups == group
        alone = COUPLINGS["ot"](x0[rows], x1[rows], None, None)
        assert torch.equal(coupled[rows], alone)
    assert cost(coupled, x1) >= cost(COUPLINGS["ot"](x0, x1, None, None), x1)


def test_ot_costs_what_torchcfms_exact_plan_costs() -> None:
    pytest.importorskip("ot")
    transport = pytest.importorskip("torchcfm.optimal_transport")
    x0, x1 = batches(32)
    plan = transport.OTPlanSampler(method="exact").get_map(x0, x1)
    distances = torch.cdist(x0.flatten(1), x1.flatten(1)).square().double()
    theirs = (torch.as_tensor(plan) * distances).sum().item() * 32
    assert cost(COUPLINGS["ot"](x0, x1, None, None), x1) == pytest.approx(theirs, rel=1e-5)
