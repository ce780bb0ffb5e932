"""Distances and principal directions against numpy's and scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from flown.weights import geometry
from flown.weights.geometry import distances, principal


def vectors(n: int, d: int, seed: int = 0) -> torch.Tensor:
    scale = torch.linspace(1, 3, d)
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("exact", [True, False])
def test_distances_by_hand(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = vectors(4, 30), vectors(7, 30, seed=1)
    expected = np.linalg.norm(a.double().numpy()[:, None] - b.double().numpy()[None], axis=-1)
    np.testing.assert_allclose(distances(a, b, exact), expected, rtol=1e-9)
    monkeypatch.setattr(geometry, "_COLUMNS", 7)  # four parts and a rest
    np.testing.assert_allclose(distances(a, b, exact), expected, rtol=1e-9)
    assert distances(a[:0], b, exact).shape == (0, 7)


def test_equal_vectors_are_at_nought() -> None:
    a = 1000 + vectors(40, 200)
    assert torch.equal(distances(a, a).diagonal(), torch.zeros(40, dtype=torch.double))


@pytest.mark.parametrize(("n", "d"), [(12, 40), (40, 5)])
def test_principal_directions_are_those_of_scikit_learn(n: int, d: int) -> None:
    x = vectors(n, d)
    found, expected = principal(x), PCA(2, svd_solver="full").fit(x.double().numpy())
    assert found is not None
    np.testing.assert_allclose(found.explained, 100 * expected.explained_variance_ratio_, 1e-4)
    points, others = found.project(x).numpy(), expected.transform(x.double().numpy())
    signs = np.sign((points * others).sum(axis=0))
    np.testing.assert_allclose(points, others * signs, atol=1e-3)
    torch.testing.assert_close(
        found.directions.T @ found.directions, torch.eye(2), atol=1e-4, rtol=0
    )
    assert (points.max(axis=0) == np.abs(points).max(axis=0)).all(), "signs are not arbitrary"


def test_too_few_directions_are_none() -> None:
    assert principal(torch.ones(5, 4)) is None, "all are equal"
    assert principal(vectors(1, 4)) is None and principal(vectors(9, 1)) is None
    line = principal(torch.arange(6.0)[:, None] * torch.tensor([[3.0, 4.0]]))
    assert line is not None and torch.isfinite(line.directions).all()
    assert line.explained[0] == pytest.approx(100) and line.explained[1] == pytest.approx(0)
