"""The estimator in scikit-learn's hands, on digits and glyphs that its generator never saw."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

import flown
from flown.heads.images import as_images
from flown.heads.unknown import distances, limit

Arrays = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def digits() -> Arrays:
    """Images (1797, 8, 8) in [0, 1], and labels."""
    found = load_digits()
    return found.images / 16, found.target


def small(**options: Any) -> flown.ImageClassifier:
    return flown.ImageClassifier(n=4, net="cnn-small", **options)


def test_a_few_images_make_a_classifier(digits: Arrays) -> None:
    images, labels = digits
    classifier = small().fit(images[:100], labels[:100])
    assert classifier.classes_.tolist() == list(range(10))
    p = classifier.predict_proba(images[100:400])
    assert p.shape == (300, 10)
    np.testing.assert_allclose(p.sum(axis=1), 1)
    assert (classifier.predict(images[100:400]) == p.argmax(axis=1)).all()
    assert classifier.score(images[100:400], labels[100:400]) > 0.8


def test_same_seed_same_answers_and_a_pickle_keeps_them(digits: Arrays) -> None:
    images, labels = digits
    first, second = (small(seed=3).fit(images[:60], labels[:60]) for _ in range(2))
    kept = pickle.loads(pickle.dumps(first))
    for other in (second, kept):
        np.testing.assert_array_equal(
            first.predict_proba(images[60:90]), other.predict_proba(images[60:90])
        )


def test_it_is_scikit_learns(digits: Arrays) -> None:
    """Cloned, in a pipeline, in cross-validation, on flat rows of pixels."""
    rows, labels = load_digits(return_X_y=True)
    model = small(unknown=0.05)
    assert clone(model).get_params() == model.get_params()
    pipeline = make_pipeline(FunctionTransformer(lambda x: x / 16), small())
    scores = cross_val_score(pipeline, rows[:200], labels[:200], cv=2)
    assert scores.shape == (2,) and scores.mean() > 0.75


def test_labels_may_be_words_and_images_files(digits: Arrays, tmp_path: Path) -> None:
    images, labels = digits
    words = np.array(["zero", "one", "two"])
    chosen = np.flatnonzero(labels < 3)[:30]
    paths = []
    for row in chosen:
        picture = Image.fromarray((images[row] * 255).astype(np.uint8)).resize((20, 24))
        paths.append(tmp_path / f"{row}.png")
        picture.save(paths[-1])
    classifier = small().fit(paths, words[labels[chosen]])
    assert classifier.classes_.tolist() == ["one", "two", "zero"]
    assert classifier.networks_.task.classes == ("one", "two", "zero")
    opened = []
    for path in paths:
        with Image.open(path) as picture:
            opened.append(picture.copy())
    assert (classifier.predict(opened) == classifier.predict([str(p) for p in paths])).all()
    assert classifier.score(paths, words[labels[chosen]]) > 0.9


def test_images_of_no_class_are_unknown(digits: Arrays) -> None:
    images, labels = digits
    # In random order: the data set is sorted by writers, and others write otherwise.
    known = np.random.default_rng(0).permutation(np.flatnonzero(labels < 5))
    fitted, asked = known[:100], known[100:400]
    classifier = flown.ImageClassifier(n=4, unknown=0.1).fit(images[fitted], labels[fitted])
    answers = classifier.predict(images[asked])
    assert (answers == -1).mean() < 0.2
    strange = images[labels > 4][:300]
    assert (classifier.predict(strange) == -1).mean() > 0.5
    assert ((classifier.novelty(strange) > 1) == (classifier.predict(strange) == -1)).all()
    named = small(unknown=0.1).fit(images[fitted], labels[fitted].astype(str))
    assert set(named.predict(strange)) <= {"0", "1", "2", "3", "4", "unknown"}


def test_the_limit_is_a_conformal_quantile() -> None:
    """An exchangeable new distance exceeds it with a probability of at most the rate."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(4000, 60, generator=generator)
    for rate in (0.05, 0.2):
        beyond = [float(row[-1]) > limit(row[:-1], rate) for row in draws]
        assert abs(np.mean(beyond) - rate) < 0.02
    assert limit(torch.tensor([3.0, 1.0, 2.0]), 0.05) == 3


def test_distances_are_to_the_nearest_mean_of_a_class() -> None:
    support = torch.tensor([[[0.0, 0], [2, 0], [0, 9]]])
    query = torch.tensor([[[1.0, 1], [0, 6]]])
    found = distances(support, torch.tensor([0, 0, 1]), 2, query)
    torch.testing.assert_close(found, torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((3, 28, 28), np.uint8),
        np.zeros((3, 28, 28, 3)),
        np.zeros((3, 1, 28, 28), np.float32),
        torch.zeros(3, 3, 28, 28),
        np.zeros((3, 784)),
        [np.zeros((28, 28), np.uint8), np.zeros((20, 30, 3), np.uint8), torch.zeros(1, 9, 9)],
    ],
)
def test_images_of_many_kinds(images: Any) -> None:
    found = as_images(images)
    assert found.dtype == torch.uint8 and found.ndim == 4 and len(found) == 3


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "none were given"),
        (np.zeros((0, 8, 8)), "none were given"),
        (np.zeros((3, 10)), "no square images"),
        (np.full((3, 8, 8), 2.0), "must lie in"),
        (np.full((3, 8, 8), np.nan), "NaN"),
        (np.zeros((3, 8, 8), np.int64), "expected uint8 or floats"),
        (np.zeros((3, 8, 8, 5), np.uint8), "expected"),
        ("a.png", "expected an array"),
        (["nowhere.png"], "nowhere.png"),
        ([None], "number 0 is NoneType"),
        (7, "int"),
    ],
)
def test_bad_images(images: Any, message: str) -> None:
    with pytest.raises(flown.FlownError, match=message):
        as_images(images)


def test_bad_fits(digits: Arrays) -> None:
    images, labels = digits
    for options, x, y, message in (
        ({}, images[:9], labels[:8], "9 images and labels"),
        ({}, images[:9], np.zeros(9), "has 1 classes"),
        ({"generator": "flown-small"}, images[:20], labels[:20], "of its training alone"),
        ({"generator": "nothing"}, images[:20], labels[:20], "nothing"),
        ({"unknown": 1.5}, images[:20], labels[:20], "between 0 and 1"),
        ({"unknown": 0.1}, images[:2], np.array([0, 1]), "two images of a class"),
        ({"unknown": 0.1}, images[:4], np.array([-1, 0, -1, 0]), "a class is called -1"),
    ):
        with pytest.raises(flown.FlownError, match=message):
            small(**options).fit(x, y)
    with pytest.raises(flown.FlownError, match="fitted without"):
        small().fit(images[:20], labels[:20]).novelty(images[:2])


def test_arrays_are_read_however_they_lie_in_memory(digits: Arrays) -> None:
    images, _ = digits
    turned = images[:5, ::-1]
    assert torch.equal(as_images(turned), as_images(turned.copy()))
