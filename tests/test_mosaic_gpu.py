"""The Hopper contestant of the GPU benchmark, as far as no GPU is needed.

The interpreter runs it on a few tiles and looks for races (it knows no `wgmma_wait`,
so a wait that is missing would only be seen on the device); lowering for CUDA infers
every layout, and fails where one does not fit.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxling import kernels
from jaxling.experiments.benchmarks import mosaic_gpu, mosaic_maxima, mosaic_product

CONFIG = mosaic_product.TuningConfig(rows=256, steps=3)
both_walks = pytest.mark.parametrize("symmetric", [False, True])


def rows(rng, n, d):
    """Unit rows, among them copies and, where they share a group, near copies."""
    apart = -(-n // 256)
    x = rng.standard_normal((n, d), np.float32)
    x[n // 2 : n // 2 + 3] = x[3]
    near = slice(8 * apart, 40 * apart, 8 * apart)
    x[near] = x[0] + 0.1 * rng.standard_normal((4, d), np.float32)
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.bfloat16)


@both_walks
@pytest.mark.parametrize("n", [256, 500])
def test_maxima_are_those_of_dense_scores(rng, interpreter, n, symmetric):
    """Every row has those of each tile, whether it was read by rows or by columns."""
    size, members = -(-n // 256) * 256, 32
    tiles = size // 256
    x = np.zeros((size, 128), np.float32)
    x[:n] = rows(rng, n, 128)
    columns = np.zeros((2, size), np.float32)
    columns[0, :n] = rng.uniform(0.5, 1, n)
    columns[1, :n] = mosaic_maxima.OFFSET
    steps = mosaic_product.walk(size, size, CONFIG, symmetric=symmetric)
    # 3 of the 4 squares, each of two row tiles.
    assert len(steps) == {256: 2, 512: 6 if symmetric else 8}[size]
    maxima, thirds = mosaic_maxima.group_maxima(
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(columns.reshape(2, -1, 256).swapaxes(0, 1)),
        steps,
        **dict(config=CONFIG, symmetric=symmetric, blocks=2, interpret=interpreter),
    )
    exact = x.astype(np.float64)
    exact = exact @ exact.T * columns[0] + columns[1]
    kept = np.array(maxima)
    # [row, tile, place]: every eighth column, by columns every other of 64 rows.
    key = np.arange(256)
    groups = np.broadcast_to(key % 8, (size, tiles, 256)).copy()
    below = np.arange(tiles) < np.arange(size)[:, None] // 256
    if symmetric:
        groups[below] = key // 64 * 2 + key % 2
    order = np.argsort(groups, axis=2, kind="stable").reshape(size, tiles, 8, members)
    grouped = np.take_along_axis(exact.reshape(size, tiles, 1, 256), order, axis=3)
    largest = -np.sort(-grouped, axis=3)
    # [row, tile, largest or second, group]
    both = kept.reshape(size, tiles, 2, 8)
    if symmetric:
        turned = kept.reshape(size, tiles, 4, 2, 2).swapaxes(2, 3)
        both = np.where(below[..., None, None], turned.reshape(both.shape), both)
    np.testing.assert_allclose(both, largest[..., :2].swapaxes(2, 3), atol=2e-5)
    third = mosaic_maxima.thirds_of(thirds, config=CONFIG, symmetric=symmetric)
    np.testing.assert_allclose(third, largest[..., 2].max((1, 2)), atol=2e-5)
    named = mosaic_maxima.members(
        maxima,
        jnp.broadcast_to(jnp.arange(maxima.shape[1]), maxima.shape),
        jnp.arange(size),
        **dict(config=CONFIG, symmetric=symmetric),
    )
    padding = kept < mosaic_maxima.NOBODY
    assert padding.any() == (size - n > 128)
    scores = np.take_along_axis(exact, np.array(named), axis=1)
    np.testing.assert_allclose(scores[~padding], kept[~padding], atol=2e-5)
    for row, lacking in zip(np.array(named), padding):
        assert len(set(row[~lacking])) == np.sum(~lacking)


@both_walks
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_neighbors_are_the_exact_ones(rng, interpreter, dtype, symmetric):
    x = np.array(rows(rng, 450, 100), np.float32)
    x *= rng.uniform(1e-3, 1e3, (450, 1)).astype(np.float32)
    x[225:228], x[7], x[11, 5] = x[3], 0, np.nan
    x = jnp.asarray(x, dtype)
    found, proof = mosaic_gpu.all_pairs_neighbors(
        x,
        k=7,
        **dict(symmetric=symmetric, config=CONFIG, blocks=2, interpret=interpreter),
    )
    exact = kernels.all_pairs_neighbors(
        x, k=7, include_self=True, implementation="traced"
    )
    np.testing.assert_allclose(found.scores, exact.scores, atol=1e-6)
    np.testing.assert_array_equal(found.indices, exact.indices)
    copies = [3, 225, 226, 227]
    np.testing.assert_array_equal(found.indices[225, :4], copies)
    # Four near copies share a group: its third score is theirs, and proves nothing.
    assert np.array(proof.unproved)[0]
    assert not np.array(proof.unproved)[[7, 11]].any()


@both_walks
@pytest.mark.parametrize("n, d", [(512, 1024), (1024, 4096)])
def test_it_lowers_for_hopper(n, d, symmetric):
    shapes = (
        jax.ShapeDtypeStruct((n, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((n // 256, 2, 256), jnp.float32),
        jax.ShapeDtypeStruct((8, 2), jnp.int32),
    )
    config = mosaic_maxima.DEFAULT_SYMMETRIC if symmetric else mosaic_product.DEFAULT
    maxima = functools.partial(
        mosaic_maxima.group_maxima, config=config, symmetric=symmetric
    )
    lowered = jax.jit(maxima).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_rounding_is_not_dropped_where_it_is_measured():
    """A conversion there and back might be, and the bound of wide rows with it."""
    knobs = {"k": 7, "size": 1024, "config": CONFIG, "symmetric": False}
    searched = mosaic_gpu._searched.trace(
        jax.ShapeDtypeStruct((1000, 128), jnp.float32),
        jax.ShapeDtypeStruct((8, 2), jnp.int32),
        **knobs,
    )
    text = searched.lower(lowering_platforms=("cuda",)).as_text()
    assert "reduce_precision" in text


def test_it_is_left_out_by_name_elsewhere():
    with pytest.raises(ImportError, match="Hopper"):
        mosaic_product.check_device()
