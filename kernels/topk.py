"""Exact top-k inside a trace: one program with static shapes, certified per row.

A tile of scores from one matrix product yields a few more candidates than k by its
largest values; those that may be among the k closest are scored pair by pair. A row is
proved when its k-th pair score exceeds every excluded tile score by more than the two
can differ. Rows without a proof are scored pair by pair against every key.

Where k keys are known from elsewhere, the `floor` of a row is the closeness that they
reach: what stays below it is not looked for.
"""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from . import halves, pairs

# top_k with k > 16 sorts whole rows on a GPU unless it may break ties freely.
_FREE_TIES = (
    {"is_stable": False}
    if "is_stable" in inspect.signature(lax.top_k).parameters
    else {}
)
_GROUP = 32  # largest number of columns that share one maximum
_RESCUED = 8  # unproved rows scored at a time
_SCORED = 16  # candidates of each row scored at a time, or a multiple of it


class _Sizes(NamedTuple):
    """How much is worked on at a time.

    Attributes:
      rows: queries against a tile.
      tile: keys in a tile.
      square: rows, and keys, in a tile that is read from both sides.
      gathered: numbers gathered for pair scores.
    """

    rows: int
    tile: int
    square: int
    gathered: int


def _sizes() -> _Sizes:
    # What stays in the cache; or what keeps an accelerator busy, with 256 MiB of scores
    # and as much gathered.
    if halves.accelerated():
        return _Sizes(4096, 16_384, 8192, 1 << 26)
    return _Sizes(256, 8192, 2048, 1 << 22)


class Found(NamedTuple):
    """The k closest keys of each query, best first, and which rows lacked a proof.

    Attributes:
      indices: int32; -1 beyond the last valid key, and in place of keys that do not
        reach the row's floor.
      closeness: their pair scores, without gradients (`scored` adds them); minus
        infinity where there is no index.
      unproved: rows that were scored against every key.
    """

    indices: Int[Array, "n k"]
    closeness: Float[Array, "n k"]
    unproved: Bool[Array, " n"]


def search(
    queries: pairs.Rows,
    keys: pairs.Rows,
    *,
    k: int,
    metric: pairs.Metric,
    floor: Float[Array, " n"] | None = None,
) -> Found:
    """The k closest valid keys of each query."""
    sizes = _sizes()
    mine, others = (
        _side(rows, metric, size)
        for rows, size in ((queries, sizes.rows), (keys, sizes.tile))
    )

    def block(tile):
        def step(kept, other):
            scores = _scores(tile, other)
            return _joined(kept, scores, other.first), None

        nothing = _nothing(tile.valid, others.rows.valid, k)
        return lax.scan(step, nothing, others.tiles)[0]

    kept = lax.map(block, mine.tiles)
    return _certified(mine, others, kept, k, metric, floor=floor)


def search_both(
    rows: pairs.Rows,
    keys: pairs.Rows,
    *,
    k: int,
    metric: pairs.Metric,
    floors: tuple[Float[Array, " n"] | None, Float[Array, " m"] | None] = (None, None),
    tile: int | None = None,
) -> tuple[Found, Found]:
    """The k closest keys of each row and the k closest rows of each key.

    As two searches, from one product: each tile of `tile x tile` scores is read by
    rows and by columns. Both sides share one scale.
    """
    sides = [_side(side, metric, tile or _sizes().square) for side in (rows, keys)]
    mine, others = (side.tiles for side in sides)

    def row_tile(of_keys, a):
        def key_tile(of_rows, xs):
            b, kept = xs
            scores = _scores(a, b)
            of_rows = _joined(of_rows, scores, b.first)
            return of_rows, _joined(kept, scores.T, a.first)

        nothing = _nothing(a.valid, keys.valid, k)
        of_rows, of_keys = lax.scan(key_tile, nothing, (others, of_keys))
        return of_keys, of_rows

    of_keys, of_rows = lax.scan(row_tile, _nothing(others.valid, rows.valid, k), mine)
    found = []
    for me, kept in enumerate((of_rows, of_keys)):
        both = sides[me], sides[1 - me]
        found.append(_certified(*both, kept, k, metric, floor=floors[me]))
    return found[0], found[1]


def search_own(
    rows: pairs.Rows,
    *,
    k: int,
    metric: pairs.Metric,
    include_self: bool,
    tile: int | None = None,
) -> Found:
    """The k closest rows of each row: a tile off the diagonal serves both of its sides.

    As `search(rows, rows)`, from about half of its products; the rows share one scale.
    """
    side = _side(rows, metric, tile or _sizes().square)
    tiles = side.tiles
    count, size = tiles.valid.shape
    itself = np.eye(size, dtype=bool) & (not include_self)

    def diagonal(a):
        scores = jnp.where(itself, -jnp.inf, _scores(a, a))
        return _joined(_nothing(a.valid, rows.valid, k), scores, a.first)

    def off_diagonal(kept, pair):
        i, j = pair
        a, b = _at(tiles, i), _at(tiles, j)
        scores = _scores(a, b)
        for at, seen, first in ((i, scores, b.first), (j, scores.T, a.first)):
            new = _joined(_at(kept, at), seen, first)
            kept = jax.tree.map(lambda x, y, at=at: x.at[at].set(y), kept, new)
        return kept, None

    kept = lax.map(diagonal, tiles)
    if count > 1:
        kept, _ = lax.scan(off_diagonal, kept, np.triu_indices(count, 1))
    ids = jnp.arange(len(rows.valid), dtype=jnp.int32)
    excluded = None if include_self else ids
    return _certified(side, side, kept, k, metric, excluded=excluded)


def scored(
    queries: pairs.Rows, keys: pairs.Rows, found: Found, metric: pairs.Metric
) -> Float[Array, "n k"]:
    """The closeness that was found, with gradients with respect to both sides."""
    values = queries.values, keys.values
    return _scored(*values, found.indices, found.closeness, metric)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _scored(queries, keys, indices, closeness, metric):
    del queries, keys, indices, metric  # only a derivative needs them
    return closeness


@_scored.defjvp
def _scored_jvp(metric, primals, tangents):
    queries, keys, indices, closeness = primals
    n, k = indices.shape
    size = max(1, min(n, _sizes().gathered // max(1, k * queries.shape[1])))

    def scores(queries, keys):
        @jax.checkpoint
        def block(xs):
            values, ids = xs
            return pairs.pair_closeness(values, keys[ids], metric)

        blocks = _blocks((queries, jnp.maximum(indices, 0)), size)
        return lax.map(block, blocks).reshape(-1, k)[:n]

    again, moved = jax.jvp(scores, (queries, keys), tangents[:2])
    # What is returned has derivatives too, for those that are taken twice.
    return closeness + (again - lax.stop_gradient(again)), moved


class _Tile(NamedTuple):
    """Rows as products and masks need them; of all tiles, with an axis in front."""

    factors: halves.Factors
    valid: Bool[Array, "*tiles t"]
    first: Int[Array, "*tiles"]


class _Side(NamedTuple):
    rows: pairs.Rows
    lengths: halves.Lengths
    tiles: _Tile


def _side(rows: pairs.Rows, metric: pairs.Metric, size: int) -> _Side:
    """Rows cut into tiles of about equal size, of at most `size`."""
    rows = jax.tree.map(lax.stop_gradient, rows)
    factors, lengths = halves.split(rows, metric)
    n = max(len(rows.valid), 1)
    size = _rounded_up(-(-n // -(-n // size)), _GROUP)
    factors, valid = (_blocks(x, size) for x in (factors, rows.valid))
    first = size * jnp.arange(len(valid), dtype=jnp.int32)
    return _Side(rows, lengths, _Tile(factors, valid, first))


def _at(tree: Any, i: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def _scores(a: _Tile, b: _Tile) -> Float[Array, "r t"]:
    scores = halves.closeness(a.factors, b.factors)
    return jnp.where(a.valid[:, None] & b.valid[None, :], scores, -jnp.inf)


class _Candidates(NamedTuple):
    """Keys kept so far; `excluded` is the largest score among those dropped."""

    scores: Float[Array, "*tiles r c"]
    ids: Int[Array, "*tiles r c"]
    excluded: Float[Array, "*tiles r"]


def _nothing(mine: Array, others: Array, k: int) -> _Candidates:
    # Computed from the data: under shard_map it must vary over the mesh as they do.
    lowest = jnp.where(mine & others.any(), -jnp.inf, -jnp.inf)
    # More than k, as products may order some otherwise than pair scores do: the more,
    # the longer their sums are.
    width = k + max(16, k // 2)
    several = jnp.broadcast_to(lowest[..., None], (*mine.shape, width))
    return _Candidates(several, (several > 0).astype(jnp.int32), lowest)


def _joined(
    kept: _Candidates, scores: Float[Array, "r t"], first: Int[Array, ""]
) -> _Candidates:
    """The best of those kept and of a tile whose first key has the id `first`."""
    width = kept.scores.shape[1]
    new, positions, dropped = _best(scores, width)
    ids = jnp.concatenate([kept.ids, first + positions], axis=1)
    both, chosen, left_out = _best(jnp.concatenate([kept.scores, new], axis=1), width)
    ids = jnp.take_along_axis(ids, chosen, axis=1)
    excluded = jnp.maximum(jnp.maximum(kept.excluded, dropped), left_out)
    return _Candidates(both, ids, excluded)


def _best(scores: Array, width: int) -> tuple[Array, Array, Array]:
    """The `width` largest scores of each row, where, and the largest of the others.

    Groups of columns are compared by their maxima first: the largest scores lie in
    the groups with the largest maxima, and a group maximum is nearly free.
    """
    r, t = scores.shape
    group = _GROUP
    while group > 1 and (t % group or t // group < 2 * (width + 1)):
        group //= 2
    if group > 1:
        # Columns of a group are strided, so that neighbouring ids part company.
        stride = t // group
        _, groups = _largest(scores.reshape(r, group, stride).max(axis=1), width + 1)
        columns = groups[:, None, :] + stride * jnp.arange(group)[:, None]
        scores = jnp.take_along_axis(scores, columns.reshape(r, -1), axis=1)
    values, positions = _largest(scores, min(width + 1, scores.shape[1]))
    left_out = jnp.full_like(values[:, 0], -jnp.inf)
    if values.shape[1] > width:
        left_out = values[:, width]
    positions = positions[:, :width]
    if group > 1:
        member, at = positions // (width + 1), positions % (width + 1)
        positions = jnp.take_along_axis(groups, at, axis=1) + stride * member
    return values[:, :width], positions, left_out


def _largest(scores: Array, count: int) -> tuple[Array, Array]:
    values, positions = lax.top_k(scores, count, **_FREE_TIES)
    return values, positions


def _certified(
    mine: _Side,
    others: _Side,
    kept: _Candidates,
    k: int,
    metric: pairs.Metric,
    *,
    excluded: Int[Array, " n"] | None = None,
    floor: Float[Array, " n"] | None = None,
) -> Found:
    """The k best of the candidates; key `excluded[i]` is none of row i's."""
    n, columns = mine.rows.values.shape
    size = mine.tiles.valid.shape[1]
    bounds = halves.bound(mine.lengths, others.lengths, columns, metric)
    keys = others.rows.values
    if excluded is None:
        excluded = jnp.full(n, -1, jnp.int32)
    if floor is None:
        floor = jnp.full(n, -jnp.inf, jnp.float32)
    floor = lax.stop_gradient(floor)

    def block(xs):
        return _certified_block(*xs, keys, others.tiles, k, metric)

    rows = mine.rows.values, mine.rows.valid, excluded, bounds, floor
    found = lax.map(block, (*_blocks(rows, size), kept))
    return Found(*(x.reshape(-1, *x.shape[2:])[:n] for x in found))


def _certified_block(
    values, needed, excluded, bounds, floor, kept, key_values, tiles, k, metric
) -> Found:
    """The k best of the `kept` keys by pair score, or of all keys where unproved."""
    m = key_values.shape[0]
    # k pair scores reach the k-th product less its bound: candidates that cannot reach
    # those are left out. The others come first.
    reach = jnp.maximum(kept.scores[:, k - 1] - bounds, floor)
    possible = kept.scores + bounds[:, None] >= reach[:, None]
    ids = jnp.where(possible & (kept.scores > -jnp.inf), kept.ids, m)
    cost, ids = lax.sort(
        (-_first_scored(values, key_values, ids, metric), ids), dimension=1, num_keys=2
    )
    cost, ids = cost[:, :k], ids[:, :k]
    last = jnp.maximum(-cost[:, -1], floor)
    proved = (kept.excluded == -jnp.inf) | (last - kept.excluded > bounds)
    unproved = needed & ~proved
    cost, ids = _rescue(
        values, excluded, unproved, (cost, ids), key_values, tiles, metric
    )
    there = (ids < m) & needed[:, None]
    return Found(jnp.where(there, ids, -1), jnp.where(there, -cost, -jnp.inf), unproved)


def _first_scored(
    values: Float[Array, "r d"],
    keys: Float[Array, "m d"],
    ids: Int[Array, "r c"],
    metric: pairs.Metric,
) -> Float[Array, "r c"]:
    """Pair scores with the first keys of each row, up to the ids that are m.

    A few columns at a time, and no more than the fullest of some rows has.
    """
    r, m = len(values), len(keys)
    size = max(1, min(r, _sizes().gathered // (_SCORED * max(1, values.shape[1]))))
    width = ids.shape[1]
    ids = jnp.pad(ids, ((0, 0), (0, -width % _SCORED)), constant_values=m)

    def some(xs):
        values, ids = xs
        ids = ids + m  # so that what fills blocks up counts as m
        most = jnp.max(jnp.sum(ids < m, axis=1))

        def step(state):
            at, scores = state
            theirs = lax.dynamic_slice_in_dim(ids, at, _SCORED, axis=1)
            new = pairs.pair_closeness(values, keys[jnp.minimum(theirs, m - 1)], metric)
            return at + _SCORED, lax.dynamic_update_slice_in_dim(scores, new, at, 1)

        # Computed from the data, as in `_nothing`.
        nothing = jnp.where(ids < m, jnp.float32(-jnp.inf), -jnp.inf)
        return lax.while_loop(lambda state: state[0] < most, step, (0, nothing))[1]

    scores = lax.map(some, _blocks((values, ids - m), size))
    scores = scores.reshape(-1, ids.shape[1])[:r, :width]
    return jnp.where(ids[:, :width] < m, scores, -jnp.inf)


def _rescue(values, excluded, unproved, best, key_values, tiles, metric):
    """Replaces the rows of `best` that are `unproved`, a few at a time."""
    r, k = best[1].shape
    count = min(_RESCUED, r)

    def body(state):
        cost, ids, left = state
        chosen = jnp.nonzero(left, size=count, fill_value=r)[0]
        safe = jnp.minimum(chosen, r - 1)
        exact = _exhaustive(
            values[safe], excluded[safe], key_values, tiles.valid, k, metric
        )
        return (
            cost.at[chosen].set(exact[0], mode="drop"),
            ids.at[chosen].set(exact[1], mode="drop"),
            left.at[chosen].set(False, mode="drop"),
        )

    return lax.while_loop(lambda state: state[2].any(), body, (*best, unproved))[:2]


def _exhaustive(values, excluded, key_values, valid, k, metric):
    """The k best of every pair score, as costs and ids; of equal ones the lower id."""
    (r, d), m = values.shape, key_values.shape[0]
    size = max(1, min(m, _sizes().gathered // max(1, r * d)))
    size = _rounded_up(size, _SCORED)
    valid = valid.reshape(-1)[:m]

    def step(best, xs):
        valid, number = xs
        ids = number * size + jnp.arange(size, dtype=jnp.int32)
        # Gathered as candidates are, so that their scores are the same sums.
        theirs = jnp.broadcast_to(jnp.minimum(ids, m - 1), (r, size))
        exact = pairs.pair_closeness(values, key_values[theirs], metric)
        allowed = valid[None, :] & (ids[None, :] != excluded[:, None])
        new = jnp.where(allowed, -exact, jnp.inf), jnp.where(allowed, ids[None, :], m)
        joined = [jnp.concatenate(pair, axis=1) for pair in zip(best, new)]
        return tuple(x[:, :k] for x in lax.sort(joined, dimension=1, num_keys=2)), None

    # Computed from the data, as in `_nothing`.
    worst = jnp.where((values[:, :1] > 0) & valid.any(), jnp.float32(jnp.inf), jnp.inf)
    worst = jnp.broadcast_to(worst, (r, k))
    best = worst, jnp.where(worst > 0, jnp.int32(m), 0)
    blocks = _blocks(valid, size)
    numbers = jnp.arange(len(blocks), dtype=jnp.int32)
    return lax.scan(step, best, (blocks, numbers))[0]


def _blocks(tree: Any, size: int) -> Any:
    """Arrays cut along their first axis into blocks; zeros fill the last one."""

    def cut(x):
        count = -(-x.shape[0] // size)
        padding = [(0, count * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
