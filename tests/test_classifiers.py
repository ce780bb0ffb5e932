"""Few-shot classifiers: against scikit-learn and PyTorch one task at a time, and their symmetries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from torch import Tensor, nn

from flown.base.errors import FlownError
from flown.context import CAML, CAMLConfig, FeatureSet
from flown.context.centroids import class_means
from flown.heads.classifiers import (
    accuracy,
    choose_strength,
    cosine_centroid,
    euclidean_centroid,
    linear_probe,
    probe_heads,
    ridge,
    ridge_heads,
)
from flown.heads.incontext import caml_logits, in_context
from flown.heads.maml import MAML, MAMLConfig, maml, train_maml
from flown.tasks import Episodes
from flown.training import TrainConfig

WIDE = 16


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(spread: float = 0.8) -> FeatureSet:
    """Thirty classes around random centres, twelve images each."""
    centres = torch.randn(30, WIDE, generator=seeded(1)).repeat_interleave(12, dim=0)
    features = centres + spread * torch.randn(centres.shape, generator=seeded(2))
    split = {"train": torch.arange(18), "val": torch.arange(18, 24), "test": torch.arange(24, 30)}
    return FeatureSet(features, torch.arange(30).repeat_interleave(12), split)


def draw(
    part: str = "test",
    ways: int = 5,
    shots: int = 2,
    queries: int = 3,
    count: int = 6,
    seed: int = 0,
) -> Episodes:
    known = clouds()
    drawn = known.pool(part).draw(ways, shots, queries, seeded(seed), count)
    return drawn.gather(known.features)


def fresh(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


@pytest.fixture(scope="module")
def caml() -> CAML:
    config = CAMLConfig(ways=7, feature_dim=WIDE, label_dim=16, layers=2, heads=4, mlp=32)
    return fresh(lambda: CAML(config))


@pytest.fixture(scope="module")
def meta() -> MAML:
    return fresh(lambda: MAML(MAMLConfig(features=WIDE, hidden=24, steps=3)))


Classifier = Callable[[Episodes], Tensor]


@pytest.fixture(scope="module")
def classifiers(caml: CAML, meta: MAML) -> dict[str, Classifier]:
    return {
        "cosine": cosine_centroid,
        "euclidean": euclidean_centroid,
        "ridge": ridge,
        "probe": linear_probe,
        "caml": lambda t: in_context(t, caml),
        "maml": lambda t: maml(t, meta),
    }


NAMES = ("cosine", "euclidean", "ridge", "probe", "caml", "maml")


# ---- every classifier


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ways", "shots"), [(2, 1), (5, 1), (6, 3)])
def test_any_number_of_ways_and_shots_above_chance(
    classifiers: dict[str, Classifier], name: str, ways: int, shots: int
) -> None:
    tasks = draw(ways=ways, shots=shots, count=40)
    logits = classifiers[name](tasks)
    assert logits.shape == (40, ways * 3, ways)
    assert not logits.requires_grad
    if name != "caml":  # which knows nothing before it is trained
        assert float(accuracy(logits, tasks).mean()) > 100 / ways + 15


@pytest.mark.parametrize("name", NAMES)
def test_tasks_do_not_see_each_other(classifiers: dict[str, Classifier], name: str) -> None:
    tasks = draw()
    whole = classifiers[name](tasks)
    first = classifiers[name](tasks.part(slice(2)))
    torch.testing.assert_close(first, whole[:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_order_within_a_class_changes_nothing(
    classifiers: dict[str, Classifier], name: str, seed: int
) -> None:
    tasks = draw(shots=3)
    order = torch.cat([3 * k + torch.randperm(3, generator=seeded(seed + k)) for k in range(5)])
    shuffled = tasks._replace(support=tasks.support[:, order])
    torch.testing.assert_close(
        classifiers[name](shuffled), classifiers[name](tasks), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["cosine", "euclidean", "ridge", "maml"])
@given(seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_renumbering_the_classes_renumbers_the_logits(
    classifiers: dict[str, Classifier], name: str, seed: int
) -> None:
    tasks = draw(shots=2)
    order = torch.randperm(5, generator=seeded(seed))
    rows = (order[:, None] * 2 + torch.arange(2)).flatten()
    renamed = tasks._replace(support=tasks.support[:, rows])
    before, after = classifiers[name](tasks), classifiers[name](renamed)
    torch.testing.assert_close(after, before[..., order], atol=1e-4, rtol=1e-4)


# ---- against references


def one_by_one(tasks: Episodes, fit: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    columns = (tasks.support, tasks.labels, tasks.query)
    return torch.stack([fit(*task) for task in zip(*columns, strict=True)])


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("shots", [1, 5])
def test_ridge_is_scikit_learns(strength: float, shots: int) -> None:
    tasks = draw(shots=shots)
    tasks = tasks._replace(support=tasks.support.double(), query=tasks.query.double())

    def fit(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        solved = Ridge(alpha=strength).fit(x.numpy(), F.one_hot(y).double().numpy())
        return torch.from_numpy(solved.predict(q.numpy()))

    torch.testing.assert_close(ridge(tasks, strength), one_by_one(tasks, fit))


def test_the_nearest_centroid_is_scikit_learns() -> None:
    tasks = draw(shots=3, count=30)

    def fit(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
        return torch.from_numpy(NearestCentroid().fit(x.numpy(), y.numpy()).predict(q.numpy()))

    assert torch.equal(euclidean_centroid(tasks).argmax(dim=2), one_by_one(tasks, fit))
    unit = tasks._replace(support=F.normalize(tasks.support, dim=2))
    means = unit.support.unflatten(1, (5, 3)).mean(dim=2)
    cosines = F.cosine_similarity(tasks.query[:, :, None], means[:, None], dim=3)
    torch.testing.assert_close(cosine_centroid(tasks), 10 * cosines, atol=1e-4, rtol=1e-4)


def test_the_mean_of_an_absent_class_is_zero() -> None:
    support = torch.tensor([[[1.0, 3.0], [3.0, 5.0], [0.0, 2.0]]])
    means = class_means(support, torch.tensor([[2, 2, 0]]), 3)
    assert means.tolist() == [[[0.0, 2.0], [0.0, 0.0], [2.0, 4.0]]]


def test_logits_of_the_euclidean_centroid_are_distances() -> None:
    tasks = draw(shots=1)
    distances = -torch.cdist(tasks.query, tasks.support).square()
    torch.testing.assert_close(
        euclidean_centroid(tasks).log_softmax(2), distances.log_softmax(2), atol=1e-3, rtol=1e-3
    )


def test_the_probe_is_pytorchs() -> None:
    tasks = draw(count=3)
    logits = []
    first = probe_heads(tasks.support, tasks.labels, 5, epochs=0, seed=0)
    for start, x, q in zip(first, tasks.support, tasks.query, strict=True):
        linear = nn.Linear(WIDE, 5)
        nn.utils.vector_to_parameters(start.clone(), linear.parameters())
        optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-3, weight_decay=1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(linear(x), tasks.labels[0]).backward()
            optimizer.step()
        logits.append(linear(q).detach())
    torch.testing.assert_close(linear_probe(tasks), torch.stack(logits), atol=1e-4, rtol=1e-4)


def test_a_probe_from_zero_does_not_know_the_classes_numbers() -> None:
    tasks = draw(shots=2, count=3)
    x, labels = tasks.support.double(), tasks.labels
    order = torch.tensor([3, 0, 4, 1, 2])
    heads = (
        probe_heads(x, numbers, 5)[:, :-5].unflatten(1, (5, -1))
        for numbers in (labels, order[labels])
    )
    before, after = heads
    torch.testing.assert_close(after[:, order], before)


def test_classes_of_different_numbers_of_images() -> None:
    x, labels = torch.randn(1, 7, WIDE, generator=seeded(3)), torch.tensor([[2, 0, 0, 1, 0, 2, 0]])
    head = ridge_heads(x, labels, 3, 2.0)[0]
    solved = Ridge(alpha=2.0).fit(x[0].numpy(), F.one_hot(labels[0]).numpy())
    expected = torch.from_numpy(solved.coef_).flatten().float()
    torch.testing.assert_close(head[:-3], expected, atol=1e-4, rtol=1e-4)


def test_the_ridge_strength_is_the_best_of_those_given() -> None:
    tasks = draw("val", shots=1, count=60)
    means = {s: float(accuracy(ridge(tasks, s), tasks).mean()) for s in (1e-3, 1.0, 1e4)}
    assert means[choose_strength(tasks, tuple(means))] == max(means.values())


# ---- CAML


def test_caml_in_parts_is_caml(caml: CAML, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = draw(shots=2)
    whole = in_context(tasks, caml)
    monkeypatch.setattr("flown.heads.incontext._TOKENS", 50)
    torch.testing.assert_close(in_context(tasks, caml), whole, atol=1e-5, rtol=1e-5)


def test_labels_of_one_frame_are_exchangeable(caml: CAML) -> None:
    """Another frame of the same angles, read by the classifier rotated with it: the same answers."""
    tasks = draw(shots=2)
    order = torch.randperm(7, generator=seeded(5))
    turned = fresh(lambda: CAML(caml.config))
    turned.load_state_dict(caml.state_dict())
    with torch.no_grad():
        turned.label_elmes.copy_(caml.label_elmes[order])
        turned.output_proj.weight.copy_(caml.output_proj.weight[order])
    labels = tasks.labels
    inverse = order.argsort()
    before = caml_logits(caml, tasks.support, labels, tasks.query, 7)
    after = caml_logits(turned, tasks.support, inverse[labels], tasks.query, 7)
    torch.testing.assert_close(after[..., inverse], before, atol=1e-4, rtol=1e-4)


def test_more_ways_than_caml_knows_are_refused(caml: CAML) -> None:
    x = torch.zeros(1, 8, WIDE)
    with pytest.raises(FlownError, match="8 classes, it was trained for up to 7; use another head"):
        caml_logits(caml, x, torch.arange(8)[None], x, 8)


# ---- MAML


def test_an_inner_step_descends_the_supports_gradient(meta: MAML) -> None:
    tasks = draw(shots=2, count=2)
    labels = tasks.labels[0]
    for task in range(2):
        start = [p.detach().clone() for p in meta.start]
        weights = [start[0], start[1], start[2].repeat(5, 1), start[3].repeat(5)]
        for _ in range(meta.config.steps):
            weights = [p.detach().requires_grad_() for p in weights]
            hidden = F.linear(tasks.support[task], weights[0], weights[1]).relu()
            slopes = torch.autograd.grad(
                F.cross_entropy(F.linear(hidden, *weights[2:]), labels), weights
            )
            weights = [p - r * s for p, r, s in zip(weights, meta.rates.exp(), slopes, strict=True)]
        expected = F.linear(
            F.linear(tasks.query[task], weights[0], weights[1]).relu(), *weights[2:]
        )
        torch.testing.assert_close(maml(tasks, meta)[task], expected.detach(), atol=1e-5, rtol=1e-4)


def test_meta_training_helps_and_resumes(tmp_path: Path) -> None:
    config = MAMLConfig(features=WIDE, hidden=24, steps=5, rate=0.03)
    tasks = draw(shots=1, count=100)
    before = accuracy(maml(tasks, fresh(lambda: MAML(config))), tasks).mean()
    training = TrainConfig(
        steps=150,
        batch_size=8,
        learning_rate=1e-2,
        warmup=5,
        ema=0.9,
        validate_every=75,
        checkpoint_every=75,
    )
    model = train_maml([clouds()], config, training, out=tmp_path)
    after = accuracy(maml(tasks, model), tasks).mean()
    assert after > before + 5, (before, after)
    again = train_maml([clouds()], config, training, out=tmp_path, resume=True)
    assert torch.equal(again.start[0], model.start[0])


def test_meta_training_refuses(tmp_path: Path, meta: MAML) -> None:
    known = clouds()
    leaking = FeatureSet(
        known.features, known.labels, {**known.class_split, "val": torch.arange(9)}
    )
    for sets, message in (([], "no set of features"), ([leaking], "class 0 is in both 'train'")):
        with pytest.raises(FlownError, match=message):
            train_maml(sets, meta.config, TrainConfig(steps=1), out=tmp_path)
    with pytest.raises(FlownError, match="features have 3 numbers, it was trained on 16"):
        meta(torch.zeros(1, 2, 3), torch.tensor([[0, 1]]), torch.zeros(1, 1, 3), 2)
