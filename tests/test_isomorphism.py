"""Shapes of spaces against scipy, gudhi, networkx, laws and planted truth."""

import jax
import networkx
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.csgraph
import scipy.spatial.distance
import scipy.stats
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


def persistence(points):
    gudhi = pytest.importorskip("gudhi")
    tree = gudhi.RipsComplex(points=points).create_simplex_tree(max_dimension=1)
    tree.persistence(homology_coeff_field=2, min_persistence=0)
    found = tree.persistence_intervals_in_dimension(0)
    return found[np.isfinite(found[:, 1])]


def test_spectrum_by_hand():
    found = kernels.spectrum(np.diag([4.0, 2.0, 2.0]), center=False)
    share = np.array([0.5, 0.25, 0.25])
    rank = np.exp(-np.sum(share * np.log(share)))  # 2.83
    np.testing.assert_allclose(found.effective_rank, rank, rtol=1e-6)
    np.testing.assert_allclose(found.effective_condition_number, 2, rtol=1e-6)
    lacking = kernels.spectrum(np.diag([6.0, 3.0, 1.5, 0.0]), center=False)
    np.testing.assert_allclose(lacking.condition_number, 4, rtol=1e-6)
    equal = kernels.spectrum(np.eye(5), center=False)
    np.testing.assert_allclose(equal.effective_rank, 5, rtol=1e-5)
    np.testing.assert_allclose(equal.effective_condition_number, 1, rtol=1e-5)
    for flat in (np.zeros((3, 3)), np.full((7, 3), 0.1), np.ones((1, 4))):
        zero = kernels.spectrum(flat)
        assert zero.effective_rank == 0 and np.isnan(zero.effective_condition_number)
        assert np.isnan(zero.condition_number)
        assert kernels.singular_value_gap(zero, zero) == 0


@pytest.mark.parametrize("n, d", [(30, 6), (6, 30), (2000, 40)])
def test_singular_values_that_are_rounding_are_zero(rng, n, d):
    """Centring takes a direction from n rows in n or more dimensions; else a column
    too many does. Their logarithm would rule the gap between two spectra."""
    x = rng.normal(size=(n, d)).astype("f") * np.logspace(0, -3, d) + 3
    if n > d:
        x[:, -1] = x[:, 0]
    found = kernels.spectrum(x)
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    np.testing.assert_array_equal(found.singular_values == 0, values < 1e-9 * values[0])
    np.testing.assert_allclose(found.singular_values, values, atol=1e-6 * values[0])
    turned = kernels.spectrum(x @ scipy.linalg.qr(rng.normal(size=(d, d)))[0])
    assert kernels.singular_value_gap(found, turned) < 1e-2
    whole = kernels.spectrum(rng.normal(size=(n, d)), center=False)
    assert kernels.singular_value_gap(found, whole) == np.inf


def test_singular_value_gap_and_harmonic_mean(rng):
    x = rng.normal(size=(30, 4))
    a, b = kernels.spectrum(x), kernels.spectrum(2 * x)
    gap = kernels.singular_value_gap(a, b)
    np.testing.assert_allclose(gap, 4 * np.log(2) ** 2, rtol=1e-4)
    assert kernels.singular_value_gap(a, a) == 0
    c, d = a.effective_condition_number, 3.0
    mean = kernels.econd_hm(a, b._replace(effective_condition_number=d))
    np.testing.assert_allclose(mean, 2 / (1 / c + 1 / d), rtol=1e-6)
    plain = kernels.cond_hm(a, b._replace(condition_number=d))
    c = np.linalg.cond(x - x.mean(0))
    np.testing.assert_allclose(plain, 2 / (1 / c + 1 / d), rtol=1e-5)
    for measure in (kernels.singular_value_gap, kernels.econd_hm, kernels.cond_hm):
        with pytest.raises(ValueError, match="same number of singular values"):
            measure(a, kernels.spectrum(x[:, :2]))


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


def neighbor_graph(x, k):
    """Rows joined to their k nearest by cosine, in networkx; zero rows to nothing."""
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(x)))
    there = np.flatnonzero(x.any(axis=1))
    rows = x[there] / np.linalg.norm(x[there], axis=1, keepdims=True)
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -np.inf)
    for i, row in enumerate(np.argsort(-cosines, axis=1)[:, :k]):
        graph.add_edges_from((there[i], there[j]) for j in row if j != i)
    return graph


def evs_oracle(x, y, k, order):
    spectra, counts = [], []
    for z in (x, y):
        values = np.sort(networkx.laplacian_spectrum(neighbor_graph(z, k)))
        values = values[::-1] if order == "largest" else values
        held = np.cumsum(values) / values.sum()
        spectra.append(values)
        counts.append(1 + int(np.sum(held < 0.9)))
    m = min(counts)
    return np.sum((spectra[0][:m] - spectra[1][:m]) ** 2)


@pytest.mark.parametrize("order", ["largest", "smallest"])
@pytest.mark.parametrize("zeros", [0, 3, 22])
def test_eigenvector_similarity_matches_networkx(rng, order, zeros):
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(25, 6))
    y[rng.permutation(25)[:zeros]] = 0  # of 22, three are left and have two neighbours
    found = kernels.eigenvector_similarity(x, y, k=5, order=order)
    np.testing.assert_allclose(found, evs_oracle(x, y, 5, order), rtol=1e-3)
    assert kernels.eigenvector_similarity(y, y[::-1], k=5, order=order) < 1e-8


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


@laws
@given(rows, rows, seeds)
def test_shapes_ignore_rotation_shift_and_order(x, y, rng):
    """On any rows: of lower rank, equal, zero."""
    turn, order = rotation(rng, 4), rng.permutation(9)
    before = kernels.spectrum(x)
    rank = float(before.effective_rank)
    assert rank == 0 or 1 - 1e-5 <= rank <= np.linalg.matrix_rank(x - x.mean(0)) + 1e-5
    for other in (x @ turn, x + 5, x[order], 2 * x):
        after = kernels.spectrum(other)
        np.testing.assert_allclose(after.effective_rank, rank, atol=1e-4)
    for measure, others in [
        (kernels.h0_bottleneck, (x @ turn, x + 5, x[order])),
        (kernels.relational_similarity, (x @ turn, 2 * x)),
    ]:
        before = measure(x, y)
        for other in others:
            np.testing.assert_allclose(measure(other, y), before, atol=2e-5)
        np.testing.assert_allclose(measure(y, x), before, atol=2e-5)
    together = kernels.relational_similarity(x[order], y[order])
    np.testing.assert_allclose(together, kernels.relational_similarity(x, y), atol=2e-5)


@laws
@given(seeds, st.floats(-2, 2))
def test_shapes_of_random_spaces_obey_their_laws(rng, exponent):
    x, y, z = (rng.normal(size=(9, 4)) for _ in range(3))
    turn, order, scale = rotation(rng, 4), rng.permutation(9), 10.0**exponent
    a, b, both = (kernels.spectrum(v) for v in (x, y, scale * (x @ turn)))
    np.testing.assert_allclose(
        both.singular_values, scale * a.singular_values, rtol=1e-4
    )
    gap = kernels.singular_value_gap(a, b)
    np.testing.assert_allclose(kernels.singular_value_gap(b, a), gap, rtol=1e-4)
    np.testing.assert_allclose(
        kernels.singular_value_gap(a, both), 4 * np.log(scale) ** 2, atol=1e-2
    )
    np.testing.assert_allclose(kernels.econd_hm(a, b), kernels.econd_hm(b, a))
    similarity = kernels.eigenvector_similarity(x, y, k=3)
    for other in (x @ turn, x[order], scale * x):
        after = kernels.eigenvector_similarity(other, y, k=3)
        np.testing.assert_allclose(after, similarity, rtol=1e-3, atol=1e-4)
    distance = kernels.h0_bottleneck
    xy, yz, xz = float(distance(x, y)), float(distance(y, z)), float(distance(x, z))
    assert xz <= xy + yz + 1e-5
    np.testing.assert_allclose(distance(scale * x, scale * y), scale * xy, rtol=1e-4)
    # Stability: no pair's distance moves by more than twice the longest displacement.
    noise = 0.1 * rng.normal(size=x.shape)
    moved = 2 * np.linalg.norm(noise, axis=1).max()
    assert distance(x, x + noise) <= moved + 1e-5


MEASURES = {
    "spectrum": lambda x, y: kernels.spectrum(x).effective_condition_number,
    "rank": lambda x, y: kernels.spectrum(x, center=False).effective_rank,
    "gap": lambda x, y: kernels.singular_value_gap(
        kernels.spectrum(x), kernels.spectrum(y[..., :3])
    ),
    "econd": lambda x, y: kernels.econd_hm(
        kernels.spectrum(x), kernels.spectrum(y[..., :3])
    ),
    "cond": lambda x, y: kernels.cond_hm(
        kernels.spectrum(x), kernels.spectrum(y[..., :3])
    ),
    "rsim": lambda x, y: kernels.relational_similarity(x, y, tile=4),
    "evs": lambda x, y: kernels.eigenvector_similarity(x, y, k=2),
    "h0": kernels.h0_bottleneck,
    "tree": lambda x, y: kernels.spanning_tree(x).sum(-1),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_batched_over_pairs(rng, name):
    """Leading axes broadcast, and a caller's own vmap gives the same."""
    measure = MEASURES[name]
    x, y = rng.normal(size=(2, 1, 7, 3)), rng.normal(size=(3, 7, 4))
    together = np.broadcast_to(measure(x, y), (2, 3))
    alone = [[measure(a, b) for b in y] for a in x[:, 0]]
    # The same sums in another order; the longest is of 21 cosines.
    np.testing.assert_allclose(together, alone, rtol=2e-5, atol=2e-6)
    over_y = jax.vmap(measure, (None, 0))
    mapped = jax.jit(jax.vmap(over_y, (0, None)))(x[:, 0], y)
    np.testing.assert_allclose(mapped, alone, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("whole", [False, True])
def test_a_space_that_is_not_finite_has_no_shape(rng, name, value, whole):
    x, y = rng.normal(size=(2, 7, 3)), rng.normal(size=(7, 4))
    x[1, 4, slice(None) if whole else 1] = value
    found = np.asarray(MEASURES[name](x, y))
    assert np.isfinite(found[0]) and np.isnan(found[1])
    if name in ("gap", "econd", "cond", "rsim", "evs", "h0"):  # of both sides
        mirrored = np.asarray(
            MEASURES[name](y[:, :3], np.pad(x, [(0, 0)] * 2 + [(0, 1)]))
        )
        assert np.isfinite(mirrored[0]) and np.isnan(mirrored[1])


def test_degenerate_spaces_have_a_defined_shape(rng):
    x, equal = rng.normal(size=(5, 3)), np.ones((5, 3)) * 0.3
    assert np.isnan(kernels.relational_similarity(equal, x))
    assert np.isnan(kernels.relational_similarity(np.eye(5), x))  # cosines all zero
    np.testing.assert_allclose(kernels.relational_similarity(x, x), 1, atol=1e-5)
    assert kernels.eigenvector_similarity(equal, equal, k=1) == 0
    # All five joined to all: eigenvalues 5, 5, 5, 5, 0; of no edges one counts.
    similarity = kernels.eigenvector_similarity(0 * x, x, k=4)
    np.testing.assert_allclose(similarity, 25, rtol=1e-5)
    assert kernels.h0_bottleneck(equal, equal) == 0 == kernels.h0_bottleneck(x, x)
    assert kernels.spanning_tree(x[:1]).shape == (0,)
    assert np.isnan(kernels.h0_bottleneck(np.nan * x[:1], x[:1]))  # no edge at all


def test_gradients_match_differences(rng, float64):
    x, y = rng.normal(size=(9, 3)), rng.normal(size=(9, 4))
    direction = rng.normal(size=x.shape)
    for measure in (
        kernels.relational_similarity,
        kernels.h0_bottleneck,
        lambda a, _: kernels.spectrum(a).effective_rank,
        lambda a, _: kernels.singular_value_gap(
            kernels.spectrum(a), kernels.spectrum(y[:, :3])
        ),
    ):
        slope = np.sum(jax.grad(measure)(x, y) * direction)
        step = 1e-6 * direction
        change = measure(x + step, y) - measure(x - step, y)
        np.testing.assert_allclose(slope, change / 2e-6, rtol=1e-5)
    doubled = np.repeat(x, 2, axis=0)  # zero lengths in the tree
    assert np.isfinite(jax.grad(kernels.h0_bottleneck)(doubled, 2 * y)).all()
    zero = np.where(np.arange(9)[:, None] == 4, 0, x)
    assert np.isfinite(jax.grad(kernels.relational_similarity)(zero, y)).all()


def test_float64_is_kept_where_it_is_enabled(rng, float64):
    x, y = rng.normal(size=(20, 4)) + 3, rng.normal(size=(20, 5))
    values = np.linalg.svd(x - x.mean(0), compute_uv=False)
    found = kernels.spectrum(x)
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-12)
    rank = np.exp(scipy.stats.entropy(values))
    np.testing.assert_allclose(found.effective_rank, rank, rtol=1e-12)
    last = values[int(rank) - 1]
    np.testing.assert_allclose(
        found.effective_condition_number, values[0] / last, rtol=1e-12
    )
    pairs = [1 - scipy.spatial.distance.pdist(z, "cosine") for z in (x, y)]
    expected = scipy.stats.pearsonr(*pairs).statistic
    similar = kernels.relational_similarity(x, y, tile=7)
    np.testing.assert_allclose(similar, expected, rtol=1e-10)
    lengths = scipy.sparse.csgraph.minimum_spanning_tree(
        scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(x))
    ).data
    tree = np.sort(kernels.spanning_tree(x))
    np.testing.assert_allclose(tree, np.sort(lengths), rtol=1e-12)
    for order in ("largest", "smallest"):
        found = kernels.eigenvector_similarity(x, y, k=4, order=order)
        np.testing.assert_allclose(found, evs_oracle(x, y, 4, order), rtol=1e-10)


@pytest.mark.parametrize("n, m", [(20, 20), (12, 30)])
def test_h0_bottleneck_keeps_float64(rng, float64, n, m):
    gudhi = pytest.importorskip("gudhi")
    x, y = rng.normal(size=(n, 3)), 2 * rng.normal(size=(m, 5))
    expected = gudhi.bottleneck_distance(persistence(x), persistence(y))
    np.testing.assert_allclose(kernels.h0_bottleneck(x, y), expected, rtol=1e-12)


BAD = [
    (lambda x: kernels.spectrum(x[0]), r"\[\.\.\., n, d\]"),
    (lambda x: kernels.relational_similarity(x[:2], x[:2]), "n >= 3"),
    (lambda x: kernels.relational_similarity(x, x, tile=0), "`tile`"),
    (lambda x: kernels.eigenvector_similarity(x[:1], x, k=1), "at least 2 rows"),
    (lambda x: kernels.eigenvector_similarity(x[0], x, k=1), "at least 2 rows"),
    (lambda x: kernels.eigenvector_similarity(x, x, k=10), "`k` must be in"),
    (lambda x: kernels.eigenvector_similarity(x, x, k=2, energy=0.0), "`energy`"),
    (lambda x: kernels.eigenvector_similarity(x, x, k=2, order="up"), "`order`"),
    (lambda x: kernels.h0_bottleneck(x[:0], x), "n >= 1"),
    (lambda x: kernels.spanning_tree(x[0]), r"\[\.\.\., n, d\] with n >= 1"),
    (lambda x: kernels.relational_similarity(x, x[:5]), "paired rows"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_the_door_answers_with_the_value(rng, call, message):
    with pytest.raises(ValueError, match=message):
        call(rng.normal(size=(10, 3)))
