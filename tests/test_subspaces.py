"""Measures of likeness against scipy, gudhi, networkx and planted truth."""

import jax
import networkx
import numpy as np
import pytest
import scipy.linalg

from jaxling import kernels

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


def debiased_oracle(x, y):
    """The unbiased HSIC ratio from the Gram matrices, term by term."""

    def hsic(k, m):
        n = len(k)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        one = np.ones(n)
        return (
            np.trace(k @ m)
            + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (one @ k @ m @ one)
        ) / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def persistence(points):
    gudhi = pytest.importorskip("gudhi")
    tree = gudhi.RipsComplex(points=points).create_simplex_tree(max_dimension=1)
    tree.persistence(homology_coeff_field=2, min_persistence=0)
    found = tree.persistence_intervals_in_dimension(0)
    return found[np.isfinite(found[:, 1])]


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


def test_cka_ignores_rotation_scale_shift_and_order(rng):
    x, y = rng.normal(size=(40, 6)), rng.normal(size=(40, 5))
    turn = scipy.linalg.qr(rng.normal(size=(6, 6)))[0]
    order = rng.permutation(40)
    for measure in (kernels.linear_cka, kernels.debiased_linear_cka):
        before = measure(x, y)
        np.testing.assert_allclose(measure(3 * x @ turn + 2, y), before, atol=2e-5)
        np.testing.assert_allclose(measure(x[order], y[order]), before, atol=2e-5)
        np.testing.assert_allclose(measure(x, x), 1, atol=1e-5)


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


def test_cka_never_holds_the_gram_matrix():
    n = 4096
    x = jax.ShapeDtypeStruct((2, n, 8), "float32")
    compiled = jax.jit(kernels.cka_grid).lower(x, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * n * n / 16


def test_cka_has_the_gradient_of_its_definition(rng):
    x, y = (rng.normal(size=(12, 3)).astype("f") for _ in range(2))
    gradient = jax.grad(kernels.linear_cka)(x, y)
    step = rng.normal(size=x.shape).astype("f") * 1e-2
    change = cka_oracle(x + step, y) - cka_oracle(x - step, y)
    np.testing.assert_allclose(2 * np.sum(gradient * step), change, rtol=2e-3)


def test_spectrum_by_hand():
    found = kernels.spectrum(np.diag([4.0, 2.0, 2.0]), center=False)
    share = np.array([0.5, 0.25, 0.25])
    rank = np.exp(-np.sum(share * np.log(share)))  # 2.83
    np.testing.assert_allclose(found.effective_rank, rank, rtol=1e-6)
    np.testing.assert_allclose(found.effective_condition_number, 2, rtol=1e-6)
    equal = kernels.spectrum(np.eye(5), center=False)
    np.testing.assert_allclose(equal.effective_rank, 5, rtol=1e-5)
    np.testing.assert_allclose(equal.effective_condition_number, 1, rtol=1e-5)
    zero = kernels.spectrum(np.zeros((3, 3)))
    assert zero.effective_rank == 0 and np.isnan(zero.effective_condition_number)


def test_singular_value_gap_and_harmonic_mean(rng):
    x = rng.normal(size=(30, 4))
    a, b = kernels.spectrum(x), kernels.spectrum(2 * x)
    gap = kernels.singular_value_gap(a, b)
    np.testing.assert_allclose(gap, 4 * np.log(2) ** 2, rtol=1e-4)
    assert kernels.singular_value_gap(a, a) == 0
    c, d = a.effective_condition_number, 3.0
    mean = kernels.econd_hm(a, b._replace(effective_condition_number=d))
    np.testing.assert_allclose(mean, 2 / (1 / c + 1 / d), rtol=1e-6)
    with pytest.raises(ValueError, match="same number of singular values"):
        kernels.singular_value_gap(a, kernels.spectrum(x[:, :2]))


@pytest.mark.parametrize("n, tile", [(3, 2), (33, 8), (64, 256)])
def test_relational_similarity_is_the_correlation_of_the_two_lists(rng, n, tile):
    x = rng.normal(size=(n, 5)) + 4  # nearly equal cosines: the mean must go first
    y = x[:, :4] + 0.1 * rng.normal(size=(n, 4))

    def cosines(z):
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
        return (z @ z.T)[np.triu_indices(n, 1)]

    expected = np.corrcoef(cosines(x), cosines(y))[0, 1]
    found = kernels.relational_similarity(x, y, tile=tile)
    # Cosines near 0.98 with a spread of 0.02 keep about five digits in float32.
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("order", ["largest", "smallest"])
def test_eigenvector_similarity_matches_networkx(rng, order):
    spaces = [rng.normal(size=(30, 4)), rng.normal(size=(25, 6))]
    spectra, counts = [], []
    for x in spaces:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        cosines = x @ x.T
        np.fill_diagonal(cosines, -np.inf)
        graph = networkx.Graph()
        graph.add_nodes_from(range(len(x)))
        for i, row in enumerate(np.argsort(-cosines, axis=1)[:, :5]):
            graph.add_edges_from((i, int(j)) for j in row)
        values = np.sort(networkx.laplacian_spectrum(graph))
        values = values[::-1] if order == "largest" else values
        held = np.cumsum(values) / values.sum()
        spectra.append(values)
        counts.append(1 + int(np.sum(held < 0.9)))
    m = min(counts)
    expected = np.sum((spectra[0][:m] - spectra[1][:m]) ** 2)
    found = kernels.eigenvector_similarity(*spaces, k=5, order=order)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert kernels.eigenvector_similarity(spaces[0], spaces[0], k=5) < 1e-8


@pytest.mark.parametrize("n, m", [(20, 20), (12, 30), (1, 4), (1, 1), (2, 2)])
def test_h0_bottleneck_matches_gudhi(rng, n, m):
    gudhi = pytest.importorskip("gudhi")
    x, y = rng.normal(size=(n, 3)), 2 * rng.normal(size=(m, 5))
    expected = gudhi.bottleneck_distance(persistence(x), persistence(y))
    np.testing.assert_allclose(kernels.h0_bottleneck(x, y), expected, atol=1e-5)


def test_spanning_tree_matches_networkx_and_survives_duplicates(rng):
    x = np.repeat(rng.normal(size=(10, 3)), 2, axis=0)
    graph = networkx.Graph()
    for i in range(len(x)):
        for j in range(i):
            graph.add_edge(i, j, weight=np.linalg.norm(x[i] - x[j]))
    tree = networkx.minimum_spanning_edges(graph, data=True)
    expected = sorted(edge["weight"] for *_, edge in tree)
    np.testing.assert_allclose(np.sort(kernels.spanning_tree(x)), expected, atol=1e-5)


BAD = [
    (lambda x: kernels.principal_angles(x, x[:3]), "over the same rows"),
    (lambda x: kernels.principal_angles(x[:0], x[:0]), "over the same rows"),
    (lambda x: kernels.linear_cka(x, x[0]), "over the same rows"),
    (lambda x: kernels.debiased_linear_cka(x[:3], x[:3]), "at least 4 rows"),
    (lambda x: kernels.cka_grid(x, x), "layer, n, d"),
    (lambda x: kernels.spectrum(x[0]), r"\[\.\.\., n, d\]"),
    (lambda x: kernels.relational_similarity(x[:2], x[:2]), "n >= 3"),
    (lambda x: kernels.eigenvector_similarity(x, x, k=10), "`k` must be in"),
    (lambda x: kernels.eigenvector_similarity(x, x, k=2, energy=0.0), "`energy`"),
    (lambda x: kernels.eigenvector_similarity(x, x, k=2, order="up"), "`order`"),
    (lambda x: kernels.h0_bottleneck(x[:0], x), "n >= 1"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_the_door_answers_with_the_value(rng, call, message):
    with pytest.raises(ValueError, match=message):
        call(rng.normal(size=(10, 3)))
