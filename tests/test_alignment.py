"""Maps between spaces: planted rotations, scipy, scikit-learn, laws, gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.linalg
import sklearn.linear_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxling import kernels

laws = settings(max_examples=25, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
# Small whole numbers: ranks are lost, rows are equal or zero.
rows = hnp.arrays(np.float32, (9, 4), elements=st.integers(-3, 3).map(np.float32))


def rotation(rng, d):
    return scipy.linalg.qr(rng.normal(size=(d, d)))[0]


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


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


def test_maps_of_degenerate_pairs_are_defined(rng):
    for x in (np.zeros((6, 4)), np.ones((1, 4)), rng.normal(size=(2, 4))):
        w = np.asarray(kernels.procrustes(x, x))
        np.testing.assert_allclose(w.T @ w, np.eye(4), atol=1e-5)
        np.testing.assert_allclose(x @ w, x, atol=1e-5)
        fitted = np.asarray(kernels.ridge_map(x, x))
        np.testing.assert_allclose(fitted, np.linalg.pinv(x) @ x, atol=1e-5)
    x = rng.normal(size=(8, 4))  # identical spaces
    np.testing.assert_allclose(kernels.procrustes(x, x), np.eye(4), atol=1e-5)
    np.testing.assert_allclose(kernels.ridge_map(x, x), np.eye(4), atol=1e-5)


@laws
@given(rows, rows, seeds)
def test_no_rotation_comes_closer_than_procrustes(x, y, rng):
    """On any rows at all: the map is orthogonal, and it is the best one."""
    w = np.asarray(kernels.procrustes(x, y), np.float64)
    np.testing.assert_allclose(w.T @ w, np.eye(4), atol=1e-5)
    reached = np.linalg.norm(x @ w - y)
    assert reached <= np.linalg.norm(x @ rotation(rng, 4) - y) + 1e-4
    assert reached <= np.linalg.norm(x - y) + 1e-4


@laws
@given(seeds, st.floats(-3, 3))
def test_procrustes_turns_with_its_target_and_ignores_scale_and_order(rng, exponent):
    x, y, turn = rng.normal(size=(9, 4)), rng.normal(size=(9, 4)), rotation(rng, 4)
    singular = np.linalg.svd(x.T @ y, compute_uv=False)
    # float32 rounding of x^T y, over the smallest sum of its singular values
    within = 1e-5 * (1 + singular[0] / (singular[-1] + singular[-2]))
    w = np.asarray(kernels.procrustes(x, y))
    order = rng.permutation(9)
    for found, expected in [
        (kernels.procrustes(x[order], y[order]), w),
        (kernels.procrustes(10.0**exponent * x, y), w),
        (kernels.procrustes(x, y @ turn), w @ turn),
        (kernels.procrustes(x @ turn, y), turn.T @ w),
        (kernels.procrustes(y, x), w.T),
    ]:
        np.testing.assert_allclose(found, expected, atol=within)


@laws
@given(rows, rows, seeds, st.sampled_from([0.5, 3.0]))
def test_a_ridge_map_turns_and_scales_with_its_sides(x, y, rng, l2):
    w = np.asarray(kernels.ridge_map(x, y, l2=l2))
    turn, order = rotation(rng, 4), rng.permutation(9)
    for found, expected in [
        (kernels.ridge_map(x[order], y[order], l2=l2), w),
        (kernels.ridge_map(x @ turn, y, l2=l2), turn.T @ w),
        (kernels.ridge_map(x, y @ turn, l2=l2), w @ turn),
        (kernels.ridge_map(x, 4 * y, l2=l2), 4 * w),
        (kernels.ridge_map(4 * x, y, l2=16 * l2), w / 4),
    ]:
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_float64_is_kept_where_it_is_enabled(rng, float64):
    x, y = rng.normal(size=(30, 5)), rng.normal(size=(30, 5))
    turn = kernels.procrustes(x, y)
    assert turn.dtype == np.float64
    expected = scipy.linalg.orthogonal_procrustes(x, y)[0]
    np.testing.assert_allclose(turn, expected, atol=1e-12)
    model = sklearn.linear_model.Ridge(alpha=2.0, fit_intercept=False).fit(x, y)
    fitted = kernels.ridge_map(x, y, l2=2.0)
    np.testing.assert_allclose(fitted, model.coef_.T, atol=1e-12)


def differences(f, x, direction, step=1e-6):
    return (f(x + step * direction) - f(x - step * direction)) / (2 * step)


def test_the_gradient_of_procrustes_survives_equal_singular_values(rng, float64):
    """The derivative of an SVD does not; `x^T y` has four equal singular values."""
    turn, weight = rotation(rng, 4), rng.normal(size=(4, 4))
    y = rng.normal(size=(9, 4))

    def f(a):
        return jnp.sum(weight * kernels.procrustes(a[:, :4], a[:, 4:]))

    equal = np.concatenate([np.eye(4), turn], 1)
    for at in (equal, np.concatenate([y @ turn, y], 1)):
        direction = rng.normal(size=at.shape)
        slope = np.sum(jax.grad(f)(at) * direction)
        np.testing.assert_allclose(slope, differences(f, at, direction), rtol=1e-6)
    gradient = jax.grad(f)(np.zeros((3, 8)))
    np.testing.assert_array_equal(gradient, np.zeros((3, 8)))


@pytest.mark.parametrize("n, l2", [(9, 0.0), (9, 2.0), (3, 0.0), (3, 2.0), (4, 1.0)])
def test_the_gradient_of_a_ridge_map_in_both_sides_and_penalty(rng, float64, n, l2):
    y, weight = rng.normal(size=(n, 3)), rng.normal(size=(4, 3))

    def f(a, l2):
        return jnp.sum(weight * kernels.ridge_map(a[:, :4], a[:, 4:], l2=l2))

    for x in (rng.normal(size=(n, 4)), np.eye(n, 4)):  # distinct, equal singular values
        at = np.concatenate([x, y], 1)
        direction = rng.normal(size=at.shape)
        by_rows, by_penalty = jax.grad(f, (0, 1))(at, l2)
        expected = differences(lambda a: f(a, l2), at, direction)
        np.testing.assert_allclose(np.sum(by_rows * direction), expected, rtol=1e-6)
        if l2:
            expected = differences(functools.partial(f, at), l2, 1.0)
            np.testing.assert_allclose(by_penalty, expected, rtol=1e-6)


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


def relaxed(rng, n=12, p=30, q=25, d=5, e=6):
    sizes = [(n, d), (n, e), (p, d), (q, e)]
    return [unit(rng.normal(size=size)) for size in sizes]


def test_rcsls_loss_and_gradient_are_those_of_its_equation(rng, monkeypatch):
    monkeypatch.setattr(kernels.alignment, "_TILE", 5)  # 12 pairs: a ragged last tile
    sides = relaxed(rng)
    w = rng.normal(size=(5, 6))
    expected, slope = oracles.rcsls(w, *sides, 4)

    def loss(w):
        return kernels.rcsls_loss(w, *sides, k=4)

    found, gradient = jax.value_and_grad(loss)(jnp.asarray(w, "float32"))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)


@laws
@given(seeds)
def test_rcsls_loss_turns_with_its_spaces_and_ignores_order(rng):
    x, y, source, target = relaxed(rng)
    w, left, right = rng.normal(size=(5, 6)), rotation(rng, 5), rotation(rng, 6)
    before = kernels.rcsls_loss(w, x, y, source, target, k=4)
    pairs, order = rng.permutation(12), rng.permutation(25)
    for after in (
        kernels.rcsls_loss(w, x[pairs], y[pairs], source[::-1], target[order], k=4),
        kernels.rcsls_loss(
            left.T @ w @ right, x @ left, y @ right, source @ left, target @ right, k=4
        ),
        kernels.rcsls_loss(2 * w, x / 2, y, source / 2, target, k=4),
    ):
        np.testing.assert_allclose(after, before, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.05, 1.0, 40.0])
@pytest.mark.parametrize("spectral", [False, True])
def test_rcsls_takes_the_published_steps(rng, float64, spectral, rate):
    x, y, source, target = relaxed(rng, n=20, d=5, e=5)
    y = unit(x @ rotation(rng, 5) + 0.3 * y)
    knobs = {"k": 3, "steps": 15, "spectral": spectral}
    found = kernels.rcsls(x, y, source, target, learning_rate=rate, **knobs)
    start = scipy.linalg.orthogonal_procrustes(x, y)[0]
    sides = (start, x, y, source, target)
    losses, maps = oracles.rcsls_descent(*sides, rate=rate, **knobs)
    np.testing.assert_allclose(found.losses, losses, atol=1e-9)
    np.testing.assert_allclose(found.map, maps[losses.argmin()], atol=1e-9)
    assert losses.min() < losses[0]
    if spectral:
        assert np.linalg.svd(found.map, compute_uv=False).max() <= 1 + 1e-12
    rises = np.any(np.diff(losses) > 0)
    assert rises == (spectral and rate >= 1)  # unconstrained, it has no lower bound
    if not rises:
        knobs = {"k": 3, "niter": 14, "spectral": spectral}  # one more step is taken
        script, final = oracles.rcsls_script(*sides, rate=rate, **knobs)
        np.testing.assert_allclose(losses[:-1], script, atol=1e-12)
        np.testing.assert_allclose(found.map, final, atol=1e-9)


@pytest.mark.parametrize("rate", [3e38, np.inf])
def test_rcsls_returns_from_steps_that_leave_the_numbers(rng, rate):
    sides = relaxed(rng, n=20, d=5, e=5)
    found = kernels.rcsls(*sides, k=3, steps=8, learning_rate=rate)
    assert not np.isfinite(found.losses).all()  # else the test would say nothing
    assert np.isfinite(found.map).all()
    reached = kernels.rcsls_loss(found.map, *sides, k=3)
    finite = found.losses[np.isfinite(found.losses)]
    np.testing.assert_allclose(reached, finite.min(), rtol=1e-5)
    unknown = [*sides[:3], np.where(np.arange(25)[:, None] == 3, np.nan, sides[3])]
    found = kernels.rcsls(*unknown, k=3, steps=2)
    np.testing.assert_array_equal(found.map, kernels.procrustes(*sides[:2]))
    assert np.isnan(found.losses).all()


def test_a_pair_that_is_not_finite_has_no_map_and_spoils_no_other(rng):
    x, y = rng.normal(size=(2, 9, 4)), rng.normal(size=(2, 9, 4))
    for bad in (np.nan, np.inf):
        x[1, 3, 2] = bad
        for found in (
            kernels.procrustes(x, y),
            kernels.procrustes(y, x),
            kernels.ridge_map(x, y),
            kernels.ridge_map(y, x, l2=1.0)[..., 2],  # the column of y that has it
            kernels.rcsls(x, y, x, y, k=2, steps=2).map,
            kernels.rcsls_loss(np.eye(4), x, y, x, y, k=2),
            kernels.rcsls_loss(np.eye(4), y, x, y, x, k=2),
        ):
            assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


def test_rcsls_is_batched_and_holds_no_scores_of_all_pairs(rng):
    many = [np.stack(sides) for sides in zip(relaxed(rng, e=5), relaxed(rng, e=5))]
    together = kernels.rcsls(*many, k=3, steps=4)
    for i in range(2):
        alone = kernels.rcsls(*(side[i] for side in many), k=3, steps=4)
        np.testing.assert_allclose(together.losses[i], alone.losses, atol=1e-5)
        np.testing.assert_allclose(together.map[i], alone.map, atol=1e-4)
    n, q = 1031, 1201
    sides = [np.zeros((rows, 5), "f") for rows in (n, n, 1109, q)]
    program = jax.make_jaxpr(jax.grad(kernels.rcsls_loss))(np.eye(5), *sides)
    shapes = {
        frozenset(s.split(",")) for s in re.findall(r"\[([\d,]+)\]", str(program))
    }
    assert not any(
        {str(n), keys} <= shape for shape in shapes for keys in ("1109", "1201")
    )
    assert {"256", "1109"} in shapes and {"256", "1201"} in shapes


BAD = [
    (lambda x: kernels.procrustes(x, x[:2]), "paired rows"),
    (lambda x: kernels.procrustes(x[:0], x[:0]), "not empty"),
    (lambda x: kernels.procrustes(x, x[:, :2]), "same width"),
    (lambda x: kernels.ridge_map(x[0], x[0]), "paired rows"),
    (lambda x: kernels.ridge_map(x, 1j * x), "real .* complex64"),
    (lambda x: kernels.ridge_map(np.stack([x] * 2), np.stack([x] * 3)), "that broad"),
    (lambda x: kernels.rcsls_loss(1j * np.eye(4), x, x, x, x), "real .* complex64"),
    (lambda x: kernels.ridge_map(x, x, l2=-1.0), "`l2` must be at least 0; got -1.0"),
    (lambda x: kernels.rcsls(x, x, x, x, k=11), "`k` must be in"),
    (lambda x: kernels.rcsls(x, x, x, x[:, :2]), "`target` must be rows of width 4"),
    (lambda x: kernels.rcsls(x, x, x, x, steps=-1), "`steps` must be at least 0"),
    (lambda x: kernels.rcsls(x, x, x, x, initial=np.eye(3)), "`initial` must be"),
    (lambda x: kernels.rcsls_loss(np.eye(3), x, x, x, x), r"`w` must be .*4, 4"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_the_door_answers_with_the_value(rng, call, message):
    with pytest.raises(ValueError, match=message):
        call(rng.normal(size=(10, 4)))
