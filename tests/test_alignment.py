"""Maps between spaces: planted rotations, scipy, scikit-learn, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import sklearn.linear_model

from jaxling import kernels


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rcsls_oracle(w, x, y, source, target, k):
    """Equation 4 read literally, one pair after the other, in float64."""
    total = 0.0
    for a, b in zip(x, y):
        forward = np.sort(a @ w @ target.T)[::-1][:k].mean()
        backward = np.sort(source @ w @ b)[::-1][:k].mean()
        total += 2 * a @ w @ b - forward - backward
    return -total / len(x)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3])
def test_procrustes_recovers_a_planted_rotation(rng, noise):
    x = rng.normal(size=(300, 12))
    turn = scipy.linalg.qr(rng.normal(size=(12, 12)))[0]
    y = x @ turn + noise * rng.normal(size=x.shape)
    found = np.asarray(kernels.procrustes(x, y))
    # The error of the estimate falls as noise / sqrt(n); 1e-5 is float32 rounding.
    np.testing.assert_allclose(found, turn, atol=1e-5 + noise)
    expected = scipy.linalg.orthogonal_procrustes(x, y)[0]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(found.T @ found, np.eye(12), atol=1e-5)


def test_maps_are_batched_over_pairs(rng):
    x, y = rng.normal(size=(4, 30, 5)), rng.normal(size=(4, 30, 5))
    for solve in (kernels.procrustes, kernels.ridge_map):
        each = [solve(a, b) for a, b in zip(x, y)]
        np.testing.assert_allclose(solve(x, y), np.stack(each), atol=1e-5)


def test_procrustes_of_degenerate_pairs_is_still_orthogonal(rng):
    for x in (np.zeros((6, 4)), np.ones((1, 4)), rng.normal(size=(2, 4))):
        w = np.asarray(kernels.procrustes(x, x))
        np.testing.assert_allclose(w.T @ w, np.eye(4), atol=1e-5)
        np.testing.assert_allclose(x @ w, x, atol=1e-5)


@pytest.mark.parametrize("l2", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("n, d", [(40, 6), (5, 9)])
def test_ridge_map_matches_scikit_learn(rng, n, d, l2):
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, 3))
    if l2:
        model = sklearn.linear_model.Ridge(alpha=l2, fit_intercept=False)
        expected = model.fit(x, y).coef_.T
    else:
        expected = np.linalg.lstsq(x, y, rcond=None)[0]
    found = kernels.ridge_map(x, y, l2=l2)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_ridge_map_of_collinear_columns_has_the_least_norm(rng):
    x = np.repeat(rng.normal(size=(30, 2)), 2, axis=1)
    y = rng.normal(size=(30, 2))
    expected = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(kernels.ridge_map(x, y), expected, atol=1e-4)


def test_rcsls_loss_is_its_equation(rng):
    x, y = unit(rng.normal(size=(12, 5))), unit(rng.normal(size=(12, 6)))
    source, target = unit(rng.normal(size=(30, 5))), unit(rng.normal(size=(25, 6)))
    w = rng.normal(size=(5, 6))
    found = kernels.rcsls_loss(w, x, y, source, target, k=4)
    expected = rcsls_oracle(w, x, y, source, target, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_rcsls_gradient_matches_the_closed_form(rng):
    """At fixed neighbours the loss is linear in the map: its gradient is a sum."""
    x, y = (unit(rng.normal(size=(8, 4))).astype("f") for _ in range(2))
    source, target = (unit(rng.normal(size=(20, 4))).astype("f") for _ in range(2))
    w = rng.normal(size=(4, 4)).astype("f")
    k = 3
    expected = np.zeros((4, 4))
    for a, b in zip(x, y):
        near_target = target[np.argsort(-(a @ w @ target.T))[:k]].mean(0)
        near_source = source[np.argsort(-(source @ w @ b))[:k]].mean(0)
        expected -= 2 * np.outer(a, b)
        expected += np.outer(a, near_target) + np.outer(near_source, b)

    def loss(w):
        return kernels.rcsls_loss(w, x, y, source, target, k=k)

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(w)), expected / 8, atol=1e-5)


@pytest.mark.parametrize("spectral", [False, True])
def test_rcsls_lowers_its_loss_below_procrustes(rng, spectral):
    turn = scipy.linalg.qr(rng.normal(size=(10, 10)))[0]
    source = unit(rng.normal(size=(200, 10)))
    target = unit(source @ turn + 0.3 * rng.normal(size=source.shape))
    x, y = source[:60], target[:60]
    found = kernels.rcsls(x, y, source, target, steps=12, spectral=spectral)
    first = rcsls_oracle(np.asarray(kernels.procrustes(x, y)), x, y, source, target, 10)
    last = rcsls_oracle(np.asarray(found.map), x, y, source, target, 10)
    np.testing.assert_allclose(found.losses[0], first, rtol=1e-4)
    np.testing.assert_allclose(np.min(found.losses), last, rtol=1e-4)
    assert last < first - 1e-3
    if spectral:
        assert np.linalg.svd(found.map, compute_uv=False).max() <= 1 + 1e-5


def test_rcsls_steps_back_from_a_rate_that_is_too_large(rng):
    source = unit(rng.normal(size=(50, 6)))
    target = unit(rng.normal(size=(50, 6)))
    found = kernels.rcsls(
        *(source, target, source, target), steps=30, learning_rate=1e4, spectral=True
    )
    assert np.isfinite(found.losses).all()
    reached = kernels.rcsls_loss(found.map, source, target, source, target)
    np.testing.assert_allclose(reached, found.losses.min(), rtol=1e-4)


BAD = [
    (lambda x: kernels.procrustes(x, x[:2]), "paired rows"),
    (lambda x: kernels.procrustes(x, x[:, :2]), "same width"),
    (lambda x: kernels.ridge_map(x[0], x[0]), "paired rows"),
    (lambda x: kernels.rcsls(x, x, x, x, k=11), "`k` must be in"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_the_door_answers_with_the_value(rng, call, message):
    with pytest.raises(ValueError, match=message):
        call(rng.normal(size=(10, 4)))
