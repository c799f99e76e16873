"""What an accelerator multiplies: bfloat16, each pair once, and exact all the same."""

import functools
import re

import counting
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import Mesh

from jaxling import kernels
from jaxling.kernels import halves, neighbors, pairs, ringed, topk
from jaxling.kernels import mesh as meshes

METRICS = ("cosine", "dot", "l2")
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
PROGRAMS = (
    neighbors._traced,
    neighbors._traced_own,
    neighbors._traced_both,
    ringed.all_pairs,
)


@pytest.fixture
def accelerator(monkeypatch):
    """This processor multiplies as an accelerator would, in small tiles."""

    def forget():
        for program in PROGRAMS:
            program.clear_cache()

    monkeypatch.setattr(halves, "accelerated", lambda: True)
    monkeypatch.setattr(topk, "_sizes", lambda: topk._Sizes(64, 96, 64, 1 << 14))
    forget()
    yield
    forget()


def assert_neighbors(found, queries, keys, k, metric, excluded=None):
    """The oracle's scores, and ids whose true scores are as good."""
    queries, keys = (np.asarray(x).astype(np.float64) for x in (queries, keys))
    expected, ids = oracles.neighbors(queries, keys, k, metric, excluded)
    scores, indices = (np.asarray(part) for part in found)
    np.testing.assert_array_equal(indices < 0, ids < 0)
    sign = -1 if metric == "l2" else 1
    close = sign * oracles.closeness(queries, keys, metric)
    reached = np.take_along_axis(close, np.maximum(indices, 0), axis=1)
    reached[ids < 0] = np.nan
    # Float32 sums of 24 products of numbers of size one.
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reached, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_parts_change_nothing(rng, accelerator, metric, dtype):
    x = rng.standard_normal((300, 24)).astype(np.float32)
    x[40:46], x[100], x[200, 3] = x[2], 0, np.nan
    x = jnp.asarray(x, dtype)
    knobs = {"k": 7, "metric": metric, "implementation": "traced"}
    found, proof = kernels.all_pairs_neighbors(x, **knobs, with_proof=True)
    assert_neighbors(found, x, x, 7, metric, np.arange(300))
    assert not np.delete(proof.unproved, 100).any()  # zero is as near to all
    some = kernels.nearest_neighbors(x[:70].astype(jnp.float32), x, **knobs)
    assert_neighbors(some, x[:70], x, 7, metric)
    there, back = kernels.cross_neighbors(x[:70], x[70:], **knobs)
    assert_neighbors(there, x[:70], x[70:], 7, metric)
    assert_neighbors(back, x[70:], x[:70], 7, metric)
    mesh = Mesh(np.array(jax.devices()[:3]), ("rows",))
    found = kernels.all_pairs_neighbors(x, k=7, metric=metric, mesh=mesh)
    assert_neighbors(found, x, x, 7, metric, np.arange(300))


@pytest.mark.parametrize("include_self", [False, True])
def test_rows_that_no_product_tells_apart_are_searched_again(
    rng, accelerator, include_self
):
    x = rng.standard_normal((150, 24)).astype(np.float32)
    x[:80] = x[0] + 1e-6 * rng.standard_normal((80, 24))
    knobs = {"k": 5, "metric": "l2", "include_self": include_self}
    found, proof = kernels.all_pairs_neighbors(
        x, **knobs, implementation="traced", with_proof=True
    )
    excluded = None if include_self else np.arange(150)
    _, ids = oracles.neighbors(*[x.astype(np.float64)] * 2, 5, "l2", excluded)
    # Float32 sums of squares may swap two.
    assert (found.indices == ids)[:80].mean() > 0.99
    assert proof.unproved[:80].all()


@pytest.mark.parametrize("columns", [8, 256])
@pytest.mark.parametrize("dtype", [*DTYPES, None])
@pytest.mark.parametrize("metric", METRICS)
def test_the_bound_holds_where_rounding_is_worst(
    rng, accelerator, metric, dtype, columns
):
    # Entries halfway between two bfloat16 numbers: parts are as far off as can be.
    x = rng.choice([-1.0, 1.0], (64, columns)) * (1 + 2.0**-8 + 2.0**-16 - 2.0**-22)
    x[32:] = x[:32] * (1 + 2.0**-10)
    x = jnp.asarray(x, dtype or jnp.float32)
    rows, _ = pairs.prepare(x, x, metric, one_scale=True)
    if dtype is None:  # one part, though the rows are wide
        rows = rows._replace(significand=jnp.ones(64))
    factors, lengths = halves.split(rows, metric)
    one = dtype in (jnp.bfloat16, None)
    assert len(factors.parts) == (1 if one else 2)
    scores = np.asarray(halves.closeness(factors, factors), np.float64)
    bound = np.asarray(halves.bound(lengths, lengths, columns, metric), np.float64)
    values = np.asarray(rows.values, np.float64)
    exact = values @ values.T
    if metric == "l2":
        exact = -np.square(values[:, None] - values).sum(-1)
    assert (np.abs(scores - exact).max(axis=1) <= bound).all()
    if dtype is not None:
        # Nearly the sums' own error: what parts lack is little, or nothing at all.
        size = np.square(np.linalg.norm(values, axis=1))
        size = size * (4 if metric == "l2" else 1)
        sums = 3.2 * (columns + 16) * 2.0**-24 * size
        assert (bound <= sums + (0 if one else 2.0**-15) * size).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_the_bound_holds_where_parts_underflow(rng, accelerator, metric, dtype):
    x = rng.standard_normal((80, 24)).astype(np.float32)
    # At their common scale: from 2**50 down to where second parts count as zero.
    x[:8] *= 2.0**60
    x[8:] *= np.ldexp(np.float32(1), rng.integers(-112, -100, (72, 1)))
    x = jnp.asarray(x, dtype)
    rows, _ = pairs.prepare(x, x, metric, one_scale=True)
    factors, lengths = halves.split(rows, metric)
    scores = np.asarray(halves.closeness(factors, factors), np.float64)
    bound = np.asarray(halves.bound(lengths, lengths, 24, metric), np.float64)
    values = np.asarray(rows.values, np.float64)
    exact = values @ values.T
    if metric == "l2":
        exact = -np.square(values[:, None] - values).sum(-1)
    assert (np.abs(scores - exact).max(axis=1) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_tiles_are_float32_where_float64_is_enabled(
    rng, accelerator, float64, metric, dtype
):
    x = jnp.asarray(rng.standard_normal((8, 4)), dtype)
    rows, _ = pairs.prepare(x, x, metric, one_scale=True)
    factors, lengths = halves.split(rows, metric)
    assert halves.closeness(factors, factors).dtype == jnp.float32
    assert halves.bound(lengths, lengths, 4, metric).dtype == jnp.float32


def products(text):
    """Of a program before it is compiled: operands of its matrix products."""
    found = re.findall(r"dot_general .*: \(tensor<(.*?)>, tensor<(.*?)>\)", text)
    return [pair for pair in found if pair[0].count("x") == 2 == pair[1].count("x")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", ["all_pairs", "nearest", "cross"])
def test_a_gpu_multiplies_bfloat16(accelerator, dtype, search):
    x = jax.ShapeDtypeStruct((300, 24), dtype)
    find = {
        "all_pairs": functools.partial(kernels.all_pairs_neighbors, k=5),
        "nearest": lambda x: kernels.nearest_neighbors(x, x, k=5),
        "cross": lambda x: kernels.cross_neighbors(x, x, k=5),
    }[search]
    lowered = jax.jit(find).trace(x).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    found = products(text)
    parts = 1 if dtype == jnp.bfloat16 else 3
    assert len(found) == parts * (2 if search == "all_pairs" else 1)
    assert all(side.endswith("xbf16") for pair in found for side in pair)
    # Conversions there and back might be dropped, and the residual with them.
    assert "reduce_precision" in text


@pytest.mark.parametrize("parts, dtype", [(1, jnp.bfloat16), (3, jnp.float32)])
def test_each_pair_of_tiles_is_multiplied_once(accelerator, parts, dtype):
    n, d, tile = 640, 24, 64
    x = jax.ShapeDtypeStruct((n, d), dtype)
    find = jax.jit(functools.partial(kernels.all_pairs_neighbors, k=5))
    found = counting.counted(find.lower(x).compile().as_text())
    count = n // tile
    assert found["dot"] == parts * 2 * d * tile**2 * count * (count + 1) // 2


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_over_a_mesh_too(rng, accelerator, parts):
    n, d, tile = 512, 24, 64
    mesh = meshes.line(Mesh(np.array(jax.devices()[:parts]), ("rows",)))
    x = jnp.asarray(rng.standard_normal((n, d)), jnp.bfloat16)
    lowered = ringed.all_pairs.lower(
        meshes.share(x, mesh), n=n, mesh=mesh, k=5, metric="cosine", include_self=False
    )
    found = counting.counted(lowered.compile().as_text())
    count = n // parts // tile
    # Its own rows, those of whole devices, and half of the last one's.
    tiles = count * (count + 1) // 2 + count**2 * (parts - 1) / 2
    assert found["dot"] == 2 * d * tile**2 * tiles


def test_tiles_are_even():
    """No tile is padded by more than a group of columns."""
    rows = pairs.at_scale(jnp.ones((20_000, 1)), None, "dot")
    side = topk._side(rows, "dot", 2048)
    assert side.tiles.valid.shape == (10, 2016)
