"""Nearest neighbours against the float64 definition, and laws of any input."""

import functools
import inspect
import logging
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxling import kernels
from jaxling.kernels import (
    concrete,
    dispatch,
    halves,
    pairs,
    panels,
    prefilter,
    ranking,
    streamed,
    topk,
)

METRICS = ("cosine", "dot", "l2")
IMPLEMENTATIONS = ("traced", "streamed")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles and panels already for a few hundred rows."""
    monkeypatch.setattr(panels, "BLOCK", 128)
    monkeypatch.setattr(panels, "SAMPLE", 256)
    monkeypatch.setattr(panels, "_STEP", 64)
    monkeypatch.setattr(streamed, "_STRIP", 64)
    monkeypatch.setattr(concrete, "PANEL", 600)


def assert_same(found, queries, keys, k, metric, excluded=None):
    """Same scores as the oracle, and indices whose true scores are as good.

    Two orders may differ only where true scores differ by less than float32 rounding
    of a sum of d products, which the tolerance is a few times of.
    """
    scores, indices = (np.asarray(a) for a in found)
    assert scores.dtype == np.float32 and indices.dtype == np.int32
    expected, expected_ids = oracles.neighbors(queries, keys, k, metric, excluded)
    close = oracles.closeness(queries, keys, metric)
    sign = -1 if metric == "l2" else 1
    empty = expected_ids < 0
    np.testing.assert_array_equal(indices < 0, empty)
    np.testing.assert_array_equal(np.isnan(scores), empty)
    q, x = (np.nan_to_num(np.asarray(a, np.float64)) for a in (queries, keys))
    if metric == "cosine":
        size = np.ones((len(q), 1))
    else:
        size = np.linalg.norm(q, axis=1, keepdims=True) + 1e-30
        size = size * np.linalg.norm(x, axis=1).max(initial=0)
    tolerance = 4e-7 * np.sqrt(q.shape[1] + 1) * size + np.zeros_like(expected)
    if metric == "l2":
        # A sum of squared differences is accurate relative to itself.
        tolerance = 4e-7 * np.sqrt(q.shape[1] + 1) * np.abs(expected) + 1e-37
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(scores - expected)
        assert not (error > tolerance)[~empty].any()
        theirs = sign * np.take_along_axis(close, np.maximum(indices, 0), axis=1)
        assert not (np.abs(theirs - expected) > tolerance)[~empty].any()
    for row in indices:
        assert len(set(row[row >= 0])) == (row >= 0).sum()
    # Best first; equal returned scores go to the lower index.
    a, b = scores[:, :-1], scores[:, 1:]
    full = indices[:, 1:] >= 0
    assert (sign * a >= sign * b)[full].all()
    assert (indices[:, :-1] < indices[:, 1:])[full & (a == b)].all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "n, m, d, k",
    [(1, 1, 1, 1), (7, 127, 5, 5), (257, 33, 16, 33), (3, 9001, 8, 60), (4, 9, 3, 20)],
)
def test_neighbors_match_the_oracle(rng, implementation, metric, n, m, d, k):
    queries, keys = rng.normal(size=(n, d)), rng.normal(size=(m, d))
    queries, keys = queries.astype(np.float32), keys.astype(np.float32)
    found = kernels.nearest_neighbors(
        queries, keys, k=k, metric=metric, implementation=implementation
    )
    assert_same(found, queries, keys, k, metric)


@pytest.mark.parametrize("rows", [1100, 300])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "mesh", "block"])
def test_the_most_neighbours_that_are_promised(rng, implementation, rows):
    """1,024 of a few more rows, and of fewer, some of which are copies."""
    k, x = 1024, rng.normal(size=(rows, 6)).astype(np.float32)
    x[40:60] = x[3]
    if implementation in IMPLEMENTATIONS:
        knobs = {"implementation": implementation}
        found = kernels.all_pairs_neighbors(x, k=k, **knobs)
        assert_same(found, x, x, k, "cosine", excluded=np.arange(rows))
    elif implementation == "mesh":
        knobs = {"mesh": jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))}
    else:
        knobs = {"block": 200}
    found = kernels.nearest_neighbors(x[:9], x, k=k, metric="l2", **knobs)
    assert_same(found, x[:9], x, k, "l2")
    assert (np.asarray(found.indices) >= 0).sum() == 9 * min(k, rows)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_inputs_lose_nothing_more(rng, metric, dtype, implementation):
    x = jnp.asarray(rng.normal(size=(300, 24)), dtype)
    found = kernels.all_pairs_neighbors(
        x, k=10, metric=metric, implementation=implementation
    )
    rounded = np.asarray(x.astype(jnp.float32))
    assert_same(found, rounded, rounded, 10, metric, excluded=np.arange(300))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("metric", METRICS)
def test_more_copies_than_k_are_found_in_order(
    rng, metric, include_self, implementation
):
    x = rng.normal(size=(400, 12)).astype(np.float32)
    x[100:190] = x[7]  # more than the candidate buffer holds
    x[200:204] = x[9]
    found = kernels.all_pairs_neighbors(
        x,
        k=20,
        metric=metric,
        include_self=include_self,
        implementation=implementation,
    )
    excluded = None if include_self else np.arange(400)
    assert_same(found, x, x, 20, metric, excluded)
    if metric != "dot":
        copies = np.r_[7, 100:190]
        for row in (7, 100, 150, 189):
            others = copies if include_self else copies[copies != row]
            np.testing.assert_array_equal(found.indices[row], others[:20])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("include_self", [True, False])
def test_a_copy_ties_with_a_lower_id_that_is_no_copy(rng, include_self, implementation):
    # Under cosine a slope of 2**-13 vanishes from the length, and under dot a column
    # the query lacks from the product: scores of exactly 1, whatever the order of sums.
    x = np.zeros((60, 4), np.float32)
    x[:, 2:] = rng.normal(size=(60, 2))
    for metric, other in (("cosine", 2.0**-13), ("dot", 3.0)):
        for query, near, copy in ((2, 7, 30), (30, 7, 2), (40, 7, 30), (7, 30, 40)):
            rows = x.copy()
            rows[[query, copy]] = [1, 0, 0, 0]
            rows[near] = [1, other, 0, 0]
            same = sorted([near, copy] + [query] * include_self)
            for k in (1, 2):
                found = kernels.all_pairs_neighbors(
                    rows,
                    k=k,
                    metric=metric,
                    include_self=include_self,
                    implementation=implementation,
                )
                assert found.indices[query, : len(same)].tolist() == same[:k]
                assert (found.scores[query, : len(same)] == 1).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_are_not_numbers_are_nobodys_neighbour(rng, metric, implementation):
    x = rng.normal(size=(60, 6)).astype(np.float32)
    x[3] = 0
    x[10, 2] = np.nan
    x[20, 1] = np.inf
    x[21, 5] = -np.inf
    found = kernels.all_pairs_neighbors(
        x, k=58, metric=metric, implementation=implementation
    )
    assert_same(found, x, x, 58, metric, excluded=np.arange(60))
    invalid = {10, 20, 21} | ({3} if metric == "cosine" else set())
    assert not invalid & set(np.asarray(found.indices).ravel().tolist())
    for row in invalid:
        assert (found.indices[row] == -1).all() and np.isnan(found.scores[row]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_huge_and_tiny_rows_neither_overflow_nor_vanish(
    rng, metric, scale, implementation
):
    x = rng.normal(size=(200, 8)).astype(np.float32) * np.float32(scale)
    x[::3] *= np.float32(0.01)
    found = kernels.all_pairs_neighbors(
        x, k=9, metric=metric, implementation=implementation
    )
    assert_same(found, x, x, 9, metric, excluded=np.arange(200))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", ["dot", "l2"])
@pytest.mark.parametrize("tiny", [1e-18, 1e-14])
def test_beside_huge_rows_the_stated_bound_holds(rng, metric, tiny, implementation):
    d, k = 8, 9
    x = rng.normal(size=(120, d)).astype(np.float32) * np.float32(tiny)
    x[1::3] *= np.float32(1e10)
    x[50] = 1e17 * rng.normal(size=d)
    found = kernels.all_pairs_neighbors(
        x, k=k, metric=metric, implementation=implementation
    )
    scores, indices = (np.asarray(part) for part in found)
    close = oracles.closeness(x, x, metric)
    np.fill_diagonal(close, -np.inf)
    sign = -1 if metric == "l2" else 1
    wide = x.astype(np.float64)
    length = np.linalg.norm(wide, axis=1)
    top = np.abs(wide).max()
    if metric == "l2":
        size, lost = np.add.outer(length, length) ** 2, 0
    else:
        size, total = np.outer(length, length), np.abs(wide).sum(axis=1)
        lost = 2.0**-175 * top * np.add.outer(total, total)
    vanished = d * 2.0**-223 * top**2 + 2.0**-126
    bound = 1.01 * (d + 6) * 2.0**-24 * size + lost + vanished
    true = np.take_along_axis(close, indices, axis=1)
    assert (np.abs(sign * scores - true) <= np.take_along_axis(bound, indices, 1)).all()
    # Who was left out is no closer than the last, but for what both may err by.
    last = true[:, -1:] + np.take_along_axis(bound, indices[:, -1:], axis=1)
    out = close - bound
    np.put_along_axis(out, indices, -np.inf, axis=1)
    assert (out <= last).all()
    if metric == "l2":
        # The statement is no excuse: what vanishes is 1e-18 beside 1e17, not 1e-14.
        assert (scores == 0).any() == (tiny == 1e-18)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_a_constant_matrix_gives_the_first_rows(metric, implementation):
    x = np.full((150, 4), 0.3, np.float32)
    found = kernels.all_pairs_neighbors(
        x, k=5, metric=metric, include_self=True, implementation=implementation
    )
    np.testing.assert_array_equal(found.indices, np.tile(np.arange(5), (150, 1)))


def test_squared_distances_ascend_and_are_never_negative(rng):
    x = (1000 + 1e-3 * rng.normal(size=(300, 5))).astype(np.float32)
    scores = kernels.all_pairs_neighbors(x, k=40, metric="l2").scores
    assert (np.asarray(scores) >= 0).all() and (np.diff(scores, axis=1) >= 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_one_row_and_no_rows(metric, implementation):
    knobs = {"metric": metric, "implementation": implementation}
    one = np.ones((1, 3), np.float32)
    none = np.ones((0, 3), np.float32)
    for found, shape in [
        (kernels.all_pairs_neighbors(one, k=2, **knobs), (1, 2)),
        (kernels.all_pairs_neighbors(none, k=2, **knobs), (0, 2)),
        (kernels.nearest_neighbors(one, none, k=3, **knobs), (1, 3)),
        (kernels.nearest_neighbors(none, one, k=3, **knobs), (0, 3)),
    ]:
        assert found.indices.shape == found.scores.shape == shape
        assert (np.asarray(found.indices) == -1).all() and np.isnan(found.scores).all()
    alone = kernels.all_pairs_neighbors(one, k=1, **knobs, include_self=True)
    assert alone.indices.tolist() == [[0]]


@pytest.mark.parametrize("metric", METRICS)
def test_the_search_works_inside_jit_vmap_and_shard_map(rng, metric):
    x = rng.normal(size=(4, 64, 8)).astype(np.float32)
    find = functools.partial(kernels.all_pairs_neighbors, k=5, metric=metric)
    batched = jax.jit(jax.vmap(find))(x)
    for scores, indices, rows in zip(*batched, x):
        assert_same((scores, indices), rows, rows, 5, metric, np.arange(64))

    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    queries = rng.normal(size=(32, 8)).astype(np.float32)
    split = jax.shard_map(
        functools.partial(kernels.nearest_neighbors, k=5, metric=metric),
        mesh=mesh,
        in_specs=(P("rows"), P()),
        out_specs=P("rows"),
    )
    assert_same(jax.jit(split)(queries, x[0]), queries, x[0], 5, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_scores_have_the_gradient_of_the_dense_definition(rng, metric):
    queries, keys = (rng.normal(size=(n, 4)).astype(np.float32) for n in (6, 30))

    def ours(q, x):
        return kernels.nearest_neighbors(q, x, k=3, metric=metric).scores.sum()

    def dense(q, x):
        if metric == "l2":
            scores = -jnp.square(q[:, None] - x).sum(-1)
            return -jax.lax.top_k(scores, 3)[0].sum()
        if metric == "cosine":
            q, x = (a / jnp.linalg.norm(a, axis=1, keepdims=True) for a in (q, x))
        return jax.lax.top_k(q @ x.T, 3)[0].sum()

    gradients = (jax.jit(jax.grad(f, (0, 1)))(queries, keys) for f in (ours, dense))
    for a, b in zip(*gradients):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_score_matrix_is_never_held(rng):
    x = jax.ShapeDtypeStruct((20_000, 16), jnp.float32)
    compiled = (
        jax.jit(functools.partial(kernels.all_pairs_neighbors, k=10)).lower(x).compile()
    )
    scores = 4 * x.shape[0] ** 2
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 16


def test_ties_are_free_where_this_jax_can_leave_them_so():
    """A stable order makes a GPU sort whole rows where k is above 16."""
    can = "is_stable" in inspect.signature(jax.lax.top_k).parameters
    jaxpr = jax.make_jaxpr(lambda x: topk._largest(x, 3))(jnp.ones((2, 64)))
    assert ("is_stable=False" in str(jaxpr)) == can


def test_merging_parts_is_searching_the_whole(rng):
    queries = rng.integers(-2, 3, size=(20, 5)).astype(np.float32)
    keys = rng.integers(-2, 3, size=(90, 5)).astype(np.float32)
    for metric in METRICS:
        find = functools.partial(kernels.nearest_neighbors, k=8, metric=metric)
        merge = functools.partial(kernels.merge_neighbors, metric=metric)
        whole = find(queries, keys)
        parts = []
        for start in (0, 30, 60):
            part = find(queries, keys[start : start + 30])
            ids = jnp.where(part.indices < 0, -1, part.indices + start)
            parts.append(part._replace(indices=ids))
        a, b, c = parts
        for merged in (merge(merge(a, b), c), merge(a, merge(c, b))):
            np.testing.assert_array_equal(merged.indices, whole.indices)
            np.testing.assert_array_equal(merged.scores, whole.scores)


def clustered(rng, rows=1500, d=32):
    """Clusters larger than a word of the mask, copies, a common offset, odd rows."""
    centres = rng.normal(size=(20, d))
    x = 2 + centres[rng.integers(0, 20, rows)] + 0.1 * rng.normal(size=(rows, d))
    x[300:420] = x[7]
    x[-100] = 0
    x[-99, 3] = np.nan
    return x.astype(np.float32)


@pytest.mark.parametrize("precision", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("metric", METRICS)
def test_many_panels_of_clusters_match_the_oracle(rng, monkeypatch, metric, precision):
    monkeypatch.setattr(prefilter, "dtype", lambda: np.dtype(precision))
    x = clustered(rng)
    found, proof = kernels.all_pairs_neighbors(
        x, k=25, metric=metric, implementation="streamed", with_proof=True
    )
    assert_same(found, x, x, 25, metric, excluded=np.arange(len(x)))
    assert proof.unproved.shape == (len(x),)
    again = kernels.all_pairs_neighbors(
        x, k=25, metric=metric, implementation="streamed"
    )
    for a, b in zip(found, again):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("metric", METRICS)
def test_crowded_tiles_give_up_rows_and_stay_exact(rng, monkeypatch, metric):
    monkeypatch.setattr(streamed._Search, "_allowed", lambda self: 600)
    x = clustered(rng)
    found, proof = kernels.all_pairs_neighbors(
        x, k=25, metric=metric, implementation="streamed", with_proof=True
    )
    assert proof.unproved.any()
    assert_same(found, x, x, 25, metric, excluded=np.arange(len(x)))


def test_memory_is_bounded_where_the_filter_tells_nothing_apart():
    """Two balls narrower than the filter's bound: 36 million pairs are candidates.

    Held at once, with what scoring takes, they would be well over a gigabyte. Most
    rows give up instead, and are exact.
    """
    program = """
        import resource
        import jax, numpy as np, jax.numpy as jnp
        from jaxling import kernels
        from jaxling.kernels import prefilter
        prefilter.dtype = lambda: np.dtype(jnp.bfloat16)
        rng = np.random.default_rng(0)
        centre = rng.standard_normal(16)
        centre /= np.linalg.norm(centre)
        x = np.repeat([centre, -centre], 6000, axis=0)
        x = (x + 0.01 * rng.standard_normal(x.shape)).astype(np.float32)
        jax.block_until_ready(jnp.zeros(1))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found, proof = kernels.all_pairs_neighbors(
            x, k=10, implementation="streamed", with_proof=True
        )
        rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        unit = x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
        rows = np.arange(0, 12000, 60)
        exact = unit[rows] @ unit.T
        exact[np.arange(len(rows)), rows] = -2
        best = -np.sort(-exact, axis=1)[:, :10]
        theirs = np.take_along_axis(exact, np.asarray(found.indices)[rows], axis=1)
        print(rise / 1024, proof.unproved.mean(), np.abs(theirs - best).max(),
            np.abs(np.asarray(found.scores)[rows] - best).max())
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=pathlib.Path(__file__).parents[1],
    )
    assert ended.returncode == 0, ended.stderr
    mebibytes, unproved, *errors = map(float, ended.stdout.split())
    assert unproved > 0.5
    assert max(errors) < 1e-6  # a few roundings of sums of 16 products below one
    assert mebibytes < 600, mebibytes  # of which compilation takes 200


def test_a_few_rows_in_a_thousand_lack_a_proof(rng):
    # The threshold is three standard deviations below the k-th neighbour: about one
    # row in a thousand; five times that leaves room for chance.
    x = rng.normal(size=(4096, 48)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "SAMPLE", 1024)
        patch.setattr(panels, "BLOCK", 512)
        patch.setattr(concrete, "PANEL", 4096)
        _, proof = kernels.all_pairs_neighbors(
            x, k=20, implementation="streamed", with_proof=True
        )
    assert 0 <= proof.unproved.mean() < 0.005


@pytest.mark.parametrize("center", [0.0, 1.0])
@pytest.mark.parametrize("metric", METRICS)
def test_the_bound_holds_where_rounding_is_worst(rng, metric, center):
    # Entries halfway between two bfloat16 numbers, all rounded the same way: the
    # residuals line up with the rows, as Cauchy-Schwarz allows at most.
    x = rng.choice([-1.0, 1.0], size=(64, 256)) * (1 + 2.0**-8 - 2.0**-16)
    x = x.astype(np.float32)
    x[32:] = x[:32] * np.float32(1 + 2.0**-10)
    rows, _ = pairs.prepare(jnp.asarray(x), jnp.asarray(x), metric, one_scale=True)
    middle = center * rows.values.mean(axis=0)
    ids = jnp.arange(64, dtype=jnp.int32)
    block = prefilter.operand(rows.values, ids, middle, metric, np.dtype(jnp.bfloat16))
    largest = prefilter.Largest(
        *(jnp.max(getattr(block, name)) for name in prefilter.Largest._fields)
    )
    bound = prefilter.bound(block, largest, jnp.linalg.norm(middle), metric)
    b = np.asarray(block.values.astype(jnp.float32), np.float64)
    bias = np.asarray(block.bias, np.float64)
    filtered = b @ b.T + bias[:, None] + bias
    exact = oracles.closeness(
        rows.values, rows.values, "l2" if metric == "l2" else "dot"
    )
    exact = exact / (2 if metric == "l2" else 1)
    error = np.abs(filtered - exact).max(axis=1)
    assert (error <= np.asarray(bound)).all()
    if metric == "dot" and not center:
        assert (error > 0.5 * np.asarray(bound)).all()  # honest, not merely large


def test_a_bound_that_lies_would_lose_a_neighbour(rng, monkeypatch):
    # Row 0's true neighbour is filtered far too low, a decoy far too high.
    x = rng.choice([-1.0, 1.0], size=(600, 256)).astype(np.float32)
    x[1] = x[0] * np.where(np.arange(256) < 128, 1.0039, 0.9961).astype(np.float32)
    x[2:40] = x[0] * rng.choice([0.99, 1.012], size=(38, 256)).astype(np.float32)
    knobs = {"k": 3, "implementation": "streamed"}
    assert_same(
        kernels.all_pairs_neighbors(x, **knobs), x, x, 3, "cosine", np.arange(600)
    )
    monkeypatch.setattr(
        prefilter, "bound", lambda rows, *_: jnp.full_like(rows.norm, -0.01)
    )
    lying = kernels.all_pairs_neighbors(x, **knobs)
    _, expected = oracles.neighbors(x, x, 3, "cosine", np.arange(600))
    assert (np.asarray(lying.indices) != expected).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_panels_brought_together_are_the_whole(rng, metric, implementation):
    x = clustered(rng, rows=700)
    first, second = x[:400], x[400:]
    knobs = {"k": 12, "metric": metric, "implementation": implementation}
    own = [kernels.all_pairs_neighbors(part, **knobs) for part in (first, second)]
    for bests in ({}, {"best_a": own[0], "best_b": own[1]}):
        found = kernels.cross_neighbors(first, second, **knobs, **bests)
        if not bests:
            assert_same(found[0], first, second, 12, metric)
            assert_same(found[1], second, first, 12, metric)
        parts = []
        for mine, theirs, shifts in zip(own, found, ((0, 400), (400, 0))):
            shifted = (
                part._replace(
                    indices=jnp.where(part.indices < 0, -1, part.indices + shift)
                )
                for part, shift in zip((mine, theirs), shifts)
            )
            parts.append(kernels.merge_neighbors(*shifted, metric=metric))
        whole = (np.concatenate(pair) for pair in zip(*parts))
        assert_same(whole, x, x, 12, metric, np.arange(700))


def test_both_directions_of_a_trace_share_one_product(rng, monkeypatch):
    products, multiply = [], halves.closeness

    def counted(*operands):
        jax.debug.callback(lambda: products.append(1))
        return multiply(*operands)

    monkeypatch.setattr(halves, "closeness", counted)
    a, b = (rng.normal(size=(n, 3)).astype(np.float32) for n in (37, 23))
    found = kernels.cross_neighbors(a, b, k=4, metric="dot", implementation="traced")
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert len(products) == 1
    assert_same(found[0], a, b, 4, "dot")
    assert_same(found[1], b, a, 4, "dot")
    none = kernels.cross_neighbors(a, b[:0], k=4, implementation="traced")
    assert none[0].indices.tolist() == [[-1] * 4] * 37
    assert none[1].indices.shape == none[1].scores.shape == (0, 4)


def test_a_second_search_compiles_nothing(rng):
    x = rng.normal(size=(700, 16)).astype(np.float32)
    knobs = {"k": 7, "implementation": "streamed"}
    kernels.all_pairs_neighbors(x, **knobs)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr(
            logging.getLogger("jax"), "handle", lambda record: compiled.append(record)
        )
        kernels.all_pairs_neighbors(x[::-1].copy(), **knobs)
    assert not [r for r in compiled if "Compiling" in r.getMessage()]


def test_ranks_order_as_closeness_then_id(rng):
    closeness = rng.choice(
        np.array([-np.inf, -2.5, -0.0, 0.0, 1e-30, 3.0, np.inf], np.float32), 200
    )
    ids = rng.permutation(200)
    ranks = ranking.encode(closeness, ids)
    order = np.lexsort((ids, -closeness))
    np.testing.assert_array_equal(np.argsort(ranks), order)
    back = ranking.decode(np.append(ranks, ranking.EMPTY))
    np.testing.assert_array_equal(back[0], np.append(closeness, np.nan))
    np.testing.assert_array_equal(back[1], np.append(ids, -1))


def test_streaming_refuses_a_trace_and_says_why():
    x = np.ones((4, 2), np.float32)
    find = functools.partial(
        kernels.all_pairs_neighbors, k=1, implementation="streamed"
    )
    with pytest.raises(dispatch.Unavailable, match="concrete"):
        jax.jit(find)(x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("k, m", [(5, 70), (90, 70), (3, 0)])
def test_csls_matches_its_definition(rng, implementation, k, m):
    """With copies, keys that are no numbers, and fewer keys than are asked for."""
    queries, keys = (rng.normal(size=(n, 6)).astype(np.float32) for n in (40, m))
    queries[3], queries[4, 2], queries[10:25] = 0, np.nan, queries[9]
    if m:
        keys[5], keys[6, 1], keys[7, 0] = 0, np.nan, np.inf
        keys[20:50] = keys[1]
    found = kernels.csls_neighbors(
        queries, keys, k=k, neighborhood=10, implementation=implementation
    )
    scores, indices = (np.asarray(part) for part in found)
    expected = oracles.csls(queries, keys, 10)
    order = np.argsort(-expected, axis=1)[:, :k]  # NaN last
    best = np.full((40, k), np.nan)
    best[:, : order.shape[1]] = np.take_along_axis(expected, order, axis=1)
    np.testing.assert_array_equal(indices < 0, np.isnan(best))
    # Sums of three cosines of 6 products each, in float32.
    np.testing.assert_allclose(scores, best, atol=2e-6)
    if m:
        theirs = np.take_along_axis(expected, np.maximum(indices, 0), axis=1)
        theirs = np.where(indices < 0, np.nan, theirs)
        np.testing.assert_allclose(theirs, best, atol=2e-6)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in indices)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_csls_scores_go_to_the_lower_index(rng, implementation):
    """Taking the query's own crowding away makes scores equal that differed."""
    queries = rng.normal(size=(64, 2)).astype(np.float32)
    # Hundreds of keys within a narrow angle, whose scores lie close together.
    angle = 1e-3 * rng.normal(size=800)
    keys = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    scores, indices = map(
        np.asarray,
        kernels.csls_neighbors(
            queries, keys, k=800, neighborhood=3, implementation=implementation
        ),
    )
    equal = scores[:, :-1] == scores[:, 1:]
    assert equal.any() and (scores[:, :-1] >= scores[:, 1:]).all()
    assert (indices[:, :-1] < indices[:, 1:])[equal].all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_float64_beyond_float32_is_not_finite(float64, metric, implementation):
    """Where JAX keeps float64: rows are rounded first, and then looked at."""
    knobs = {"k": 2, "metric": metric, "implementation": implementation}
    x = np.array([[1e39, 0], [1, 0], [0, 1], [1, 1]])
    found = kernels.all_pairs_neighbors(x, **knobs)
    beyond = np.array([[np.nan, 0], [1, 0], [0, 1], [1, 1]])
    assert_same(found, beyond, beyond, 2, metric, excluded=np.arange(4))
    assert (np.asarray(found.indices) >= 0).sum() == 6
    for a, b in ((x[1:], x[:0]), (x[:0], x[1:])):
        lists = kernels.cross_neighbors(a, b, **knobs)
        for scores, indices in (*lists, kernels.nearest_neighbors(a, b, **knobs)):
            assert scores.dtype == np.float32 and indices.dtype == np.int32
            assert np.isnan(scores).all() and (indices == -1).all()


def test_mutual_neighbors_and_k_occurrence_on_paper():
    forward = np.array([[1, 2], [0, 3], [0, -1], [2, 1]])
    expected = [[True, True], [True, True], [True, False], [False, True]]
    assert kernels.mutual_neighbors(forward).tolist() == expected
    assert kernels.mutual_neighbors(forward[:2], forward).tolist() == expected[:2]
    assert kernels.k_occurrence(forward, 5).tolist() == [2, 2, 2, 1, 0]
    # 9 is no key and 200 no query: nobody returns their favour.
    odd = np.array([[5, 1], [0, 9]])
    assert kernels.mutual_neighbors(odd).tolist() == [[False, True], [True, False]]
    assert kernels.mutual_neighbors(np.full((300, 1), 7, np.int8)).sum() == 1
    assert kernels.k_occurrence(odd, 2).tolist() == [1, 1]
    assert kernels.k_occurrence(np.array([]), 2).tolist() == [0, 0]


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (kernels.mutual_neighbors, (np.array([[0.5]]),), "`forward`.*integers.*float"),
        (
            kernels.mutual_neighbors,
            (np.array([[0]]), np.array([[0.5]])),
            "`backward`.*integers.*float",
        ),
        (kernels.mutual_neighbors, (np.array([0]),), r"`forward`.*\(1,\)"),
        (kernels.k_occurrence, (np.array([[0.5]]), 2), "`indices`.*integers.*float"),
        (kernels.k_occurrence, (np.array([[0]]), -1), "`keys`.*at least 0.*-1"),
    ],
)
def test_lists_that_are_none_are_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 0}, "`k`.*at least 1.*0"),
        ({"metric": "euclid"}, "`metric`.*'euclid'"),
        ({"keys": np.ones((3, 2), np.float32)}, r"same number of columns.*\(3, 2\)"),
        ({"queries": np.ones((3, 4), np.int32)}, "`queries`.*floating.*int32"),
        ({"queries": np.ones(4, np.float32)}, r"`queries`.*\(4,\)"),
        ({"implementation": "magic"}, "`implementation`.*'magic'"),
    ],
)
def test_doors_name_argument_rule_and_value(change, message):
    good = {"queries": np.ones((2, 4), np.float32), "keys": np.ones((3, 4), np.float32)}
    arguments = good | {"k": 1} | change
    with pytest.raises(ValueError, match=message):
        kernels.nearest_neighbors(
            arguments.pop("queries"), arguments.pop("keys"), **arguments
        )
