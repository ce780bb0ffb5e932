"""Classifiers that see all queries: what they give is what their equations say, and helps where it should."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flown.heads import classifiers
from flown.heads.transductive import SHARPNESSES, laplacian, soft_kmeans
from flown.tasks import Episodes

WAYS, QUERIES = 3, 8


def tasks(spread: float = 0.6, count: int = 40) -> Episodes:
    """One-shot tasks whose classes are clusters around random directions."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(count, WAYS, 1, 12, generator=generator, dtype=torch.double)
    noise = torch.randn(count, WAYS, 1 + QUERIES, 12, generator=generator, dtype=torch.double)
    images = centres + spread * 2 * noise
    classes = torch.arange(WAYS).expand(count, -1)
    return Episodes.of(images[:, :, 0], images[:, :, 1:].flatten(1, 2), classes)


def mean_accuracy(logits: Tensor, some: Episodes) -> float:
    return float(classifiers.accuracy(logits, some).mean())


def test_queries_help_where_they_lie_in_clusters() -> None:
    some = tasks()
    plain = mean_accuracy(classifiers.cosine_centroid(some), some)
    assert mean_accuracy(soft_kmeans(some), some) > plain + 2
    assert mean_accuracy(laplacian(some), some) > plain + 1


def test_without_their_number_they_are_the_nearest_mean() -> None:
    some = tasks()
    nearest = classifiers.cosine_centroid(some).argmax(dim=2)
    assert torch.equal(laplacian(some, 0.0).argmax(dim=2), nearest)


def test_soft_kmeans_is_its_equation() -> None:
    some, sharpness = tasks(count=1), 7.0
    support, query = F.normalize(some.support[0], dim=1), F.normalize(some.query[0], dim=1)
    moved = []
    shares = (sharpness * query @ support.T).softmax(dim=1)
    for k in range(WAYS):
        total = support[k] + sum(shares[q, k] * query[q] for q in range(len(query)))
        moved.append(total / total.norm())  # dividing by the weights' sum changes no direction
    expected = sharpness * query @ torch.stack(moved).T
    torch.testing.assert_close(soft_kmeans(some, sharpness)[0], expected)


def test_laplacian_is_a_fixed_point_of_its_equation() -> None:
    some, strength = tasks(count=2), 0.2
    logits = laplacian(some, strength)
    for task in range(2):
        means = F.normalize(some.support[task], dim=1)
        query = F.normalize(some.query[task], dim=1)
        near = -(query[:, None] - means).square().sum(dim=2)
        y = logits[task].softmax(dim=1)
        for q in range(len(query)):
            distance = (query - query[q]).norm(dim=1)
            distance[q] = torch.inf
            neighbours = distance.topk(3, largest=False).indices
            expected = near[q] + strength * y[neighbours].sum(dim=0)
            torch.testing.assert_close(logits[task, q], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("classify", [soft_kmeans, laplacian])
def test_other_orders_give_the_same_in_that_order(classify) -> None:  # type: ignore[no-untyped-def]
    some = tasks()
    order = torch.tensor([2, 0, 1])
    turned = some._replace(support=some.support[:, order])
    torch.testing.assert_close(classify(turned), classify(some)[:, :, order])


def test_the_number_is_chosen_by_accuracy() -> None:
    some = tasks()
    best = classifiers.choose(soft_kmeans, some, SHARPNESSES)
    figures = {s: mean_accuracy(soft_kmeans(some, s), some) for s in SHARPNESSES}
    assert figures[best] == max(figures.values())
