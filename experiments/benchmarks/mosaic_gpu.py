"""All pairs on a Hopper GPU: exact neighbours from the group maxima of `mosaic_maxima`.

A contestant of `experiments.benchmarks.gpu`, and no more than that yet: it moves to
`kernels/mosaic_gpu.py` behind `implementation="mosaic_gpu"` when the record shows that
it wins, else it is deleted.

The k best of a row are among the largest two of all groups, unless a third is as good:
so the top few of those numbers are the candidates, and the rest is bounded. XLA
selects, scores the candidates pair by pair in float32, and proves each row; the few
rows without a proof go to `kernels.nearest_neighbors`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxling import kernels
from jaxling.kernels import numerics, pairs, topk

from . import mosaic_maxima, mosaic_product
from .mosaic_maxima import DEFAULT_SYMMETRIC, NOBODY, OFFSET
from .mosaic_product import DEFAULT, TuningConfig


def all_pairs_neighbors(
    x: Float[Array, "n d"],
    *,
    k: int,
    symmetric: bool = False,
    config: TuningConfig | None = None,
    blocks: int = 132,
    interpret: Any = False,
) -> tuple[kernels.Neighbors, kernels.Proof]:
    """As `kernels.all_pairs_neighbors(x, k=k, include_self=True, with_proof=True)`.

    Cosine only. Every score is a float32 sum over one pair of rows.
    """
    config = config or (DEFAULT_SYMMETRIC if symmetric else DEFAULT)
    multiple = max(config.rows, config.tile_n, config.block_m)
    size = -(-len(x) // multiple) * multiple
    steps = mosaic_product.walk(size, size, config, symmetric=symmetric)
    knobs = {"config": config, "blocks": blocks, "interpret": interpret}
    found, unproved = _searched(x, steps, k=k, size=size, symmetric=symmetric, **knobs)
    rows = np.flatnonzero(unproved)
    if rows.size:
        # Of few lengths, that programs be few; a row that is there twice does no harm.
        rows = np.resize(rows, -(-rows.size // 256) * 256)
        again = kernels.nearest_neighbors(x[rows], x, k=k, implementation="traced")
        found = jax.tree.map(lambda old, new: old.at[rows].set(new), found, again)
    return found, kernels.Proof(unproved)


@functools.partial(
    jax.jit, static_argnames=("k", "size", "symmetric", "config", "blocks", "interpret")
)
def _searched(
    x, walk, *, k, size, symmetric, config, **knobs
) -> tuple[kernels.Neighbors, Bool[Array, " n"]]:
    n, d = x.shape
    rows = pairs.at_scale(x, None, "dot")
    # Powers of two take nothing from bfloat16 rows, whose product needs no rounding:
    # the norm is divided out of the scores, and not out of the rows.
    norms, exponent = jnp.frexp(numerics.row_norms(rows.values))
    values = pairs.times_power_of_two(rows.values, -exponent[:, None])
    valid = rows.valid & (norms > 0)
    inverse = jnp.where(valid, 1 / norms, 0.0)
    rounded = values.astype(jnp.bfloat16)
    # Compilers may drop a conversion there and back; they may not drop this.
    back = lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    residual = numerics.row_norms(values - back) * inverse
    values = rounded if x.dtype == jnp.bfloat16 else values

    def spread(part):
        # Neighbouring ids are near-duplicates, three of which prove nothing where they
        # share a group: here each goes to another tile.
        part = jnp.pad(part, [(0, size - n)] + [(0, 0)] * (part.ndim - 1))
        return _turned_round(part, config.tile_n)

    per_key = spread(inverse), spread(jnp.where(valid, OFFSET, 0.0))
    columns = jnp.stack([part.reshape(-1, config.tile_n) for part in per_key], axis=1)
    walked: dict[str, Any] = {"config": config, "symmetric": symmetric}
    filtered = jnp.pad(spread(rounded), ((0, 0), (0, -d % config.tile_k)))
    maxima, thirds = mosaic_maxima.group_maxima(
        filtered, columns, walk, **walked, **knobs
    )
    width = k + max(16, k // 8)  # candidates
    maxima = jnp.pad(maxima, ((0, 0), (0, max(0, width + 1 - maxima.shape[1]))))

    def block(xs):
        maxima, third, mine, own, place = xs
        kept, at = lax.top_k(maxima, width + 1, **topk._FREE_TIES)
        tile, of_tile = jnp.divmod(
            mosaic_maxima.members(kept, at, place, **walked), config.tile_n
        )
        ids = of_tile * (size // config.tile_n) + tile
        ids = jnp.where(kept > NOBODY, ids, n)[:, :width]
        near = jnp.minimum(ids, n - 1)
        # A sum, not a product: XLA need not store the rows that it gathers.
        theirs = values[near].astype(jnp.float32)
        scores = jnp.sum(mine[:, None].astype(jnp.float32) * theirs, axis=-1)
        scores = jnp.where(ids < n, scores * own[:, None] * inverse[near], -jnp.inf)
        cost, ids = lax.sort((-scores, ids), dimension=1, num_keys=2)
        left_out = jnp.maximum(kept[:, width], third)
        everyone = left_out <= NOBODY
        last = -cost[:, k - 1] - (left_out - OFFSET) * own
        return -cost[:, :k], ids[:, :k], jnp.where(everyone, jnp.inf, last)

    third = mosaic_maxima.thirds_of(thirds, **walked)
    parts = maxima, third, spread(values), spread(inverse), jnp.arange(size)
    blocks = [part.reshape(-1, config.rows, *part.shape[1:]) for part in parts]
    found = lax.map(block, tuple(blocks))
    scores, ids, margin = (
        _turned_round(part.reshape(size, *part.shape[2:]), size // config.tile_n)[:n]
        for part in found
    )
    unproved = valid & ~(margin > _bound(residual, d))
    empty = (ids == n) | ~valid[:, None]
    scores, ids = jnp.where(empty, jnp.nan, scores), jnp.where(empty, -1, ids)
    return kernels.Neighbors(scores, ids), unproved


def _turned_round(rows: Array, parts: int) -> Array:
    """The first row of each of so many parts, then the second of each, and so on."""
    turned = rows.reshape(parts, -1, *rows.shape[1:]).swapaxes(0, 1)
    return turned.reshape(rows.shape)


def _bound(residual: Float[Array, " n"], d: int) -> Float[Array, " n"]:
    """How far a filtered cosine of each row may lie from the pair score, for any key.

    Rounding by Cauchy-Schwarz, as in `kernels.prefilter`. Tensor cores add at least in
    single precision but may truncate, which errs twice as far as rounding; the pair
    score is one float32 sum more. A column replaces bits of a score plus offset, below
    4 and divided by a norm of at least a half.
    """
    most = residual.max(initial=0.0)
    sums = (3 * d + 16) * pairs.UNIT_ROUNDOFF * jnp.square(1 + most)
    bits = 1.1 * 2.0**-16
    return 1.01 * (most + (1 + most) * residual + sums) + bits + d * 2.0**-125
