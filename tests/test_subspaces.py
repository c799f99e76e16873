"""Angles and CKA against scipy, the Gram matrices, laws and planted truth."""

import functools
import re

import jax
import numpy as np
import pytest
import scipy.linalg
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxling import kernels

laws = settings(max_examples=25, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
# Small whole numbers: ranks are lost, rows are equal or zero.
rows = hnp.arrays(np.float32, (9, 4), elements=st.integers(-3, 3).map(np.float32))

SHAPES = [(40, 5, 5), (40, 7, 3), (6, 9, 4), (5, 5, 8)]  # tall, ragged, n < d


def angles_oracle(a, b, center):
    """Cosines by scipy on float64, padded with the missing (orthogonal) directions."""
    if center:
        a, b = a - a.mean(0), b - b.mean(0)
    found = np.sort(np.cos(scipy.linalg.subspace_angles(a, b)))[::-1]
    return np.pad(found, (0, min(a.shape[1], b.shape[1], len(a)) - len(found)))


def cka_oracle(x, y):
    """The Gram form of linear CKA, n by n, in float64."""
    n = len(x)
    centring = np.eye(n) - 1 / n
    k, m = centring @ (x @ x.T) @ centring, centring @ (y @ y.T) @ centring
    return np.sum(k * m) / np.sqrt(np.sum(k * k) * np.sum(m * m))


def hsic_oracle(k, m):
    """The unbiased estimate from two Gram matrices, term by term."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    return (
        np.trace(k @ m)
        + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ k @ m @ one)
    ) / (n * (n - 3))


def debiased_oracle(x, y):
    k, m = x @ x.T, y @ y.T
    return hsic_oracle(k, m) / np.sqrt(hsic_oracle(k, k) * hsic_oracle(m, m))


def rotation(rng, d):
    return scipy.linalg.qr(rng.normal(size=(d, d)))[0]


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("n, p, q", SHAPES)
def test_principal_angles_match_scipy(rng, n, p, q, center):
    a, b = rng.normal(size=(n, p)), rng.normal(size=(n, q))
    b[:, 0] = a[:, 0]  # one shared direction
    cosines = kernels.principal_angles(a, b, center=center)
    # float32 QR and SVD of tens of rows: a few dozen roundings of 6e-8.
    np.testing.assert_allclose(cosines, angles_oracle(a, b, center), atol=2e-5)
    assert np.all(np.diff(cosines) <= 1e-6)


def test_principal_angles_of_a_rank_deficient_matrix_do_not_invent_directions(rng):
    a = rng.normal(size=(50, 3))
    a[:, 2] = a[:, 0] + a[:, 1]
    b = np.concatenate([a[:, :2], rng.normal(size=(50, 1))], 1)
    cosines = np.asarray(kernels.principal_angles(a, b))
    np.testing.assert_allclose(cosines, [1, 1, 0], atol=1e-5)


def test_principal_angles_do_not_depend_on_the_basis(rng):
    a, b = rng.normal(size=(60, 6)), rng.normal(size=(60, 4))
    mixed = a @ rng.normal(size=(6, 6))
    before, after = (kernels.principal_angles(z, b) for z in (a, mixed))
    np.testing.assert_allclose(before, after, atol=2e-5)


def test_principal_angles_are_batched(rng):
    a, b = rng.normal(size=(3, 20, 4)), rng.normal(size=(20, 5))
    together = kernels.principal_angles(a, b)
    assert together.shape == (3, 4)
    np.testing.assert_allclose(
        together[1], kernels.principal_angles(a[1], b), atol=1e-6
    )


@pytest.mark.parametrize("n, p, q", [(30, 4, 4), (30, 6, 2), (5, 8, 3)])
def test_cka_matches_the_gram_form(rng, n, p, q):
    x, y = rng.normal(size=(n, p)) + 3, rng.normal(size=(n, q))
    y[:, 0] += x[:, 0]
    # Sums of n * p float32 products; centring removes most of the offset's digits.
    np.testing.assert_allclose(kernels.linear_cka(x, y), cka_oracle(x, y), atol=2e-5)
    found = kernels.debiased_linear_cka(x, y)
    np.testing.assert_allclose(found, debiased_oracle(x, y), atol=2e-4)


@laws
@given(rows, rows, seeds, st.integers(-12, 12))
def test_angles_and_cka_ignore_rotation_scale_shift_and_order(x, y, rng, exponent):
    """On any rows: of lower rank, equal, zero."""
    scale, turn, order = np.float32(10.0) ** exponent, rotation(rng, 4), None
    order = rng.permutation(9)
    for measure, moved in [
        (lambda a, b: kernels.principal_angles(a, b), 0),
        (lambda a, b: kernels.principal_angles(a, b, center=True), 5),
        (kernels.linear_cka, 5),
    ]:
        before = np.asarray(measure(x, y))
        assert np.all((before >= 0) & (before <= 1 + 1e-5) | np.isnan(before))
        for after in (
            measure(scale * x, y),
            measure(x @ turn, y),
            measure(x + moved, y),
            measure(x[order], y[order]),
            measure(y, x),
        ):
            np.testing.assert_allclose(after, before, atol=5e-5)


@laws
@given(seeds, st.integers(-12, 12))
def test_debiased_cka_ignores_rotation_scale_shift_and_order(rng, exponent):
    x, y, turn = rng.normal(size=(9, 4)), rng.normal(size=(9, 4)), rotation(rng, 4)
    before, order = kernels.debiased_linear_cka(x, y), rng.permutation(9)
    own = [hsic_oracle(z @ z.T, z @ z.T) / np.sum((z @ z.T) ** 2) for z in (x, y)]
    assume(min(own) > 1e-4)  # else the denominator is all rounding
    for after in (
        kernels.debiased_linear_cka(10.0**exponent * x @ turn, y),
        kernels.debiased_linear_cka(x + 5, y - 1),
        kernels.debiased_linear_cka(x[order], y[order]),
        kernels.debiased_linear_cka(y, x),
    ):
        np.testing.assert_allclose(after, before, atol=1e-6 / min(own))


def test_degenerate_spaces_have_defined_likeness(rng):
    one, x = np.ones((1, 3)), rng.normal(size=(9, 3))
    np.testing.assert_allclose(kernels.principal_angles(one, -2 * one), [1], atol=1e-6)
    np.testing.assert_array_equal(kernels.principal_angles(one, one, center=True), [0])
    np.testing.assert_array_equal(kernels.principal_angles(0 * x, x), [0, 0, 0])
    np.testing.assert_allclose(kernels.principal_angles(x, x), 1, atol=1e-6)
    assert np.isnan(kernels.linear_cka(one, one))
    for value in (0.1, 1e6 / 3, 0.0):  # equal rows, whose mean is off by rounding
        flat = np.full((1000, 3), value, "f")
        others = rng.normal(size=(1000, 3))
        assert np.isnan(kernels.linear_cka(flat, others))
        assert np.isnan(kernels.debiased_linear_cka(flat, others))
        assert np.isnan(kernels.cka_grid(flat[None], others[None])).all()
        angles = kernels.principal_angles(flat, others, center=True)
        np.testing.assert_array_equal(angles, [0, 0, 0])
    for measure in (kernels.linear_cka, kernels.debiased_linear_cka):
        np.testing.assert_allclose(measure(x, x), 1, atol=1e-5)
    # Five rows of three columns, all eight of the other side being their sum.
    wide = x[:5] @ np.ones((3, 8))
    for measure, oracle in [
        (kernels.linear_cka, cka_oracle),
        (kernels.debiased_linear_cka, debiased_oracle),
    ]:
        expected = oracle(x[:5], wide)
        assert abs(expected) < 0.99
        np.testing.assert_allclose(measure(x[:5], wide), expected, atol=1e-5)


@pytest.mark.parametrize("scale", [1, 1000])
def test_a_column_too_many_adds_no_direction_to_thousands_of_rows(rng, scale):
    """The small directions stay, the one that is rounding does not count."""
    a = rng.normal(size=(5000, 6)).astype("f") * np.logspace(0, -4, 6, dtype="f")
    a = scale * np.concatenate([a, a[:, :1] - a[:, 1:2]], 1)
    cosines = kernels.principal_angles(a, a[:, :6] @ rng.normal(size=(6, 7)))
    np.testing.assert_allclose(cosines, [1] * 6 + [0], atol=1e-4)


def test_debiased_cka_of_unrelated_items_is_near_zero_where_the_plain_one_is_not(rng):
    x, y = rng.normal(size=(50, 200)), rng.normal(size=(50, 200))
    assert kernels.linear_cka(x, y) > 0.5
    assert abs(kernels.debiased_linear_cka(x, y)) < 0.1


def test_cka_grid_is_cka_layer_by_layer(rng):
    x, y = rng.normal(size=(3, 20, 4)), rng.normal(size=(2, 20, 6))
    for debiased, single in [
        (False, kernels.linear_cka),
        (True, kernels.debiased_linear_cka),
    ]:
        grid = kernels.cka_grid(x, y, debiased=debiased)
        expected = [[single(a, b) for b in y] for a in x]
        np.testing.assert_allclose(grid, expected, atol=1e-5)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_grid_is_one_pass_that_never_holds_the_gram_matrix(debiased):
    n = 4099  # a prime: no other axis has this length
    x = jax.ShapeDtypeStruct((3, n, 8), "float32")
    y = jax.ShapeDtypeStruct((2, n, 16), "float32")
    grid = functools.partial(kernels.cka_grid, debiased=debiased)
    shapes = re.findall(r"f32\[([\d,]+)\]", str(jax.make_jaxpr(grid)(x, y)))
    assert f"3,{n},8" in shapes and "8,16" in shapes
    assert not any(shape.split(",").count(str(n)) > 1 for shape in shapes)
    memory = jax.jit(grid).lower(x, y).compile().memory_analysis()
    inputs = 4 * n * (3 * 8 + 2 * 16)
    # Centred and scaled copies of the inputs, and little else.
    assert memory.temp_size_in_bytes < 5 * inputs < 4 * n * n / 8


def test_measures_keep_float64_where_it_is_enabled(rng, float64):
    x, y = rng.normal(size=(2, 30, 4)) + 3, rng.normal(size=(2, 30, 5))
    y[..., 0] += x[..., 0]
    for center in (False, True):
        found = kernels.principal_angles(x[0], y[0], center=center)
        expected = angles_oracle(x[0], y[0], center)
        np.testing.assert_allclose(found, expected, atol=1e-12)
    for debiased, oracle in [(False, cka_oracle), (True, debiased_oracle)]:
        expected = [[oracle(a, b) for b in y] for a in x]
        found = kernels.cka_grid(x, y, debiased=debiased)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_gradients_match_differences(rng, float64):
    x, y = rng.normal(size=(12, 3)), rng.normal(size=(12, 2))
    direction = rng.normal(size=x.shape)
    for measure in (
        kernels.linear_cka,
        kernels.debiased_linear_cka,
        lambda a, b: kernels.principal_angles(a, b).sum(),
        lambda a, b: kernels.principal_angles(a, b, center=True)[0],
    ):
        slope = np.sum(jax.grad(measure)(x, y) * direction)
        step = 1e-6 * direction
        change = measure(x + step, y) - measure(x - step, y)
        np.testing.assert_allclose(slope, change / 2e-6, rtol=1e-5)


@pytest.mark.parametrize("center", [False, True])
def test_the_gradient_of_angles_survives_equal_singular_values(rng, float64, center):
    """The columns of an orthonormal matrix are tied, as are those of 2 and 2 and 1."""
    b, direction = rng.normal(size=(12, 2)), rng.normal(size=(12, 3))
    q = scipy.linalg.qr(rng.normal(size=(12, 3)), mode="economic")[0]

    def measure(a, b):
        return kernels.principal_angles(a, b, center=center) @ np.array([1.0, 3.0])

    for a in (np.eye(12, 3), q, q * [2, 2, 1], q @ rotation(rng, 3)):
        step = 1e-6 * direction
        change = (measure(a + step, b) - measure(a - step, b)) / 2e-6
        slope = np.sum(jax.grad(measure)(a, b) * direction)
        np.testing.assert_allclose(slope, change, rtol=1e-6)
        other = np.sum(jax.grad(measure, 1)(b, a) * direction)
        np.testing.assert_allclose(other, change, rtol=1e-6)
        single = jax.grad(measure)(a.astype("f"), b.astype("f"))
        assert single.dtype == np.float32
        # A few dozen float32 roundings of 6e-8, over 36 products.
        np.testing.assert_allclose(np.sum(single * direction), change, atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_has_no_likeness(rng, value):
    x, y = rng.normal(size=(2, 9, 3)), rng.normal(size=(9, 4))
    x[1, 4, 2] = value
    for measure in (
        kernels.principal_angles,
        functools.partial(kernels.principal_angles, center=True),
        kernels.linear_cka,
        kernels.debiased_linear_cka,
        lambda a, b: kernels.cka_grid(a, b[None]),
    ):
        found = measure(x, y)
        assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


BAD = [
    (lambda x: kernels.principal_angles(x, x[:3]), "over the same rows"),
    (lambda x: kernels.principal_angles(x[:0], x[:0]), "over the same rows"),
    (lambda x: kernels.linear_cka(x, x[0]), "over the same rows"),
    (lambda x: kernels.debiased_linear_cka(x[:3], x[:3]), "at least 4 rows"),
    (lambda x: kernels.cka_grid(x, x), "layer, n, d"),
    (lambda x: kernels.cka_grid(x[None, :3], x[None, :3], debiased=True), "4 rows"),
    (lambda x: kernels.linear_cka(x[:, :0], x), "not empty"),
    (lambda x: kernels.linear_cka(np.stack([x] * 2), np.stack([x] * 3)), "that broad"),
    (lambda x: kernels.linear_cka(x, 1j * x), "real numbers; got dtype complex64"),
    (lambda x: kernels.cka_grid(x[None], x[None, :5]), "over the same rows"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_the_door_answers_with_the_value(rng, call, message):
    with pytest.raises(ValueError, match=message):
        call(rng.normal(size=(10, 3)))
