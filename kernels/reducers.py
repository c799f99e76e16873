"""Reducers for `reduce_scores`: what is commonly kept of a row of scores.

Softmax sums are kept relative to the largest score so far, so that nothing overflows
and large scores lose nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from . import numerics
from .reduce import Reducer


class _Exponentials(NamedTuple):
    """Sums of `exp(score - largest)` times something, relative to the largest score."""

    largest: Float[Array, " r"]
    sums: Float[Array, "r c"]


def _no_exponentials(rows: Int[Array, " r"], columns: int) -> _Exponentials:
    n = rows.shape[0]
    return _Exponentials(jnp.full(n, -jnp.inf), jnp.zeros((n, columns)))


def _rescaled(carry: _Exponentials, largest: Float[Array, " r"]) -> Array:
    # Where nothing finite was seen on one side the factor is 0, not exp(nan).
    seen = carry.largest > -jnp.inf
    gap = jnp.where(seen, carry.largest - jnp.where(seen, largest, 0.0), 0.0)
    return carry.sums * jnp.where(seen, jnp.exp(gap), 0.0)[:, None]


def _merge_exponentials(a: _Exponentials, b: _Exponentials) -> _Exponentials:
    largest = lax.stop_gradient(jnp.maximum(a.largest, b.largest))
    return _Exponentials(largest, _rescaled(a, largest) + _rescaled(b, largest))


def _exponentials(scores: Float[Array, "r t"]) -> tuple[Array, Array]:
    largest = lax.stop_gradient(scores.max(axis=1, initial=-jnp.inf))
    shift = jnp.where(jnp.isfinite(largest), largest, 0.0)
    return largest, jnp.exp(scores - shift[:, None])


def log_sum_exp() -> Reducer:
    """`log sum_j exp(s_j)` of each row, `[n]` float32; minus infinity without keys."""

    def update(carry, scores, key_ids):
        largest, weights = _exponentials(scores)
        tile = _Exponentials(largest, weights.sum(axis=1, keepdims=True))
        return _merge_exponentials(carry, tile)

    def finish(carry):
        return jnp.where(
            carry.largest == jnp.inf, jnp.inf, carry.largest + jnp.log(carry.sums[:, 0])
        )

    return Reducer(
        lambda r: _no_exponentials(r, 1), update, _merge_exponentials, finish
    )


class SoftmaxMoments(NamedTuple):
    """What entropy and cross-entropy need of each row's softmax, in nats.

    The entropy is `log_sum_exp - mean`; the cross-entropy of target j is
    `log_sum_exp - s_j`.

    Attributes:
      log_sum_exp: `log sum_j exp(s_j)`, `[n]`.
      mean: `sum_j p_j s_j` with `p = softmax(s)`, `[n]`.
      variance: `sum_j p_j (s_j - mean)^2`, `[n]`.
      entropy: `-sum_j p_j log p_j`, `[n]`.
    """

    log_sum_exp: Float[Array, " n"]
    mean: Float[Array, " n"]
    variance: Float[Array, " n"]
    entropy: Float[Array, " n"]


def moments() -> Reducer:
    """`SoftmaxMoments` of each row, from sums relative to the largest score."""

    # The carry holds sums of w, w t and w t^2 with t = s - largest, so that a row of
    # large scores loses nothing: moving the origin by g turns t into t + g.
    def merge(a, b):
        largest = lax.stop_gradient(jnp.maximum(a.largest, b.largest))

        def moved(carry):
            seen = carry.largest > -jnp.inf
            g = jnp.where(seen, carry.largest - jnp.where(seen, largest, 0.0), 0.0)
            w, wt, wtt = jnp.unstack(_rescaled(carry, largest), axis=1)
            return jnp.stack([w, wt + g * w, wtt + 2 * g * wt + g * g * w], axis=1)

        return _Exponentials(largest, moved(a) + moved(b))

    def update(carry, scores, key_ids):
        largest, weights = _exponentials(scores)
        offset = scores - jnp.where(jnp.isfinite(largest), largest, 0.0)[:, None]
        # A key of score minus infinity has no weight: 0 * inf must be 0.
        offset = jnp.where(weights > 0, offset, 0.0)
        sums = [weights, weights * offset, weights * offset**2]
        tile = jnp.stack([part.sum(axis=1) for part in sums], axis=1)
        return merge(carry, _Exponentials(largest, tile))

    def finish(carry):
        w, wt, wtt = jnp.unstack(carry.sums, axis=1)
        mean = wt / w
        log_w = jnp.log(w)
        return SoftmaxMoments(
            carry.largest + log_w,
            carry.largest + mean,
            jnp.maximum(wtt / w - mean**2, 0.0),
            log_w - mean,
        )

    return Reducer(lambda r: _no_exponentials(r, 3), update, merge, finish)


def group_mass(groups: ArrayLike, count: int) -> Reducer:
    """Share of each row's softmax that falls on each group of keys, `[n, count]`.

    `groups` `[m]` holds the group of every key (its language, its script), in
    `[0, count)`; a key whose group lies outside belongs to none, yet its mass counts
    in the total.
    """
    groups = jnp.asarray(groups)

    def update(carry, scores, key_ids):
        largest, weights = _exponentials(scores)
        member = jax.nn.one_hot(groups[key_ids], count, dtype=jnp.float32)
        sums = numerics.matmul_f32(weights, member)
        total = weights.sum(axis=1, keepdims=True)
        tile = _Exponentials(largest, jnp.concatenate([sums, total], axis=1))
        return _merge_exponentials(carry, tile)

    def init(rows):
        return _no_exponentials(rows, count + 1)

    def finish(carry):
        return carry.sums[:, :-1] / carry.sums[:, -1:]

    return Reducer(init, update, _merge_exponentials, finish)


class _Above(NamedTuple):
    threshold: Float[Array, " r"]
    excluded: Int[Array, " r"]
    count: Int[Array, " r"]  # type: ignore[assignment]  # a tuple has a method of that name


def count_above(threshold: ArrayLike, exclude: ArrayLike | None = None) -> Reducer:
    """How many keys score strictly above the row's `threshold` `[n]`; `[n]` int32.

    With the score of a target as the threshold this is its rank, from 0. That score
    should come from the same product; `exclude` `[n]` names one key per row that is
    never counted (the target itself), so that its rounding does not matter.
    """
    threshold = jnp.asarray(threshold, jnp.float32)
    nobody = np.full(threshold.shape, -1, np.int32)
    excluded = jnp.asarray(nobody if exclude is None else exclude, jnp.int32)

    def init(rows):
        return _Above(threshold[rows], excluded[rows], jnp.zeros_like(rows))

    def update(carry, scores, key_ids):
        above = scores > carry.threshold[:, None]
        above &= key_ids[None, :] != carry.excluded[:, None]
        count = jnp.sum(above, axis=1, dtype=jnp.int32)
        return carry._replace(count=carry.count + count)

    def merge(a, b):
        return a._replace(count=a.count + b.count)

    return Reducer(init, update, merge, lambda carry: carry.count)


class Largest(NamedTuple):
    """The largest score of each row and its key; ties go to the lower key id.

    Attributes:
      scores: `[n]` float32; minus infinity where there was no key.
      indices: `[n]` int32; -1 where there was no key.
    """

    scores: Float[Array, " n"]
    indices: Int[Array, " n"]


def maximum() -> Reducer:
    """`Largest` of each row. NaN scores are nobody's largest."""

    def init(rows):
        return Largest(jnp.full(rows.shape, -jnp.inf), jnp.full_like(rows, -1))

    def merge(a, b):
        tie = (a.scores == b.scores) & (a.indices >= 0) & (b.indices >= 0)
        first = jnp.where(tie, a.indices < b.indices, a.scores > b.scores)
        first = jnp.where(b.indices < 0, True, jnp.where(a.indices < 0, False, first))
        return jax.tree.map(lambda x, y: jnp.where(first, x, y), a, b)

    def update(carry, scores, key_ids):
        known = ~jnp.isnan(scores)
        scores = jnp.where(known, scores, -jnp.inf)
        best = scores.argmax(axis=1)
        found = known.any(axis=1)
        score = jnp.take_along_axis(scores, best[:, None], axis=1)[:, 0]
        return merge(carry, Largest(score, jnp.where(found, key_ids[best], -1)))

    return Reducer(init, update, merge, lambda carry: carry)
