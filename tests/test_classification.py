"""Scores of many classifiers against scikit-learn, one by one."""

import numpy as np
import pytest
from sklearn import metrics

from jaxling import kernels


def test_scores_ignore_unlabelled_rows(rng):
    labels = rng.integers(-1, 2, size=(20, 57))
    scores = np.round(rng.normal(size=(20, 57)), 1).astype(np.float32)  # with ties
    scores[0] = 0.5
    found = {
        "accuracy": kernels.accuracy(scores > 0, labels),
        "balanced": kernels.balanced_accuracy(scores > 0, labels),
        "f1": kernels.f1(scores > 0, labels),
        "auc": kernels.auc(scores, labels),
    }
    for p in range(20):
        used = labels[p] >= 0
        y, guess = labels[p][used], scores[p][used] > 0
        expected = {
            "accuracy": metrics.accuracy_score(y, guess),
            "balanced": metrics.balanced_accuracy_score(y, guess),
            "f1": metrics.f1_score(y, guess),
            "auc": metrics.roc_auc_score(y, scores[p][used]),
        }
        for name, value in expected.items():
            assert float(found[name][p]) == pytest.approx(value, abs=1e-6), name


def test_scores_of_more_classes(rng):
    labels = rng.integers(-1, 4, size=(6, 90))
    guess = rng.integers(4, size=(6, 90))
    balanced = kernels.balanced_accuracy(guess, labels, classes=4)
    macro = kernels.f1(guess, labels, classes=4)
    for p in range(6):
        used = labels[p] >= 0
        pair = labels[p][used], guess[p][used]
        assert float(balanced[p]) == pytest.approx(
            metrics.balanced_accuracy_score(*pair), abs=1e-6
        )
        assert float(macro[p]) == pytest.approx(
            metrics.f1_score(*pair, average="macro"), abs=1e-6
        )


def test_area_under_the_curve_keeps_its_digits_over_many_rows(rng):
    labels = rng.integers(2, size=300_000)
    scores = (labels * 0.1 + rng.normal(size=300_000)).astype(np.float32)
    expected = metrics.roc_auc_score(labels, scores)
    assert float(kernels.auc(scores, labels)) == pytest.approx(expected, abs=2e-6)


def test_nothing_to_score_is_nan():
    none = np.full(3, -1)
    assert np.isnan(kernels.accuracy(np.zeros(3, int), none))
    assert np.isnan(kernels.auc(np.zeros(3), np.zeros(3, int)))


def test_problems_are_scored_on_their_own_rows(rng):
    x = rng.normal(size=(2, 90, 6)).astype(np.float32)
    labels = rng.integers(-1, 3, size=90)
    problems = kernels.one_vs_one(labels)
    folds = rng.integers(3, size=90)
    tests = kernels.only_folds(problems, folds)
    weights = rng.normal(size=(2, 9, 6)).astype(np.float32)
    intercepts = rng.normal(size=(2, 9)).astype(np.float32)
    found = kernels.evaluate(x, weights, intercepts, tests)
    pairs = np.stack(np.triu_indices(3, 1), axis=1)
    for layer in range(2):
        for p in range(9):
            a, b = pairs[p // 3]
            rows = ((labels == a) | (labels == b)) & (folds == p % 3)
            margin = x[layer][rows] @ weights[layer, p] + intercepts[layer, p]
            y = labels[rows] == b
            assert int(found.rows[layer, p]) == rows.sum()
            for name, value in (
                ("accuracy", metrics.accuracy_score(y, margin > 0)),
                ("auc", metrics.roc_auc_score(y, margin)),
            ):
                ours = float(getattr(found, name)[layer, p])
                assert ours == pytest.approx(value, abs=1e-6), name
    guess = np.asarray(kernels.predict(x[0], weights[0], intercepts[0]))
    np.testing.assert_array_equal(guess, (x[0] @ weights[0].T + intercepts[0] > 0).T)
    with pytest.raises(ValueError, match="`weights`"):
        kernels.evaluate(x, weights[:, :3], intercepts, tests)


def test_more_classes_are_scored_by_their_largest_margin(rng):
    x = rng.normal(size=(50, 4)).astype(np.float32)
    labels = rng.integers(3, size=50)
    problems = kernels.multinomial(labels)
    weights = rng.normal(size=(1, 3, 4)).astype(np.float32)
    intercepts = np.zeros((1, 3), np.float32)
    found = kernels.evaluate(x, weights, intercepts, problems)
    guess = (x @ weights[0].T).argmax(axis=1)
    assert float(found.accuracy[0]) == pytest.approx(np.mean(guess == labels))
    np.testing.assert_array_equal(kernels.predict(x, weights, intercepts)[0], guess)
    assert np.isnan(found.auc[0])
