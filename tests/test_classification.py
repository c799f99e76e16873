"""Scores of many classifiers against scikit-learn, one by one."""

import jax
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


def test_infinite_scores_are_tied_and_unknown_ones_are_nan():
    inf = np.inf
    scores = np.array([inf, inf, 0.3, -inf, inf, -inf], np.float32)
    labels = np.array([0, 1, 0, 0, 1, 1])
    assert float(kernels.auc(scores, labels)) == pytest.approx(5.5 / 9, abs=1e-6)
    # Rows that do not count stay behind those at infinity, whatever their score.
    padded = np.append(scores, [inf, -inf, np.nan]), np.append(labels, [-1] * 3)
    assert float(kernels.auc(*padded)) == pytest.approx(5.5 / 9, abs=1e-6)
    traced = jax.jit(kernels.auc)(*padded)
    assert float(traced) == pytest.approx(5.5 / 9, abs=1e-6)
    rows = np.stack([scores, np.where(labels == 0, np.nan, scores)])
    found = np.asarray(kernels.auc(rows, np.stack([labels, labels])))
    np.testing.assert_array_equal(np.isnan(found), [False, True])


@pytest.mark.parametrize("wrong", [-2, 2, 0.5])
def test_labels_of_the_area_are_two_classes(wrong):
    labels = np.array([0, 1, wrong])
    with pytest.raises(ValueError, match=f"`labels` must be 1 or 0.* got {wrong}"):
        kernels.auc(np.arange(3.0), labels)
    assert float(kernels.auc(np.arange(3), np.array([0, 1, 1], np.uint8))) == 1
    assert float(kernels.auc(np.arange(3), np.array([False, True, True]))) == 1


def test_what_is_wrong_is_named(rng):
    x, weights = np.ones((5, 3), np.float32), np.ones((2, 3), np.float32)
    intercepts = np.ones(2, np.float32)
    for match, arguments in (
        (r"`x` must be \[n, d\]", (x[0], weights, intercepts)),
        (r"`x` must be \[n, d\]", (x[None], weights, intercepts)),
        ("d = 3", (x, weights[:, :2], intercepts)),
        ("`weights`", (x, weights[0], intercepts)),
        ("`intercepts`", (x, weights, intercepts[:1])),
        ("`intercepts`", (x, weights, 1.0)),
    ):
        for function in (kernels.decision, kernels.predict):
            with pytest.raises(ValueError, match=match):
                function(*arguments)
    problems = kernels.one_vs_rest(np.array([0, 1, 0, 1, 1]))
    unknown = np.stack([x, x])
    unknown[1, 3, 2] = np.nan
    for match, arguments in (
        (r"\[layer, n, d\]", (x[0], weights, intercepts)),
        ("one layer", (x[None][:0], weights[None][:0], intercepts[None][:0])),
        ("row 3 of layer 1", (unknown, np.stack([weights] * 2), np.ones((2, 2)))),
    ):
        with pytest.raises(ValueError, match=match):
            kernels.evaluate(*arguments, problems)
