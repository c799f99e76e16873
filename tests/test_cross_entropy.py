"""Cross-entropy in blocks against the dense definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxling import kernels

# Float32 sums over at most 129 rows and 1,009 words; the oracle sees the rounded
# inputs, so the value needs no more for bfloat16. Gradients are products of rounded
# probabilities there: 8 bits of mantissa.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-5}
GRADIENT_TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


def problem(rng, n, vocab, d, dtype):
    hidden = jnp.asarray(rng.normal(size=(n, d)), dtype)
    matrix = jnp.asarray(rng.normal(size=(vocab, d)), dtype)
    targets = rng.integers(0, vocab, n)
    weights = (rng.random(n) < 0.7).astype(np.float32) * rng.random(n)
    return hidden, matrix, targets, weights.astype(np.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n, vocab, d", [(1, 1, 1), (7, 13, 5), (129, 1009, 16)])
@pytest.mark.parametrize("bias, softcap", [(False, None), (True, None), (True, 3.0)])
def test_the_sum_is_the_oracle_s(rng, dtype, n, vocab, d, bias, softcap):
    hidden, matrix, targets, weights = problem(rng, n, vocab, d, dtype)
    bias = rng.normal(size=vocab).astype(np.float32) if bias else None
    found = kernels.cross_entropy(
        hidden, matrix, targets, weights, bias=bias, softcap=softcap, block=32
    )
    expected = oracles.cross_entropy(
        hidden, matrix, targets, weights, bias=bias, softcap=softcap
    )
    np.testing.assert_allclose(found.loss, expected, rtol=TOLERANCE[dtype], atol=1e-6)
    np.testing.assert_allclose(found.weight, weights.sum(), rtol=1e-6)


def dense(hidden, matrix, bias, targets, weights, softcap):
    logits = hidden.astype(jnp.float32) @ matrix.astype(jnp.float32).T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    picked = jax.nn.log_softmax(logits)[jnp.arange(len(targets)), targets]
    return -(weights * picked).sum()


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_are_those_of_the_dense_form(rng, dtype, softcap):
    hidden, matrix, targets, weights = problem(rng, 65, 101, 8, dtype)
    bias = jnp.asarray(rng.normal(size=101), jnp.float32)

    def blocked(hidden, matrix, bias):
        return kernels.cross_entropy(
            hidden, matrix, targets, weights, bias=bias, softcap=softcap, block=16
        ).loss

    def plain(hidden, matrix, bias):
        return dense(hidden, matrix, bias, targets, weights, softcap)

    # A factor before the gradient must reach it.
    ours = jax.grad(lambda *a: 3 * blocked(*a), (0, 1, 2))(hidden, matrix, bias)
    theirs = jax.grad(lambda *a: 3 * plain(*a), (0, 1, 2))(hidden, matrix, bias)
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(
            a.astype(jnp.float32),
            b.astype(jnp.float32),
            atol=GRADIENT_TOLERANCE[dtype] * scale,
        )


def test_the_block_does_not_matter(rng):
    hidden, matrix, targets, weights = problem(rng, 100, 50, 8, jnp.float32)
    losses = [
        float(kernels.cross_entropy(hidden, matrix, targets, weights, block=b).loss)
        for b in (1, 33, 100, 512)
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)  # order of float32 sums


def test_a_row_without_weight_may_hold_anything(rng):
    hidden, matrix, targets, weights = problem(rng, 9, 20, 4, jnp.float32)
    weights[[2, 5]] = 0
    f = jax.value_and_grad(
        lambda h, t: kernels.cross_entropy(h, matrix, t, weights).loss
    )
    expected, gradient = f(hidden, targets)
    targets[2], hidden = 99, hidden.at[5].set(jnp.nan)
    loss, found = f(hidden, targets)
    assert float(loss) == float(expected)
    np.testing.assert_array_equal(found, gradient)


def test_huge_logits_stay_finite():
    hidden = jnp.array([[3e4, 0.0], [-3e4, 0.0]])
    matrix = jnp.array([[1e3, 0.0], [-1e3, 0.0]])
    targets, weights = np.array([0, 0]), np.ones(2)
    loss = kernels.cross_entropy(hidden, matrix, targets, weights).loss
    np.testing.assert_allclose(loss, 6e7)


def test_nothing_of_the_size_of_the_logits_exists():
    n, vocab, d = 4096, 8192, 16
    shapes = [((n, d), jnp.float32), ((vocab, d), jnp.float32), ((n,), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def loss(hidden, matrix, targets):
        weights = jnp.ones(n)
        return kernels.cross_entropy(hidden, matrix, targets, weights, block=256).loss

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * vocab * 4 / 4


def test_no_row_is_no_loss():
    found = kernels.cross_entropy(
        np.zeros((0, 3)), np.ones((5, 3)), np.zeros(0, int), np.ones(0)
    )
    assert found == (0, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(hidden=np.ones(3)), "must be .n, d"),
        (dict(hidden=np.ones((4, 2))), "as many features"),
        (dict(targets=np.zeros(3, int)), "`targets` must be"),
        (dict(targets=np.zeros(4)), "`targets` must be integers"),
        (dict(weights=np.zeros((4, 1))), "`weights` must be"),
        (dict(bias=np.zeros(4)), "`bias` must be"),
        (dict(block=0), "`block` must be at least 1; got 0"),
    ],
)
def test_the_door_names_what_does_not_fit(change, message):
    good = dict(
        hidden=np.ones((4, 3)),
        unembed_matrix=np.ones((5, 3)),
        targets=np.zeros(4, int),
        weights=np.ones(4),
    )
    with pytest.raises(ValueError, match=message):
        kernels.cross_entropy(**{**good, **change})
