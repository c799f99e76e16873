"""Many devices find what one finds, and do no more than their share."""

import functools
import re

import counting
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from jax.sharding import Mesh

from jaxling import kernels
from jaxling.kernels import batching, pairs, ringed, topk
from jaxling.kernels import mesh as meshes

K = 6


def devices(*shape):
    """A mesh of the first devices."""
    names = ("a", "b")[: len(shape)]
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names)


def odd_rows(rng, n, d=8, dtype=np.float32):
    """Copies, rows that are not numbers, a row of zeros."""
    x = rng.standard_normal((n, d)).astype(np.float32)
    x[n // 3 : n // 2] = x[1]
    x[n // 2] = 0
    x[n - 2, 0], x[n - 4, 1] = np.nan, np.inf
    return x.astype(dtype)


def assert_neighbors(found, queries, keys, metric, excluded=None):
    """Scores of the oracle, and ids whose true scores are as good, best first."""
    queries, keys = (np.asarray(x, np.float64) for x in (queries, keys))
    scores, indices = (np.asarray(part) for part in found)
    expected, ids = oracles.neighbors(queries, keys, K, metric, excluded)
    np.testing.assert_array_equal(indices < 0, ids < 0)
    sign = -1 if metric == "l2" else 1
    close = sign * oracles.closeness(queries, keys, metric)
    reached = np.take_along_axis(close, np.maximum(indices, 0), axis=1)
    reached[ids < 0] = np.nan
    # Float32 sums of 8 products of numbers of size one.
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=3e-6)
    np.testing.assert_allclose(reached, expected, rtol=1e-6, atol=3e-6)
    full = indices[:, 1:] >= 0
    tied = full & (scores[:, 1:] == scores[:, :-1])
    assert (indices[:, 1:] > indices[:, :-1])[tied].all()
    assert (sign * scores[:, :-1] >= sign * scores[:, 1:])[full].all()
    for line in indices:
        assert len(set(line[line >= 0])) == (line >= 0).sum()


@pytest.mark.parametrize(
    "shape, n, metric, dtype",
    [
        ((8,), 203, "cosine", np.float32),
        ((3,), 100, "l2", np.float32),
        ((2, 2), 61, "dot", ml_dtypes.bfloat16),
        ((8,), 5, "cosine", np.float32),
    ],
)
def test_all_pairs(rng, shape, n, metric, dtype):
    x = odd_rows(rng, n, dtype=dtype)
    found = kernels.all_pairs_neighbors(x, k=K, metric=metric, mesh=devices(*shape))
    assert_neighbors(found, x, x, metric, np.arange(n))
    assert found.scores.sharding.is_fully_replicated


@pytest.mark.parametrize(
    "shape, n, m, metric",
    [((8,), 31, 203, "dot"), ((3,), 2, 50, "cosine"), ((4,), 9, 3, "l2")],
)
def test_queries_and_keys(rng, shape, n, m, metric):
    queries = rng.standard_normal((n, 8)).astype(np.float32)
    keys = odd_rows(rng, m) if m > 8 else rng.standard_normal((m, 8), np.float32)
    found = kernels.nearest_neighbors(
        queries, keys, k=K, metric=metric, mesh=devices(*shape)
    )
    assert_neighbors(found, queries, keys, metric)


def test_a_row_among_its_own_and_the_share_that_was_searched_again(rng):
    x = rng.standard_normal((90, 8)).astype(np.float32)
    x[:80] = x[0] + 1e-7 * rng.standard_normal((80, 8))  # no product tells these apart
    found, proof = kernels.all_pairs_neighbors(
        x, k=K, metric="l2", include_self=True, with_proof=True, mesh=devices(2)
    )
    assert_neighbors(found, x, x, "l2")
    assert proof.unproved[:80].all()
    one = kernels.all_pairs_neighbors(x, k=K, metric="l2", include_self=True)
    np.testing.assert_allclose(found.scores, one.scores, rtol=1e-6, atol=1e-12)
    none = kernels.all_pairs_neighbors(x[:0], k=K, mesh=devices(2))
    assert none.indices.shape == (0, K)


def test_one_product_serves_both_sides_whatever_the_tiles(rng):
    a, b = odd_rows(rng, 150), odd_rows(rng, 90)
    rows, keys = pairs.prepare(jnp.asarray(a), jnp.asarray(b), "l2", one_scale=True)
    find = functools.partial(topk.search_both, k=K, metric="l2", tile=64)
    found = jax.jit(find)(rows, keys)
    for me, other, part in ((a, b, found[0]), (b, a, found[1])):
        expected, ids = oracles.neighbors(
            *(x.astype(np.float64) for x in (me, other)), K, "l2", None
        )
        close = -oracles.closeness(me.astype(float), other.astype(float), "l2")
        reached = np.take_along_axis(close, np.maximum(part.indices, 0), axis=1)
        np.testing.assert_array_equal(part.indices < 0, ids < 0)
        np.testing.assert_allclose(
            np.where(ids < 0, np.nan, reached), expected, rtol=1e-6, atol=3e-6
        )


def test_inside_a_program_and_under_another_current_mesh(rng):
    x = rng.standard_normal((21, 8)).astype(np.float32)
    explicit = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    find = functools.partial(kernels.nearest_neighbors, k=K, mesh=explicit)
    assert_neighbors(jax.jit(find)(x, x), x, x, "cosine")
    with jax.set_mesh(explicit):
        assert_neighbors(find(x, x), x, x, "cosine")


def test_where_jax_keeps_float64_too(float64, rng):
    x = rng.standard_normal((21, 8))
    found = kernels.all_pairs_neighbors(x, k=K, mesh=devices(3))
    assert found.scores.dtype == np.float32
    assert_neighbors(found, x, x, "cosine", np.arange(21))


def test_scores_have_gradients(rng):
    queries, keys = (rng.standard_normal((n, 4)).astype(np.float32) for n in (6, 30))

    def total(queries, keys, mesh):
        find = functools.partial(kernels.nearest_neighbors, k=3, metric="dot")
        return find(queries, keys, mesh=mesh).scores.sum()

    gradients = (
        jax.grad(functools.partial(total, mesh=mesh), (0, 1))(queries, keys)
        for mesh in (None, devices(2))
    )
    for a, b in zip(*gradients):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("metric, near", [("cosine", 1e-4), ("dot", 1e-6)])
def test_a_pair_has_one_sum_wherever_it_stands(rng, metric, near):
    # So near to each other that no product tells them apart: rows are rescued, and
    # scores tie or differ in the last bit. Copies are many, and on every device.
    x = (1 + near * rng.standard_normal((203, 33))).astype(np.float32)
    x[rng.integers(6, 203, size=60)] = x[5]
    copies = np.flatnonzero((x == x[5]).all(axis=1))
    one = kernels.all_pairs_neighbors(x, k=7, metric=metric, implementation="traced")
    for parts in (1, 2, 3):
        found, proof = kernels.all_pairs_neighbors(
            x, k=7, metric=metric, mesh=devices(parts), with_proof=True
        )
        assert np.mean(proof.unproved) > 0.1
        for row, line in enumerate(np.asarray(found.indices)):
            own = line[np.isin(line, copies)]
            np.testing.assert_array_equal(own, copies[copies != row][: len(own)])
        if metric == "dot":  # lengths of cosine are summed otherwise in other parts
            np.testing.assert_array_equal(found.indices, one.indices)
            np.testing.assert_array_equal(found.scores, one.scores)


@pytest.mark.parametrize("parts", [None, 3])
def test_second_derivatives(rng, parts):
    queries, keys = (rng.standard_normal((n, 4)).astype(np.float32) for n in (3, 14))
    mesh = None if parts is None else devices(parts)

    def found(queries):
        knobs = {"k": 2, "metric": "dot", "implementation": "traced", "mesh": mesh}
        return jnp.sum(kernels.nearest_neighbors(queries, keys, **knobs).scores ** 2)

    def dense(queries):
        return jnp.sum(jax.lax.top_k(queries @ keys.T, 2)[0] ** 2)

    expected = jax.hessian(dense)(queries)
    assert np.abs(expected).max() > 1
    for second in (jax.hessian(found), jax.jacrev(jax.grad(found))):
        np.testing.assert_allclose(second(queries), expected, atol=1e-4)


def test_derivatives_of_bfloat16_rows_travel_in_float32(rng):
    x = jnp.asarray(rng.standard_normal((40, 16)), jnp.bfloat16)
    others = rng.standard_normal((24, 16)).astype(np.float32)

    def total(x, mesh):
        found = kernels.nearest_neighbors(others, x, k=9, metric="dot", mesh=mesh)
        return jnp.sum(found.scores)

    # Rows of float32 with the same values: their gradient is not rounded at the end.
    expected = jax.grad(total)(x.astype(jnp.float32), None)
    gradient = jax.grad(total)(x, devices(8))
    # One rounding to bfloat16, that of the result; sums in it would have more.
    gradient = np.asarray(gradient, np.float32)
    np.testing.assert_allclose(gradient, expected, rtol=2.0**-8)


@pytest.mark.parametrize("parts", [None, 4])
def test_bfloat16_rows_whose_length_overflows(rng, parts):
    x = np.clip(rng.standard_normal((60, 64)), -1.9, 1.9).astype(np.float32)
    x = (x * np.float32(2.0) ** 126).astype(ml_dtypes.bfloat16)
    mesh = None if parts is None else devices(parts)
    find = functools.partial(kernels.all_pairs_neighbors, k=K, mesh=mesh)
    found = jax.jit(functools.partial(find, implementation="traced"))(x)
    scaled = x.astype(np.float64) / 2.0**126
    assert_neighbors(found, scaled, scaled, "cosine", np.arange(60))


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_a_device_multiplies_and_sends_what_the_formula_says(rng, parts):
    n, d, k = 1024, 16, 5
    mesh = meshes.line(devices(parts))
    x = meshes.share(rng.standard_normal((n, d)).astype(np.float32), mesh)
    part = n // parts

    def count(search, *arrays, **knobs):
        lowered = search.lower(*arrays, n=n, mesh=mesh, k=k, metric="cosine", **knobs)
        return counting.counted(lowered.compile().as_text())

    rows = part * (4 * d + 1)  # float32, and whether a row is valid
    # The closeness k rows reach; closeness, id, and whether a search was repeated.
    lists = part * (4 + k * 8 + 1)
    found = count(ringed.all_pairs, x, include_self=False)
    assert found["dot"] == 2 * d * part**2 * (parts + 1) / 2
    assert found["collective-permute"] == parts // 2 * (rows + lists)
    found = count(ringed.nearest, x, x)
    assert found["dot"] == 2 * d * part * n
    assert found["collective-permute"] == (parts - 1) * rows


@pytest.mark.parametrize("search", [ringed.all_pairs, ringed.nearest])
def test_bfloat16_rows_travel_as_such(rng, search):
    mesh = meshes.line(devices(4))
    x = rng.standard_normal((64, 16)).astype(ml_dtypes.bfloat16)
    rows = meshes.share(x, mesh)
    sides = (rows, rows) if search is ringed.nearest else (rows,)
    knobs = {"include_self": True} if search is ringed.all_pairs else {}
    lowered = search.lower(*sides, n=64, mesh=mesh, k=3, metric="cosine", **knobs)
    # In the program that is compiled: a CPU's compiler widens what it sends.
    sent = re.findall(r"collective_permute.*-> tensor<(\w+)>", lowered.as_text())
    assert "16x16xbf16" in sent
    assert "16x16xf32" not in sent


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_visit_scores_only_what_may_enter(rng, dtype):
    queries, keys = (rng.standard_normal((n, 8)).astype(dtype) for n in (40, 300))
    rows, others = pairs.prepare(jnp.asarray(queries), jnp.asarray(keys), "cosine")
    whole = topk.search(rows, others, k=K, metric="cosine")
    # Half of the rows look for what is among their two closest, the others for nothing.
    floor = jnp.where(jnp.arange(40) % 2, whole.closeness[:, 1], 1.01)
    found = topk.search(rows, others, k=K, metric="cosine", floor=floor)
    seen = found.indices[1::2]
    np.testing.assert_array_equal(seen[:, :2], whole.indices[1::2, :2])
    assert not found.unproved.any()
    assert (found.indices[::2] == -1).all()
    # What else was scored is nearly as close: within two bounds.
    near = whole.closeness[1::2, 1:2] - found.closeness[1::2]
    assert (near[seen >= 0] < 1e-4).all()


@pytest.mark.parametrize("parts, n, m", [(8, 21, 43), (3, 2, 60), (4, 5, 3)])
def test_reductions(rng, parts, n, m):
    queries, keys = (rng.standard_normal((rows, 8), np.float32) for rows in (n, m))
    keys[-1] = keys[0]  # a tie between the first block and what is left over
    each = {
        "moments": kernels.moments(),
        "best": kernels.maximum(),
        "above": kernels.count_above(np.linspace(-1, 1, n), exclude=np.arange(n) % m),
        "mass": kernels.group_mass(np.arange(m) % 3, 3),
    }
    knobs = {"tile": 4, "rows": 3}
    one = jax.jit(lambda a, b: kernels.reduce_scores(a, b, each, **knobs))
    found = kernels.reduce_scores(queries, keys, each, mesh=devices(parts), **knobs)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one(queries, keys))):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


def test_a_reduction_sends_keys_alone(rng):
    x = rng.standard_normal((64, 16), np.float32)
    mesh = devices(8)

    def total(x):
        return kernels.reduce_scores(x, x, kernels.log_sum_exp(), mesh=mesh).sum()

    found = counting.counted(jax.jit(total).lower(x).compile().as_text())
    assert found["collective-permute"] == 7 * 8 * 16 * 4
    assert found["dot"] == 2 * 8 * 64 * 16
    gradient = jax.jit(jax.grad(total))(x)
    scores = x @ x.T
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(gradient, p @ x + p.T @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts, n, vocab", [(8, 21, 203), (3, 2, 64), (8, 9, 6)])
def test_layers_through_a_vocabulary_that_goes_round(rng, parts, n, vocab):
    hidden = rng.standard_normal((3, n, 8), np.float32)
    unembed = rng.standard_normal((vocab, 8), np.float32)
    unembed[-1] = unembed[0]  # equal logits in two blocks
    hidden[1, 0, 0] = np.nan
    targets = rng.integers(-1, vocab, (n, 2))
    targets[0] = 0, vocab - 1
    knobs = {
        "transform": jax.tree_util.Partial(
            lambda scale, h: h * scale, jnp.ones(8) * 0.7
        ),
        "bias": np.linspace(-1, 1, vocab, dtype=np.float32) * 0,
        "softcap": 30.0,
        "k": 4,
        "entropy": True,
        "divergence": True,
        "targets": targets,
        "groups": rng.integers(0, 2, (3, vocab)),
        "tile": 16 if vocab > 16 else 4,
    }
    one = kernels.project_layers(hidden, unembed, **knobs)
    found = kernels.project_layers(hidden, unembed, mesh=devices(parts), **knobs)
    for name, a, b in zip(one._fields, found, one):
        if b.dtype == np.int32 or b.dtype == bool:
            np.testing.assert_array_equal(a, b, name)
        else:
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=5e-6, err_msg=name)


def test_a_lens_sends_the_vocabulary_and_multiplies_its_share(rng):
    layers, n, vocab, d, parts = 2, 16, 256, 8, 8
    hidden = rng.standard_normal((layers, n, d), np.float32)
    unembed = rng.standard_normal((vocab, d), np.float32)

    def entropy(hidden, unembed):
        return kernels.project_layers(
            hidden, unembed, entropy=True, mesh=devices(parts)
        ).entropy

    text = jax.jit(entropy).lower(hidden, unembed).compile().as_text()
    found = counting.counted(text)
    assert found["dot"] == 2 * d * layers * n * vocab / parts
    assert found["collective-permute"] == (parts - 1) * vocab // parts * d * 4


@pytest.mark.parametrize(
    "shape, parts", [((2, 70, 12), 8), ((9, 30), 2), ((5, 4), 8), ((1600, 6), 2)]
)
def test_probes_are_dealt_out(rng, shape, parts, monkeypatch):
    monkeypatch.setattr(batching, "MARGINS", 64)
    monkeypatch.setattr(batching, "BLOCK_ROWS", 64)
    x = rng.standard_normal(shape).astype(np.float32)
    problems = kernels.one_vs_one(np.arange(shape[-2]) % 4)
    start = None
    if shape == (9, 30):
        start = np.full((6, 30), 0.1), np.zeros(6)
    knobs = {"l2": np.linspace(0.5, 2, 6), "start": start, "tolerance": 1e-6}
    one = kernels.fit_logistic(x, problems, **knobs)
    found = kernels.fit_logistic(x, problems, mesh=devices(parts), **knobs)
    assert found.converged.all()
    for name in ("objective", "weights", "intercepts"):
        # Both are within 1e-6 of the optimum, and took nearly the same way there.
        a, b = getattr(found, name), getattr(one, name)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_named(rng):
    x = rng.standard_normal((4, 3)).astype(np.float32)
    with pytest.raises(ValueError, match="`implementation`.*`mesh`; got 'streamed'"):
        kernels.nearest_neighbors(x, x, k=2, mesh=devices(2), implementation="streamed")
