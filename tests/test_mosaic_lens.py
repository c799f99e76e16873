"""Log-sum-exp and entropy of the Hopper contestant, as far as no GPU is needed.

As in `test_mosaic_gpu`: the interpreter runs it on few tiles, and it lowers for CUDA.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxling import kernels
from jaxling.experiments.benchmarks import mosaic_lens, mosaic_product


def dense(hidden, unembed, bias):
    """Log-sum-exp and entropy in float64, of inputs as they are rounded."""
    exact = [np.asarray(x, np.float64) for x in (hidden, unembed, bias)]
    logits = exact[0] @ exact[1].T + exact[2]
    most = logits.max(-1, keepdims=True)
    shares = np.exp(logits - most)
    total = shares.sum(-1, keepdims=True)
    shares /= total
    logs = np.where(shares > 0, logits - most - np.log(total), 0)
    return (most + np.log(total))[..., 0], -np.sum(shares * logs, -1)


def inputs(rng, shape, vocab, scale=1.0):
    """Of bfloat16; some tokens are the same."""
    hidden = scale * rng.standard_normal(shape, np.float32)
    unembed = rng.standard_normal((vocab, shape[-1]), np.float32) / 8
    unembed[1:4] = unembed[0]
    return (jnp.asarray(x, jnp.bfloat16) for x in (hidden, unembed))


@pytest.mark.parametrize(
    "shape, vocab, scale",
    [
        ((128, 64), 256, 1.0),
        ((3, 50, 100), 700, 1.0),  # no side fits the tiles
        ((1, 64), 1, 1.0),
        ((130, 128), 300, 30.0),  # nearly all on one token
        ((5, 64), 257, 0.0),  # all tokens equal
    ],
)
def test_they_are_those_of_dense_logits(rng, interpreter, shape, vocab, scale):
    hidden, unembed = inputs(rng, shape, vocab, scale)
    bias = rng.standard_normal(vocab).astype(np.float32) * (scale > 0)
    found = mosaic_lens.predictions(
        hidden, unembed, bias=jnp.asarray(bias), blocks=2, interpret=interpreter
    )
    log_sum_exp, entropy = dense(hidden, unembed, bias)
    np.testing.assert_allclose(found.log_sum_exp, log_sum_exp, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(found.entropy, entropy, atol=2e-5)
    if not scale:
        np.testing.assert_allclose(found.entropy, np.log(vocab), atol=1e-6)


def test_tokens_that_are_none_count_for_nothing(rng, interpreter):
    """Some of a tile, all of a tile, and, where nothing is left, everything."""
    hidden, unembed = inputs(rng, (64, 64), 600)
    bias = np.zeros(600, np.float32)
    bias[200:520] = -np.inf
    knobs = {"blocks": 2, "interpret": interpreter}
    found = mosaic_lens.predictions(hidden, unembed, bias=jnp.asarray(bias), **knobs)
    kept = np.isfinite(bias)
    log_sum_exp, entropy = dense(hidden, unembed[kept], bias[kept])
    np.testing.assert_allclose(found.log_sum_exp, log_sum_exp, atol=1e-5)
    np.testing.assert_allclose(found.entropy, entropy, atol=2e-5)
    nothing = jnp.full(600, -jnp.inf)
    found = mosaic_lens.predictions(hidden, unembed, bias=nothing, **knobs)
    assert np.isneginf(found.log_sum_exp).all() and np.isnan(found.entropy).all()


def test_it_agrees_with_project_layers(rng, interpreter):
    hidden, unembed = inputs(rng, (2, 20, 96), 300)
    # A row that is not a number has no prediction; the others keep theirs.
    hidden = hidden.at[1, 3, 7].set(jnp.nan)
    found = mosaic_lens.predictions(hidden, unembed, blocks=1, interpret=interpreter)
    expected = kernels.project_layers(hidden, unembed, entropy=True)
    np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, atol=1e-5)
    np.testing.assert_allclose(found.entropy, expected.entropy, atol=2e-5)
    assert np.isnan(found.entropy).sum() == 1


@pytest.mark.parametrize("d, steps", [(1024, 4), (4096, 4)])
def test_it_lowers_for_hopper(d, steps):
    shapes = (
        jax.ShapeDtypeStruct((256, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((512, d), jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 256), jnp.float32),
        jax.ShapeDtypeStruct((4, 2), jnp.int32),
    )
    moments = functools.partial(
        mosaic_lens.moments, config=mosaic_product.TuningConfig(steps=steps)
    )
    lowered = jax.jit(moments).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
