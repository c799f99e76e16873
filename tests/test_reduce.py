"""Reductions of scores: against the dense definition, and the laws of a reducer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxling import kernels

N, M, D = 21, 130, 7


@pytest.fixture
def sides(rng):
    return (rng.normal(size=(rows, D)).astype(np.float32) for rows in (N, M))


def reducers(rng):
    return {
        "log_sum_exp": kernels.log_sum_exp(),
        "moments": kernels.moments(),
        "mass": kernels.group_mass(rng.integers(0, 3, M), 3),
        "above": kernels.count_above(rng.normal(size=N), rng.integers(0, M, N)),
        "maximum": kernels.maximum(),
    }


def dense(rng, queries, keys):
    """The same in float64, from the score matrix."""
    scores = queries.astype(np.float64) @ keys.astype(np.float64).T
    groups, threshold = rng.integers(0, 3, M), rng.normal(size=N)
    exclude = rng.integers(0, M, N)
    p = np.exp(scores)
    total = p.sum(axis=1, keepdims=True)
    p /= total
    mean = (p * scores).sum(axis=1)
    above = scores > threshold[:, None].astype(np.float32)
    above[np.arange(N), exclude] = False
    lse = np.log(total[:, 0])
    variance = (p * (scores - mean[:, None]) ** 2).sum(axis=1)
    return {
        "log_sum_exp": lse,
        "moments": (lse, mean, variance, -(p * np.log(p)).sum(axis=1)),
        "mass": np.stack([p[:, groups == g].sum(axis=1) for g in range(3)], axis=1),
        "above": above.sum(axis=1),
        "maximum": (scores.max(axis=1), scores.argmax(axis=1)),
    }


def assert_close(a, b):
    # Sums of 130 float32 terms; scores reach about 10.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5),
        jax.tree.leaves(a),
        jax.tree.leaves(b),
    )


@pytest.mark.parametrize("tile, rows", [(1, 4), (64, 7), (129, 21), (130, 100)])
def test_any_tiling_gives_the_dense_definition(sides, tile, rows):
    queries, keys = sides
    each = reducers(np.random.default_rng(1))
    reduce = functools.partial(
        kernels.reduce_scores, reducers=each, tile=tile, rows=rows
    )
    found = jax.jit(reduce)(queries, keys)
    assert_close(found, dense(np.random.default_rng(1), queries, keys))


def test_merge_is_associative_and_commutative(sides):
    queries, keys = sides
    each = reducers(np.random.default_rng(1))
    chunk = jax.jit(
        lambda first, part: kernels.accumulate_scores(
            queries, part, each, first_key=first, tile=16
        )
    )
    a, b, c = (chunk(first, keys[first : first + 50]) for first in (0, 50, 100))
    merge = jax.jit(functools.partial(kernels.merge_scores, each))
    expected = dense(np.random.default_rng(1), queries, keys)
    for carry in (merge(merge(a, b), c), merge(a, merge(c, b))):
        assert_close(kernels.finish_scores(each, carry), expected)


def test_no_keys_is_the_neutral_element(sides):
    queries, keys = sides
    each = reducers(np.random.default_rng(1))
    nothing = kernels.accumulate_scores(queries, keys[:0], each)
    something = kernels.accumulate_scores(queries, keys, each)
    for merged in (
        kernels.merge_scores(each, nothing, something),
        kernels.merge_scores(each, something, nothing),
    ):
        assert_close(merged, something)
    empty = kernels.finish_scores(each, nothing)
    assert (np.asarray(empty["log_sum_exp"]) == -np.inf).all()
    assert (np.asarray(empty["maximum"].indices) == -1).all()


def test_large_scores_neither_overflow_nor_lose_the_variance(sides):
    queries, keys = sides
    queries = np.concatenate([queries, np.full((N, 1), 1e4, np.float32)], axis=1)
    keys = np.concatenate([keys, np.ones((M, 1), np.float32)], axis=1)
    found = kernels.reduce_scores(queries, keys, kernels.moments(), tile=32)
    scores = (queries.astype(np.float64) @ keys.astype(np.float64).T) - 1e4
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    entropy = -(p * np.log(p)).sum(axis=1)
    mean = (p * scores).sum(axis=1, keepdims=True)
    variance = (p * (scores - mean) ** 2).sum(axis=1)
    # Scores near 1e4 are rounded to 5e-4 each; their spread is about 2.
    np.testing.assert_allclose(found.entropy, entropy, atol=5e-3)
    np.testing.assert_allclose(found.variance, variance, atol=5e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inputs_lose_nothing_more(sides, dtype):
    queries, keys = (jnp.asarray(side, dtype) for side in sides)
    found = kernels.reduce_scores(
        queries, keys, reducers(np.random.default_rng(1)), tile=64
    )
    rounded = (np.asarray(side.astype(jnp.float32)) for side in (queries, keys))
    assert_close(found, dense(np.random.default_rng(1), *rounded))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_row_that_is_no_number_spoils_no_other(sides, number):
    """Its own results are no numbers, at any tiling; all others are as without it."""
    queries, keys = sides
    odd = queries.copy()
    odd[4, 2] = number
    each = (kernels.log_sum_exp(), kernels.moments())
    whole = kernels.reduce_scores(queries, keys, each)
    for tile in (16, M):
        found = kernels.reduce_scores(odd, keys, each, tile=tile)
        for part, expected in zip(jax.tree.leaves(found), jax.tree.leaves(whole)):
            assert not np.isfinite(part[4])
            others = np.arange(N) != 4
            np.testing.assert_allclose(part[others], expected[others], rtol=2e-5)


def test_devices_are_a_merge_over_the_mesh(sides):
    queries, keys = sides
    keys = keys[:128]
    each = {"lse": kernels.log_sum_exp(), "best": kernels.maximum()}
    mesh = jax.make_mesh((4,), ("keys",), axis_types=(AxisType.Auto,))

    def shard(queries, keys):
        first = jax.lax.axis_index("keys") * keys.shape[0]
        carry = kernels.accumulate_scores(queries, keys, each, first_key=first, tile=8)
        return jax.tree.map(lambda x: x[None], carry)

    split = jax.shard_map(
        shard, mesh=mesh, in_specs=(P(), P("keys")), out_specs=P("keys")
    )
    parts = jax.jit(split)(queries, keys)
    carries = [jax.tree.map(lambda x, i=i: x[i], parts) for i in range(4)]
    merged = functools.reduce(functools.partial(kernels.merge_scores, each), carries)
    assert_close(
        kernels.finish_scores(each, merged), kernels.reduce_scores(queries, keys, each)
    )


def test_gradients_match_the_dense_ones_in_little_memory(sides):
    queries, keys = sides

    def ours(q, x):
        lse, moments = kernels.reduce_scores(
            q, x, (kernels.log_sum_exp(), kernels.moments()), tile=32, rows=8
        )
        return lse.sum() + moments.entropy.sum()

    def direct(q, x):
        scores = q @ x.T
        p = jax.nn.softmax(scores)
        lse = jax.nn.logsumexp(scores, axis=1)
        return lse.sum() - (p * jnp.log(p)).sum()

    gradients = (jax.jit(jax.grad(f, (0, 1)))(queries, keys) for f in (ours, direct))
    for a, b in zip(*gradients):
        np.testing.assert_allclose(a, b, atol=2e-5)

    def total(q, x):
        return kernels.reduce_scores(q, x, kernels.log_sum_exp()).sum()

    n = 16_384
    shape = jax.ShapeDtypeStruct((n, 8), jnp.float32)
    for function in (total, jax.grad(total)):
        compiled = jax.jit(function).lower(shape, shape).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * n * n / 16


def test_a_reduction_of_ones_own_is_four_functions(sides):
    queries, keys = sides
    total = kernels.Reducer(
        init=lambda rows: jnp.zeros(rows.shape),
        update=lambda carry, scores, key_ids: carry + scores.sum(axis=1),
        merge=lambda a, b: a + b,
        finish=lambda carry: carry / M,
    )
    found = kernels.reduce_scores(queries, keys, total, tile=50)
    np.testing.assert_allclose(found, (queries @ keys.T).mean(axis=1), atol=1e-5)


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        (((2, 3), (4, 5)), {}, r"one d.*\(2, 3\) and \(4, 5\)"),
        (((2, 3), (4, 3)), {"tile": 0}, "`tile`.*0"),
    ],
)
def test_doors_name_argument_rule_and_value(shapes, options, message):
    queries, keys = (np.ones(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        kernels.reduce_scores(queries, keys, kernels.maximum(), **options)
