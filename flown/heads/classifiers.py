"""Few-shot classifiers that are linear in the features, for all tasks at once.

A head is one vector (W F + W,): the weight (W, F) and the bias (W,) of `nn.Linear(F, W)`.

    cosine     w_k = m_k / |m_k|,  m_k = mean x_i / |x_i|;      logits s w_k . x / |x|
    euclidean  w_k = 2 c_k, b_k = -|c_k|^2,  c_k = mean x_i;    logits -|x - c_k|^2 + |x|^2
    ridge      min_W |Y - X W - b|^2 + strength |W|^2, Y one-hot (Bertinetto et al. 1805.08136)
    probe      cross-entropy, AdamW, full batches (FLoWN A.4.2)

Functions of `Episodes` of features return logits (T, W Q, W). The functions `*_heads` take supports
(T, S, F) with labels (T, S), so that classes may differ in their number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flown.context.centroids import class_means, unit_means
from flown.tasks import Episodes

COSINE_SCALE = 10.0
STRENGTHS = tuple(10.0**power for power in range(-3, 5))


def accuracy(logits: Tensor, tasks: Episodes) -> Tensor:
    """Percent of each task's queries, (T,)."""
    return 100 * (logits.argmax(dim=2) == tasks.targets).float().mean(dim=1)


def apply_heads(heads: Tensor, query: Tensor) -> Tensor:
    """Logits (..., N, W) of heads (..., W F + W) at queries (..., N, F)."""
    ways = heads.shape[-1] // (query.shape[-1] + 1)
    weight, bias = heads.split([heads.shape[-1] - ways, ways], dim=-1)
    logits: Tensor = query @ weight.unflatten(-1, (ways, -1)).transpose(-1, -2) + bias[..., None, :]
    return logits


def _joined(weight: Tensor, bias: Tensor) -> Tensor:
    """Weights (T, W, F) and biases (T, W) as heads (T, W F + W)."""
    return torch.cat([weight.flatten(1), bias], dim=1)


def cosine_heads(support: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Heads (T, W F + W) for features of length 1; apply them to normalised queries."""
    means = unit_means(support, labels, ways)
    return _joined(COSINE_SCALE * means, means.new_zeros(means.shape[:2]))


def euclidean_heads(support: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Heads (T, W F + W) whose logits are -|x - c_k|^2, up to a term common to all classes."""
    means = class_means(support, labels, ways)
    return _joined(2 * means, -means.square().sum(dim=2))


def ridge_heads(support: Tensor, labels: Tensor, ways: int, strength: float = 1.0) -> Tensor:
    """Heads (T, W F + W) of ridge regression to one-hot labels; the bias is not penalised.

    Solved for S unknowns in place of F: W = X^T (X X^T + strength I)^-1 Y, X and Y centred.
    """
    member = F.one_hot(labels, ways).to(support.dtype)
    x_mean, y_mean = support.mean(dim=1, keepdim=True), member.mean(dim=1, keepdim=True)
    x, y = support - x_mean, member - y_mean
    gram = x @ x.transpose(1, 2)  # (T, S, S)
    gram.diagonal(dim1=1, dim2=2).add_(strength)
    weight = torch.linalg.solve(gram, y).transpose(1, 2) @ x  # (T, W, F)
    bias: Tensor = y_mean[:, 0] - (weight @ x_mean.transpose(1, 2))[..., 0]
    return _joined(weight, bias)


def probe_heads(
    support: Tensor,
    labels: Tensor,
    ways: int,
    *,
    epochs: int = 100,
    rate: float = 1e-3,
    decay: float = 1e-2,
    seed: int | None = None,
) -> Tensor:
    """Heads (T, W F + W) trained by AdamW on full batches.

    `flown.heads.probe` does the same faster, for many tasks with as many images in every class.

    Args:
        seed: of `nn.Linear`'s initialisation; by default heads start at zero, where all classes are alike.
    """
    tasks, _, features = support.shape
    heads = support.new_zeros(tasks, ways * features + ways)
    if seed is not None:
        first = torch.rand(heads.shape, generator=torch.Generator().manual_seed(seed))
        heads += ((2 * first - 1) / features**0.5).to(heads)
    heads.requires_grad_()
    optimizer = torch.optim.AdamW([heads], lr=rate, weight_decay=decay)
    for _ in range(epochs):
        logits = apply_heads(heads, support)
        # A task's loss is the mean over its images; no task's gradient depends on another task.
        loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum") / labels.shape[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads.detach()


def cosine_centroid(tasks: Episodes) -> Tensor:
    """The nearest centroid by cosine."""
    heads = cosine_heads(tasks.support, tasks.labels, tasks.ways)
    return apply_heads(heads, F.normalize(tasks.query, dim=2))


def euclidean_centroid(tasks: Episodes) -> Tensor:
    """The nearest centroid by distance."""
    return apply_heads(euclidean_heads(tasks.support, tasks.labels, tasks.ways), tasks.query)


def ridge(tasks: Episodes, strength: float = 1.0) -> Tensor:
    """Ridge regression; see `choose_strength`."""
    heads = ridge_heads(tasks.support, tasks.labels, tasks.ways, strength)
    return apply_heads(heads, tasks.query)


def linear_probe(tasks: Episodes, seed: int = 0) -> Tensor:
    """A linear layer trained from `nn.Linear`'s initialisation."""
    return apply_heads(probe_heads(tasks.support, tasks.labels, tasks.ways, seed=seed), tasks.query)


def choose(
    classify: Callable[[Episodes, float], Tensor], tasks: Episodes, numbers: Sequence[float]
) -> float:
    """The number with the highest accuracy on (validation) tasks; of equals the first."""
    means = [float(accuracy(classify(tasks, number), tasks).mean()) for number in numbers]
    return numbers[means.index(max(means))]


def choose_strength(tasks: Episodes, strengths: Sequence[float] = STRENGTHS) -> float:
    """The strength of ridge regression, as `choose`; of equals the smallest."""
    return choose(ridge, tasks, strengths)
