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
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxling import kernels
from jaxling.experiments.benchmarks import mosaic_gpu

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the interpreter of this jax cannot multiply by a transposed reference",
)
CONFIG = mosaic_gpu.TuningConfig(rows=256)


@pytest.fixture
def interpreter():
    """Settings that run a kernel on a CPU; asserts afterwards that it had no race."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    yield plgpu.InterpretGPUParams(detect_races=True)
    races = interpret_pallas_call.get_races()
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    assert not races.races_found


def rows(rng, n, d):
    """Unit rows, among them copies and, in the middle of a group, near copies."""
    x = rng.standard_normal((n, d), np.float32)
    x[n // 2 : n // 2 + 3] = x[3]
    x[8:40:8] = x[0] + 0.1 * rng.standard_normal((4, d), np.float32)
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.bfloat16)


@interpreted
@pytest.mark.parametrize("n", [256, 500])
def test_maxima_are_those_of_dense_scores(rng, interpreter, n):
    size, members = -(-n // 256) * 256, 32
    x = np.zeros((size, 128), np.float32)
    x[:n] = rows(rng, n, 128)
    columns = np.zeros((2, size), np.float32)
    columns[0, :n] = rng.uniform(0.5, 1, n)
    columns[1, :n] = mosaic_gpu.OFFSET
    maxima, thirds = mosaic_gpu.group_maxima(
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(columns.reshape(2, -1, 256).swapaxes(0, 1)),
        mosaic_gpu.walk(size, CONFIG),
        config=CONFIG,
        blocks=3,
        interpret=interpreter,
    )
    exact = x.astype(np.float64)
    exact = exact @ exact.T * columns[0] + columns[1]
    # [row, tile, member, group]
    exact = exact.reshape(size, size // 256, members, 8)
    largest = -np.sort(-exact, axis=2)
    kept = np.array(maxima).reshape(size, size // 256, 2, 8)
    np.testing.assert_allclose(kept, largest[:, :, :2], atol=2e-5)
    np.testing.assert_allclose(
        np.array(thirds).T, largest[:, :, 2].max(axis=2), atol=2e-5
    )
    member = kept.view(np.int32) & (members - 1)
    named = np.take_along_axis(exact, member, axis=2)
    padding = kept < mosaic_gpu.NOBODY
    assert padding.any() == (size - n > 128)
    np.testing.assert_allclose(named[~padding], kept[~padding], atol=2e-5)
    assert (member[:, :, 0] != member[:, :, 1])[~padding[:, :, 1]].all()


@interpreted
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_neighbors_are_the_exact_ones(rng, interpreter, dtype):
    x = np.array(rows(rng, 450, 100), np.float32)
    x *= rng.uniform(1e-3, 1e3, (450, 1)).astype(np.float32)
    x[225:228], x[7], x[11, 5] = x[3], 0, np.nan
    x = jnp.asarray(x, dtype)
    found, proof = mosaic_gpu.all_pairs_neighbors(
        x, k=7, config=CONFIG, blocks=2, interpret=interpreter
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


@pytest.mark.parametrize("n, d", [(512, 1024), (1024, 4096)])
def test_it_lowers_for_hopper(n, d):
    shapes = (
        jax.ShapeDtypeStruct((n, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((n // 256, 2, 256), jnp.float32),
        jax.ShapeDtypeStruct((8, 2), jnp.int32),
    )
    maxima = functools.partial(
        mosaic_gpu.group_maxima, config=mosaic_gpu.TuningConfig()
    )
    lowered = jax.jit(maxima).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_rounding_is_not_dropped_where_it_is_measured():
    """A conversion there and back might be, and the bound of wide rows with it."""
    knobs = {"k": 7, "size": 1024, "config": mosaic_gpu.TuningConfig()}
    searched = mosaic_gpu._searched.trace(
        jax.ShapeDtypeStruct((1000, 128), jnp.float32),
        jax.ShapeDtypeStruct((8, 2), jnp.int32),
        **knobs,
    )
    text = searched.lower(lowering_platforms=("cuda",)).as_text()
    assert "reduce_precision" in text


def test_it_is_left_out_by_name_elsewhere():
    with pytest.raises(ImportError, match="Hopper"):
        mosaic_gpu.check_device()
