"""Every network's own scale: exact inverse, unit scale, an error in the network's own units."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flown.weights.layout import JointLayout
from flown.weights.scale import NetworkScale
from tests.test_layout import layout

JOINT = JointLayout.of([layout("cnn-small", 1, 4), layout("cnn-small", 3, 10)])


def networks(spread: float, seed: int = 0, n: int = 6) -> tuple[Tensor, Tensor]:
    """Vectors (n, D) whose scales lie `spread` decades apart, and their layouts (n,)."""
    generator = torch.Generator().manual_seed(seed)
    layouts = torch.arange(n) % 2
    rows = [
        JOINT.embed(
            10 ** (spread * i / n)
            * (0.1 + torch.randn(1, JOINT.layouts[k].size, generator=generator)),
            k,
        )
        for i, k in enumerate(layouts.tolist())
    ]
    return torch.cat(rows), layouts


def fitted(vectors: Tensor, layouts: Tensor) -> NetworkScale:
    scale = NetworkScale(JOINT)
    scale.fit([(vectors, layouts)])
    return scale


@given(spread=st.floats(-3, 3), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_inverse_is_exact_whatever_the_scales(spread: float, seed: int) -> None:
    vectors, layouts = networks(spread, seed)
    again = fitted(vectors, layouts).invert(fitted(vectors, layouts)(vectors, layouts), layouts)
    size = vectors.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(again / size, vectors / size, atol=2e-5, rtol=0)


def test_each_tensor_of_each_network_has_unit_scale() -> None:
    vectors, layouts = networks(2)
    scale = fitted(vectors, layouts)
    scaled = scale(vectors, layouts)
    assert scaled.shape == (6, JOINT.size + 2 * len(JOINT.shapes)) and scaled.shape[1] == scale.size
    for row, layout_index in zip(scaled, layouts.tolist(), strict=True):
        mask = JOINT.masks[layout_index]
        assert not row[: JOINT.size][~mask].any()
        first = row[: 8 * 3 * 25][mask[: 8 * 3 * 25]]  # conv1, padded for grey networks
        assert first.mean().abs() < 1e-5 and abs(float(first.std(correction=0)) - 1) < 1e-4


def test_statistics_are_standardised_over_networks() -> None:
    vectors, layouts = networks(2)
    statistics = fitted(vectors, layouts)(vectors, layouts)[:, JOINT.size :]
    torch.testing.assert_close(
        statistics.mean(dim=0), torch.zeros(statistics.shape[1]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        statistics.std(dim=0, correction=0), torch.ones(statistics.shape[1]), atol=1e-3, rtol=0
    )


def test_a_network_nobody_fitted_on_is_scaled_and_restored() -> None:
    """The scale is the network's own: nothing of the training networks is needed to undo it."""
    scale = fitted(*networks(1))
    vectors, layouts = networks(-4, seed=5)
    again = scale.invert(scale(vectors, layouts), layouts)
    size = vectors.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(again / size, vectors / size, atol=1e-4, rtol=0)


def test_tensors_of_equal_numbers_come_back(generator: torch.Generator) -> None:
    vectors, layouts = networks(0)
    vectors = torch.where(JOINT.masks[layouts], vectors, 0)
    vectors[layouts == 1, -10:] = 0.01  # biases as initialised
    scale = fitted(vectors, layouts)
    torch.testing.assert_close(
        scale.invert(scale(vectors, layouts), layouts), vectors, atol=1e-4, rtol=0
    )


def test_the_error_is_in_the_networks_own_units(generator: torch.Generator) -> None:
    vectors, layouts = networks(3)
    scale = fitted(vectors, layouts).double()
    scaled = scale(vectors.double(), layouts)
    noisy = scaled + 0.01 * torch.randn(scaled.shape, generator=generator)
    found = scale.invert(noisy, layouts)
    unit = (vectors.double() - found) / (
        scale._statistics(vectors.double(), layouts)[:, len(JOINT.shapes) :].exp()[:, scale.tensors]
    )
    mask = JOINT.masks[layouts]
    expected = (unit.square() * mask).sum() / mask.sum()
    assert float(scale.error(noisy, scaled, layouts)) == pytest.approx(float(expected), rel=1e-6)
    assert float(scale.error(scaled, scaled, layouts)) == 0
