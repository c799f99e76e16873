"""Exact top-k inside a trace: one program with static shapes, certified per row.

A tile of scores from one matrix product yields a few more candidates than k by its
largest values; candidates are scored pair by pair. A row is proved when its k-th
pair score exceeds every excluded tile score by more than the two can differ. Rows
without a proof are scored pair by pair against every key.
"""

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from . import pairs

# top_k with k > 16 sorts whole rows on a GPU unless it may break ties freely.
_FREE_TIES = (
    {"is_stable": False}
    if "is_stable" in inspect.signature(lax.top_k).parameters
    else {}
)
_GROUP = 32  # largest number of columns that share one maximum
_RESCUED = 8  # unproved rows scored at a time
_GATHERED = 1 << 22  # numbers gathered at a time for pair scores: 16 MiB


class Found(NamedTuple):
    """The k closest keys of each query, best first, and which rows lacked a proof.

    Attributes:
      indices: int32; -1 beyond the last valid key.
      unproved: rows that were scored against every key.
    """

    indices: Int[Array, "n k"]
    unproved: Bool[Array, " n"]


def search(
    queries: pairs.Rows,
    keys: pairs.Rows,
    excluded: Int[Array, " n"],
    *,
    k: int,
    metric: pairs.Metric,
    rows: int = 256,
    tile: int = 8192,
) -> Found:
    """The k closest valid keys of each query; key `excluded[i]` is none of row i's.

    At most `rows x tile` scores are alive at a time.
    """
    n, m = queries.values.shape[0], keys.values.shape[0]
    queries, keys = jax.tree.map(lax.stop_gradient, (queries, keys))
    rows = min(rows, max(n, 1))
    tile = min(tile, _rounded_up(max(m, 1), _GROUP))
    bounds = pairs.bound(queries, keys, metric)
    tiles = _tiles(keys, tile)

    def block(xs):
        values, needed, block_excluded, block_bounds = xs
        return _search_block(
            values, needed, block_excluded, block_bounds, keys.values, tiles, k, metric
        )

    parts = (queries.values, queries.valid, excluded, bounds)
    found = lax.map(block, tuple(_blocks(part, rows) for part in parts))
    return Found(*(x.reshape(-1, *x.shape[2:])[:n] for x in found))


def search_both(
    rows: pairs.Rows,
    keys: pairs.Rows,
    *,
    k: int,
    metric: pairs.Metric,
    tile: int = 2048,
) -> tuple[Found, Found]:
    """The k closest keys of each row and the k closest rows of each key.

    As two searches, from one product: each tile of `tile x tile` scores is read by
    rows and by columns. Both sides share one scale.
    """
    sides = jax.tree.map(lax.stop_gradient, (rows, keys))
    widths = k + _spare(k)
    tiles = [
        _tiles(side, min(tile, _rounded_up(max(side.values.shape[0], 1), _GROUP)))
        for side in sides
    ]

    def nothing(valid):
        # Computed from the data: under shard_map it must vary over the mesh as they do.
        lowest = jnp.where(valid, -jnp.inf, -jnp.inf)
        several = jnp.broadcast_to(lowest[..., None], (*valid.shape, widths))
        return _Candidates(several, (several > 0).astype(jnp.int32), lowest)

    def joined(kept, scores, first):
        ids = first + jnp.arange(scores.shape[1], dtype=jnp.int32)
        width = min(widths, scores.shape[1])
        new = _keep(scores, jnp.broadcast_to(ids, scores.shape), width)
        both = _keep(
            jnp.concatenate([kept.scores, new.scores], axis=1),
            jnp.concatenate([kept.ids, new.ids], axis=1),
            widths,
        )
        dropped = jnp.maximum(kept.excluded, new.excluded)
        return both._replace(excluded=jnp.maximum(both.excluded, dropped))

    def row_tile(of_keys, mine):
        def key_tile(of_rows, xs):
            theirs, kept = xs
            scores = pairs.tile_closeness(mine.values, theirs.values, metric)
            allowed = mine.valid[:, None] & theirs.valid[None, :]
            scores = jnp.where(allowed, scores, -jnp.inf)
            of_rows = joined(of_rows, scores, theirs.first)
            return of_rows, joined(kept, scores.T, mine.first)

        of_rows, of_keys = lax.scan(key_tile, nothing(mine.valid), (tiles[1], of_keys))
        return of_keys, of_rows

    of_keys, of_rows = lax.scan(row_tile, nothing(tiles[1].valid), tiles[0])

    def certified(me, kept):
        mine, other = sides[me], sides[1 - me]
        size = tiles[me].valid.shape[1]

        def block(xs):
            values, valid, bounds, kept = xs
            nobody = jnp.full_like(kept.ids[:, 0], -1)
            return _certified(
                *(values, valid, nobody, bounds, kept),
                *(other.values, tiles[1 - me], k, metric),
            )

        bounds = _blocks(pairs.bound(mine, other, metric), size)
        found = lax.map(block, (tiles[me].values, tiles[me].valid, bounds, kept))
        count = mine.values.shape[0]
        return Found(*(x.reshape(-1, *x.shape[2:])[:count] for x in found))

    return certified(0, of_rows), certified(1, of_keys)


def pair_scores(
    queries: pairs.Rows,
    keys: pairs.Rows,
    indices: Int[Array, "n k"],
    metric: pairs.Metric,
) -> Float[Array, "n k"]:
    """Closeness of each query to the keys named in its row; differentiable."""
    n, k = indices.shape
    if n == 0 or k == 0:
        return jnp.zeros((n, k))
    rows = max(1, min(n, _GATHERED // max(1, k * queries.values.shape[1])))

    @jax.checkpoint
    def block(xs):
        values, ids = xs
        return pairs.pair_closeness(values, keys.values[ids], metric)

    blocks = _blocks(queries.values, rows), _blocks(jnp.maximum(indices, 0), rows)
    return lax.map(block, blocks).reshape(-1, k)[:n]


class _Tiles(NamedTuple):
    values: Float[Array, "tiles t d"]
    valid: Bool[Array, "tiles t"]
    first: Int[Array, " tiles"]


def _tiles(keys: pairs.Rows, size: int) -> _Tiles:
    values, valid = _blocks(keys.values, size), _blocks(keys.valid, size)
    return _Tiles(values, valid, size * jnp.arange(len(valid), dtype=jnp.int32))


def _spare(k: int) -> int:
    """How many candidates are kept beyond k."""
    return max(16, k // 8)


def _tile(tiles: _Tiles, i: int | Array) -> _Tiles:
    return _Tiles(*(x[i] for x in tiles))


class _Candidates(NamedTuple):
    """Keys kept so far; `excluded` is the largest score among those dropped."""

    scores: Float[Array, "r c"]
    ids: Int[Array, "r c"]
    excluded: Float[Array, " r"]


def _search_block(values, needed, excluded, bounds, key_values, tiles, k, metric):
    spare = _spare(k)
    width = min(k + spare, tiles.values.shape[1])

    def from_tile(tile: _Tiles) -> _Candidates:
        scores = pairs.tile_closeness(values, tile.values, metric)
        ids = tile.first + jnp.arange(scores.shape[1], dtype=jnp.int32)
        allowed = tile.valid[None, :] & (ids[None, :] != excluded[:, None])
        scores = jnp.where(allowed, scores, -jnp.inf)
        return _keep(scores, jnp.broadcast_to(ids, scores.shape), width)

    def step(kept, i):
        new = from_tile(_tile(tiles, i))
        joined = _keep(
            jnp.concatenate([kept.scores, new.scores], axis=1),
            jnp.concatenate([kept.ids, new.ids], axis=1),
            min(k + spare, kept.scores.shape[1] + new.scores.shape[1]),
        )
        dropped = jnp.maximum(kept.excluded, new.excluded)
        return joined._replace(excluded=jnp.maximum(joined.excluded, dropped)), None

    # The first tiles stand outside of the scan: its carry must enter with the width,
    # and under shard_map with the mesh axes, that it leaves with.
    kept, used, count = from_tile(_tile(tiles, 0)), 1, tiles.first.shape[0]
    while used < count and kept.scores.shape[1] < k + spare:
        kept, _ = step(kept, used)
        used += 1
    if used < count:
        kept, _ = lax.scan(step, kept, jnp.arange(used, count))

    return _certified(
        values, needed, excluded, bounds, kept, key_values, tiles, k, metric
    )


def _certified(
    values, needed, excluded, bounds, kept, key_values, tiles, k, metric
) -> Found:
    """The k best of the `kept` keys by pair score, or of all keys where unproved."""
    r, m = values.shape[0], key_values.shape[0]
    known = kept.scores > -jnp.inf
    ids = jnp.where(known, kept.ids, m)
    size = max(1, _GATHERED // max(1, ids.shape[1] * values.shape[1]))
    size = min(r, size)
    exact = lax.map(
        lambda xs: pairs.pair_closeness(
            xs[0], key_values[jnp.minimum(xs[1], m - 1)], metric
        ),
        (_blocks(values, size), _blocks(ids, size)),
    ).reshape(-1, ids.shape[1])[:r]
    exact = jnp.where(known, exact, -jnp.inf)
    cost, ids = lax.sort((-exact, ids), dimension=1, num_keys=2)
    ids = ids[:, :k]
    if ids.shape[1] < k:  # fewer keys than k
        ids = jnp.pad(ids, ((0, 0), (0, k - ids.shape[1])), constant_values=m)
        last = jnp.full_like(bounds, -jnp.inf)
    else:
        last = -cost[:, k - 1]
    proved = (kept.excluded == -jnp.inf) | (last - kept.excluded > bounds)
    unproved = needed & ~proved
    ids = _rescue(values, excluded, unproved, ids, tiles, m, k, metric)
    ids = jnp.where((ids < m) & needed[:, None], ids, -1)
    return Found(ids, unproved)


def _keep(scores: Array, ids: Array, width: int) -> _Candidates:
    """The `width` largest scores of each row, and the largest of those left out.

    Groups of columns are compared by their maxima first: the largest scores lie in
    the groups with the largest maxima, and a group maximum is nearly free.
    """
    r, t = scores.shape
    group = _GROUP
    while group > 1 and (t % group or t // group < 2 * (width + 1)):
        group //= 2
    if group > 1:
        grouped = scores.reshape(r, group, t // group)
        _, chosen = _largest(grouped.max(axis=1), width + 1)
        # Columns of a group are strided, so that neighbouring ids part company.
        columns = chosen[:, None, :] + jnp.arange(group)[:, None] * (t // group)
        columns = columns.reshape(r, -1)
        scores = jnp.take_along_axis(scores, columns, axis=1)
        ids = jnp.take_along_axis(ids, columns, axis=1)
        t = scores.shape[1]
    values, positions = _largest(scores, min(width + 1, t))
    left_out = values[:, width] if t > width else jnp.full_like(values[:, 0], -jnp.inf)
    positions = positions[:, :width]
    kept = jnp.take_along_axis(ids, positions, axis=1)
    return _Candidates(values[:, :width], kept, left_out)


def _largest(scores: Array, count: int) -> tuple[Array, Array]:
    values, positions = lax.top_k(scores, count, **_FREE_TIES)
    return values, positions


def _rescue(values, excluded, unproved, ids, tiles, m, k, metric):
    """Replaces the rows of `ids` that are `unproved`, a few at a time."""
    r = values.shape[0]
    count = min(_RESCUED, r)

    def body(state):
        ids, left = state
        chosen = jnp.nonzero(left, size=count, fill_value=r)[0]
        safe = jnp.minimum(chosen, r - 1)
        exact = _exhaustive(values[safe], excluded[safe], tiles, m, k, metric)
        return (
            ids.at[chosen].set(exact, mode="drop"),
            left.at[chosen].set(False, mode="drop"),
        )

    return lax.while_loop(lambda state: state[1].any(), body, (ids, unproved))[0]


def _exhaustive(values, excluded, tiles, m, k, metric):
    """The k best of every pair score; of equal ones the lower index."""

    def from_tile(tile):
        exact = pairs.every_closeness(values, tile.values, metric)
        ids = tile.first + jnp.arange(exact.shape[1], dtype=jnp.int32)
        allowed = tile.valid[None, :] & (ids[None, :] != excluded[:, None])
        cost = jnp.where(allowed, -exact, jnp.inf)
        return cost, jnp.where(allowed, ids[None, :], m)

    def step(best, i):
        new = from_tile(_tile(tiles, i))
        joined = [jnp.concatenate(pair, axis=1) for pair in zip(best, new)]
        return tuple(x[:, :k] for x in lax.sort(joined, dimension=1, num_keys=2)), None

    cost, ids = from_tile(_tile(tiles, 0))
    short = max(0, k - cost.shape[1])
    cost = jnp.pad(cost, ((0, 0), (0, short)), constant_values=jnp.inf)
    ids = jnp.pad(ids, ((0, 0), (0, short)), constant_values=m)
    best = tuple(x[:, :k] for x in lax.sort((cost, ids), dimension=1, num_keys=2))
    best, _ = lax.scan(step, best, jnp.arange(1, tiles.first.shape[0]))
    return best[1]


def _blocks(x: Array, size: int) -> Array:
    """`x` cut along its first axis into blocks of `size`, zeros filling the last."""
    count = -(-x.shape[0] // size)
    padding = [(0, count * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
