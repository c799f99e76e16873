"""Which pairs may matter: a cheap product, and how far it can lie from the truth.

The product runs in bfloat16 where the processor has it. The rounding residual of each
row is computed, so that by Cauchy-Schwarz, with b the rounded rows and r the norms of
what rounding took away,

    |x . y - b_x . b_y| <= |x| r_y + |b_y| r_x

every filtered score is within a known bound of the true one, row by row. Thresholds
come from a sample of the keys: they are guesses, which only the certificate judges.
"""

import functools
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt

from . import numerics, pairs

BITS = 16  # columns that share a word of the mask
LEVELS = 65_535  # steps of the largest candidate score in a word
_STEPS = 12  # of the bisection for a threshold; the interval shrinks 4096-fold


@functools.cache
def dtype() -> np.dtype:
    """The dtype of the filtering product: bfloat16 where it is fast, else float32."""
    if jax.default_backend() != "cpu":
        return np.dtype(jnp.bfloat16)
    try:
        flags = set(pathlib.Path("/proc/cpuinfo").read_text("utf-8").split())
    except OSError:
        flags = set()
    fast = flags & {"avx512_bf16", "amx_bf16"}
    return np.dtype(jnp.bfloat16 if fast else jnp.float32)


class Operand(NamedTuple):
    """A block of rows as the filter sees them.

    The filtered score of two rows is `values . values + bias + bias`; for l2 it is
    minus half of the squared distance.

    Attributes:
      values: centred and rounded rows.
      bias: what centring (and, for l2, the squared norm) adds back.
      norm: norms of the rows, before centring.
      centred: norms of the centred rows.
      rounded: norms of `values`.
      residual: norms of what rounding took away.
    """

    values: Float[Array, "n d"]
    bias: Float[Array, " n"]
    norm: Float[Array, " n"]
    centred: Float[Array, " n"]
    rounded: Float[Array, " n"]
    residual: Float[Array, " n"]


@functools.partial(jax.jit, static_argnames=("metric", "to"))
def operand(
    values: Float[Array, "m d"],
    ids: Int[Array, " n"],
    center: Float[Array, " d"],
    metric: pairs.Metric,
    to: np.dtype,
) -> Operand:
    """The rows `ids` of `values`; a negative id gives a row of zeros."""
    x = jnp.where(ids[:, None] >= 0, values[jnp.maximum(ids, 0)], 0.0)
    centred = x - center
    rounded = centred.astype(to)
    # Compilers may drop a conversion there and back; they may not drop this.
    kept = jnp.finfo(to)
    back = lax.reduce_precision(centred, kept.nexp, kept.nmant)
    length = _lengths(centred)
    # Subtracting the centre rounds too: by at most one unit roundoff of the result.
    residual = _lengths(centred - back) + pairs.UNIT_ROUNDOFF * length
    if metric == "l2":
        bias = -0.5 * jnp.square(length)
    else:
        bias = x @ center - 0.5 * (center @ center)
    return Operand(rounded, bias, _lengths(x), length, _lengths(back), residual)


class Scale(NamedTuple):
    """The range of scores in `LEVELS` steps: `least + steps / per_unit`."""

    least: Float[Array, ""]
    per_unit: Float[Array, ""]


class Largest(NamedTuple):
    """The largest norms among rows, of the kinds that `Operand` holds."""

    norm: float
    centred: float
    rounded: float
    residual: float


@functools.partial(jax.jit, static_argnames=("metric",))
def bound(
    rows: Operand, keys: Largest, center: Float[Array, ""], metric: pairs.Metric
) -> Float[Array, " n"]:
    """How far a filtered score of each row may lie from its pair score, for any key.

    `center` is the centre's norm. Rounding by Cauchy-Schwarz; to it come the float32
    sums of the filter, of the biases and of the pair score, each d roundings of at
    most the product of the norms (see `pairs.bound`).
    """
    d = rows.values.shape[1]
    rounding = rows.centred * keys.residual + keys.rounded * rows.residual
    if metric == "l2":
        sums = 3 * jnp.square(rows.centred + keys.centred)
    else:
        sums = rows.rounded * keys.rounded + rows.norm * keys.norm
        sums += center * (rows.norm + keys.norm + center)
    return 1.01 * (rounding + (d + 8) * pairs.UNIT_ROUNDOFF * sums) + d * 2.0**-125


class Reach(NamedTuple):
    """A block as a tile sees it: rows, biases, and thresholds of the filtered score."""

    values: Float[Array, "n d"]
    bias: Float[Array, " n"]
    threshold: Float[Array, " n"]


def filtered(
    rows: Operand | Reach, keys: Operand | Reach, biased: bool
) -> Float[Array, "r t"]:
    """Filtered scores; without biases where the caller knows that they are zero."""
    scores = numerics.scores_f32(rows.values, keys.values)
    if biased:
        scores = scores + (rows.bias[:, None] + keys.bias[None, :])
    return scores


@functools.partial(jax.jit, static_argnames=("part", "width", "biased"))
def mask(
    rows: Reach,
    keys: Reach,
    scale: Scale,
    *,
    part: tuple[int, int],
    width: int,
    biased: bool,
) -> UInt[Array, "r words"]:
    """The pairs whose score reaches the threshold of either side.

    Of the rows from `part[0]` to `part[1]` and the first `width` keys.
    Bit b of word w is column `b * words + w`: columns of a word are strided, because
    neighbouring rows resemble each other. The upper half of a word is the largest of
    its candidates' scores in steps of `scale`, rounded down.
    """
    rows, keys = _cut(rows, *part), _cut(keys, 0, width)
    scores = filtered(rows, keys, biased)
    return _packed(scores, rows.threshold, keys.threshold, scale)


@functools.partial(jax.jit, static_argnames=("part", "count", "biased"))
def mask_and_thresholds(
    rows: Reach,
    sample: Reach,
    bounds: Float[Array, " n"],
    scale: Scale,
    *,
    part: tuple[int, int],
    count: int,
    biased: bool,
) -> tuple[UInt[Array, "r words"], Float[Array, " r"]]:
    """As `mask` against a sample, with the rows' thresholds read off the same scores.

    The thresholds of `rows` are not read. A threshold is the `count`-th largest score
    less the row's bound, so that pair scores above the `count`-th largest are all
    among the candidates.
    """
    rows = _cut(rows, *part)
    scores = filtered(rows, sample, biased)
    threshold = _nth_largest(scores, count) - bounds[slice(*part)]
    return _packed(scores, threshold, sample.threshold, scale), threshold


@functools.partial(jax.jit, static_argnames=("part", "width", "biased"))
def counts(
    rows: Reach, keys: Reach, *, part: tuple[int, int], width: int, biased: bool
) -> tuple[Int[Array, " r"], Int[Array, " t"]]:
    """How many pairs of the tile that `mask` sees reach each side's own threshold."""
    rows, keys = _cut(rows, *part), _cut(keys, 0, width)
    scores = filtered(rows, keys, biased)
    return (
        jnp.sum(scores >= rows.threshold[:, None], axis=1, dtype=jnp.int32),
        jnp.sum(scores >= keys.threshold[None, :], axis=0, dtype=jnp.int32),
    )


def sample_count(k: int, sample: int, keys: int) -> int:
    """Which of a row's sorted scores on a random sample of keys to take as threshold.

    The number of its k nearest that fall into the sample is hypergeometric with mean
    `k sample / keys`; three standard deviations above it, about one row in a
    thousand has its k-th neighbour below the threshold, whatever the data.
    """
    share = min(1.0, sample / max(keys, 1))
    mean = k * share
    above = 3 * math.sqrt(mean * (1 - share))
    return max(1, min(sample, math.ceil(mean + above + 0.5 * (share < 1))))


def _cut(block: Reach, start: int, stop: int) -> Reach:
    return Reach(*(part[start:stop] for part in block))


def _packed(scores, row_threshold, key_threshold, scale):
    words = scores.shape[1] // BITS
    packed = jnp.zeros((scores.shape[0], words), jnp.uint32)
    largest = jnp.full((scores.shape[0], words), -jnp.inf)
    for bit in range(BITS):
        columns = slice(bit * words, (bit + 1) * words)
        least = jnp.minimum(row_threshold[:, None], key_threshold[None, columns])
        reached = scores[:, columns] >= least
        packed |= jnp.where(reached, np.uint32(1 << bit), np.uint32(0))
        largest = jnp.maximum(largest, jnp.where(reached, scores[:, columns], -jnp.inf))
    steps = jnp.clip((largest - scale.least) * scale.per_unit, 0, LEVELS)
    return packed | (jnp.floor(steps).astype(jnp.uint32) << BITS)


def _nth_largest(scores: Float[Array, "r m"], count: int) -> Float[Array, " r"]:
    """At most the `count`-th largest of each row, and close to it.

    A bisection over maxima of groups: of a sorted list only one value is wanted.
    """
    r, m = scores.shape
    group = 32
    while group > 1 and (m % group or m // group < 4 * count):
        group //= 2
    maxima = scores.reshape(r, group, m // group).max(axis=1)

    def halve(_, interval):
        low, high = interval
        middle = 0.5 * (low + high)
        enough = jnp.sum(maxima >= middle[:, None], axis=1) >= count
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    interval = maxima.min(axis=1), maxima.max(axis=1)
    return lax.fori_loop(0, _STEPS, halve, interval)[0]


def _lengths(x):
    # The rows are at a safe scale: no overflow to guard against.
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=1))
