"""Cross-entropy over a large vocabulary, without the matrix of logits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from . import numerics

# Rows whose logits are held at a time: 512 x 13,000 in float32 are 27 MB, which still
# fit the last cache of a server's CPU; a GPU takes larger blocks at no loss.
BLOCK = 512


class CrossEntropy(NamedTuple):
    """Sums over the rows: `loss` in nats, and the `weight` it is to be divided by."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]


def cross_entropy(
    hidden: ArrayLike,
    unembed_matrix: ArrayLike,
    targets: ArrayLike,
    weights: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    block: int = BLOCK,
) -> CrossEntropy:
    """Weighted sum of the cross-entropies of rows against a vocabulary.

        loss = sum_i w_i (log sum_v exp z_iv - z_i,target_i),
        z_i = c tanh((U h_i + b) / c), or U h_i + b without a cap c.

    Blocks of `block` rows are scored one after another, and each block's part of the
    gradient is formed while its logits are at hand: nothing of size n x vocab exists,
    forward or backward, and no product is done twice. Products run in the dtype of
    `hidden`; logits, sums and the loss are float32, gradients the dtype of their
    argument. Gradients flow to `hidden`, `unembed_matrix` and `bias`.

    Args:
      hidden: `[n, d]` floats, after the final norm.
      unembed_matrix: `[vocab, d]` floats.
      targets: `[n]` integers in [0, vocab); a row of weight 0 may hold anything there.
      weights: `[n]` floats; 0 takes a row out.
      bias: `[vocab]` floats, or None.
      softcap: the cap c, or None.

    Raises:
      ValueError: shapes that do not fit, or `block` below 1.
    """
    hidden, unembed_matrix = jnp.asarray(hidden), jnp.asarray(unembed_matrix)
    targets, weights = jnp.asarray(targets), jnp.asarray(weights)
    if hidden.ndim != 2 or unembed_matrix.ndim != 2:
        raise ValueError(
            "`hidden` and `unembed_matrix` must be [n, d] and [vocab, d]; got shapes"
            f" {hidden.shape} and {unembed_matrix.shape}."
        )
    if hidden.shape[1] != unembed_matrix.shape[1]:
        raise ValueError(
            "`hidden` and `unembed_matrix` must have as many features; got"
            f" {hidden.shape[1]} and {unembed_matrix.shape[1]}."
        )
    for name, array in (("targets", targets), ("weights", weights)):
        if array.shape != hidden.shape[:1]:
            raise ValueError(
                f"`{name}` must be [n] = [{hidden.shape[0]}]; got {array.shape}."
            )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"`targets` must be integers; got {targets.dtype}.")
    if bias is not None:
        bias = jnp.asarray(bias)
        if bias.shape != unembed_matrix.shape[:1]:
            raise ValueError(
                f"`bias` must be [vocab] = [{unembed_matrix.shape[0]}]; got"
                f" {bias.shape}."
            )
    if block < 1:
        raise ValueError(f"`block` must be at least 1; got {block}.")
    weights = weights.astype(jnp.float32)
    if hidden.shape[0] == 0:
        zero = jnp.zeros((), jnp.float32)
        return CrossEntropy(zero, zero)
    loss = _loss(hidden, unembed_matrix, bias, targets, weights, softcap, block)
    return CrossEntropy(loss, weights.sum())


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _loss(
    hidden: Float[Array, "n d"],
    unembed_matrix: Float[Array, "vocab d"],
    bias: Float[Array, " vocab"] | None,
    targets: Int[Array, " n"],
    weights: Float[Array, " n"],
    softcap: float | None,
    block: int,
) -> Float[Array, ""]:
    def step(loss, rows):
        hidden, targets, weights = rows
        logits, _ = _logits(hidden, unembed_matrix, bias, softcap)
        return loss + _block_loss(logits, targets, weights)[0], None

    rows = _blocks(hidden, targets, weights, block)
    return lax.scan(step, jnp.zeros((), jnp.float32), rows)[0]


def _blocks(hidden, targets, weights, block):
    """Even blocks `[block, row, ...]`; rows that fill the last one have no weight."""
    n = hidden.shape[0]
    count = -(-n // block)
    size = -(-n // count)

    def split(array):
        padding = [(0, count * size - n)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(count, size, *array.shape[1:])

    return split(hidden), split(targets), split(weights)


def _logits(hidden, unembed_matrix, bias, softcap):
    """Logits, and the derivative of the cap (None without one)."""
    logits = numerics.matmul_f32(hidden, unembed_matrix.astype(hidden.dtype).T)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if softcap is None:
        return logits, None
    bent = jnp.tanh(logits / softcap)
    return softcap * bent, 1 - bent * bent


def _block_loss(logits, targets, weights):
    """Loss, and the log-sum-exp of each row."""
    largest = logits.max(axis=1)
    total = jnp.exp(logits - largest[:, None]).sum(axis=1)
    log_sum = largest + jnp.log(total)
    of_target = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    # `where`, so that what a row without weight holds cannot make a NaN.
    loss = jnp.where(weights != 0, weights * (log_sum - of_target), 0.0)
    return loss.sum(), log_sum


def _forward(hidden, unembed_matrix, bias, targets, weights, softcap, block):
    dtype, (vocab, d) = hidden.dtype, unembed_matrix.shape
    matrix = unembed_matrix.astype(dtype)

    def step(carry, rows):
        loss, d_matrix, d_bias = carry
        hidden, targets, weights = rows
        logits, bend = _logits(hidden, matrix, bias, softcap)
        part, log_sum = _block_loss(logits, targets, weights)
        own = jnp.arange(vocab) == targets[:, None]
        d_logits = weights[:, None] * (jnp.exp(logits - log_sum[:, None]) - own)
        d_logits = jnp.where(weights[:, None] != 0, d_logits, 0.0)
        if bend is not None:
            d_logits = d_logits * bend
        if d_bias is not None:
            d_bias = d_bias + d_logits.sum(axis=0)
        d_logits = d_logits.astype(dtype)
        d_hidden = numerics.matmul_f32(d_logits, matrix)
        d_matrix = d_matrix + numerics.matmul_f32(d_logits.T, hidden)
        return (loss + part, d_matrix, d_bias), d_hidden

    zero = jnp.zeros((), jnp.float32)
    d_bias = None if bias is None else jnp.zeros(vocab, jnp.float32)
    carry = (zero, jnp.zeros((vocab, d), jnp.float32), d_bias)
    rows = _blocks(hidden, targets, weights, block)
    (loss, d_matrix, d_bias), d_hidden = lax.scan(step, carry, rows)
    d_hidden = d_hidden.reshape(-1, d)[: hidden.shape[0]]
    return loss, (d_hidden, d_matrix, d_bias, hidden, unembed_matrix, bias)


def _backward(softcap, block, residuals, cotangent):
    del softcap, block
    d_hidden, d_matrix, d_bias, hidden, unembed_matrix, bias = residuals
    return (
        (cotangent * d_hidden).astype(hidden.dtype),
        (cotangent * d_matrix).astype(unembed_matrix.dtype),
        None if bias is None else (cotangent * d_bias).astype(bias.dtype),
        None,
        None,
    )


_loss.defvjp(_forward, _backward)
