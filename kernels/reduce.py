"""Walk the tiles of `queries @ keys.T` once and reduce each row as they pass.

A reducer is four pure functions over a small carry. Because `merge` is associative
and commutative, several devices are a merge over the mesh, a matrix larger than
memory is a merge over chunks, and resuming is keeping the chunks that are done.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from . import numerics


class Reducer(NamedTuple):
    """What to keep of each row of scores, as four pure functions.

    Attributes:
      init: row ids `[r]` -> carry of rows that have seen no key. Data that belongs to
        a row (a threshold) is looked up here and travels in the carry.
      update: carry, scores `[r, t]` float32, key ids `[t]` -> carry.
      merge: the carries of two disjoint sets of keys -> the carry of their union;
        associative and commutative (sums to rounding).
      finish: carry -> result, with leading axis `[r]` in each of its arrays.
    """

    init: Callable[[Int[Array, " r"]], Any]
    update: Callable[[Any, Float[Array, "r t"], Int[Array, " t"]], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any]


def reduce_scores(
    queries: ArrayLike,
    keys: ArrayLike,
    reducers: Any,
    *,
    tile: int = 4096,
    rows: int = 512,
    score: Callable[..., Array] | None = None,
) -> Any:
    """Every reducer's result over all keys, one walk over the scores for all of them.

    Equivalent, for each reducer, to

        scores = queries.astype(float32) @ keys.astype(float32).T
        carry = reducer.update(reducer.init(arange(n)), scores, arange(m))
        result = reducer.finish(carry)

    with at most `rows x tile` scores alive at a time, in the gradient too.

    Args:
      queries: `[n, d]`, floating.
      keys: `[m, d]`, floating.
      reducers: a `Reducer`, or any tree of them (tuple, dictionary).
      tile: keys per tile.
      rows: queries per tile.
      score: `(queries [r, d], keys [t, d]) -> scores [r, t]` in float32; the product
        accumulated in float32 when None.

    Returns:
      The results, in a tree like `reducers`.

    Raises:
      ValueError: the two sides have other ranks or widths, or a tile is not positive.
    """
    return finish_scores(
        reducers,
        accumulate_scores(
            queries, keys, reducers, tile=tile, rows=rows, score=score, first_key=0
        ),
    )


def accumulate_scores(
    queries: ArrayLike,
    keys: ArrayLike,
    reducers: Any,
    *,
    first_key: int | Int[Array, ""] = 0,
    tile: int = 4096,
    rows: int = 512,
    score: Callable[..., Array] | None = None,
) -> Any:
    """The carries of `reduce_scores` before `finish`; keys may be one chunk of all.

    `first_key` is the id of the chunk's first key; it may be traced, as under
    `shard_map`. Join chunks with `merge_scores`, then call `finish_scores`.
    """
    queries, keys = jnp.asarray(queries), jnp.asarray(keys)
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            "`queries` and `keys` must be [n, d] and [m, d] with one d;"
            f" got {queries.shape} and {keys.shape}."
        )
    for name, size in (("tile", tile), ("rows", rows)):
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1; got {size}.")
    score = score or numerics.scores_f32
    n = queries.shape[0]

    def block(row_ids, block_queries):
        return _walk(reducers, score, row_ids, block_queries, keys, first_key, tile)

    whole = n // rows * rows
    row_ids = jnp.arange(n, dtype=jnp.int32)
    parts = []
    if whole:
        shape = (whole // rows, rows)
        carries = lax.map(
            lambda xs: block(*xs),
            (row_ids[:whole].reshape(shape), queries[:whole].reshape(*shape, -1)),
        )
        parts.append(jax.tree.map(lambda c: c.reshape(whole, *c.shape[2:]), carries))
    if whole < n or n == 0:
        parts.append(block(row_ids[whole:], queries[whole:]))
    return jax.tree.map(lambda *cs: jnp.concatenate(cs), *parts)


def merge_scores(reducers: Any, a: Any, b: Any) -> Any:
    """The carries of the union of two disjoint chunks of keys."""
    return _each(reducers, lambda reducer, *c: reducer.merge(*c), a, b)


def finish_scores(reducers: Any, carries: Any) -> Any:
    """The results that belong to `carries`."""
    return _each(reducers, lambda reducer, carry: reducer.finish(carry), carries)


def _is_reducer(node: Any) -> bool:
    return isinstance(node, Reducer)


def _each(reducers: Any, function: Callable[..., Any], *trees: Any) -> Any:
    return jax.tree.map(function, reducers, *trees, is_leaf=_is_reducer)


def _walk(reducers, score, row_ids, queries, keys, first_key, tile):
    """The carries of one block of rows after all tiles of keys, the last one ragged."""
    m = keys.shape[0]

    # Without this the backward pass would keep the scores of every tile.
    @jax.checkpoint
    def update(carries, start, tile_keys):
        scores = score(queries, tile_keys)
        key_ids = start + jnp.arange(tile_keys.shape[0], dtype=jnp.int32)
        return _each(reducers, lambda r, c: r.update(c, scores, key_ids), carries)

    carries = _each(reducers, lambda reducer: reducer.init(row_ids))
    if m == 0:
        return carries
    # The first tile stands outside of the scan: under shard_map a carry must enter
    # the loop varying over the same mesh axes as it leaves it.
    first = min(tile, m)
    carries = update(carries, jnp.int32(first_key), keys[:first])
    whole = (m - first) // tile
    if whole:
        starts = first_key + first + tile * jnp.arange(whole, dtype=jnp.int32)
        tiles = keys[first : first + whole * tile].reshape(whole, tile, -1)
        carries, _ = lax.scan(
            lambda c, x: (update(c, *x), None), carries, (starts, tiles)
        )
    rest = first + whole * tile
    if rest < m:
        carries = update(carries, jnp.int32(first_key + rest), keys[rest:])
    return carries


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
    count: Int[Array, " r"]


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
