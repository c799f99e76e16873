"""Rows that a sampled threshold does not serve, against every key.

One float32 product of a few rows with all keys is held at once. The k-th largest of
its group maxima is a lower limit of a row's k-th score, and what reaches it less twice
the bounded error of the product is scored pair by pair: no row is left without a proof.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from . import pairs, panels, prefilter, ranking, rescore

_ROWS = 512  # at most, searched together
_PAIRS = 1 << 21  # about as many are scored together
_GROUP = 32  # at most, columns that share a maximum


class Part(NamedTuple):
    """Rows at a safe scale, and the ids of those that take part."""

    values: Float[Array, "n d"]
    ids: np.ndarray


def search(
    rows: Part, keys: Part, excluded: np.ndarray, chosen: panels.Setting
) -> np.ndarray:
    """Ranks of the k closest of the `keys` for each of the `rows`: int64, `[n, k]`.

    Key `excluded[i]` is none of row i's; -1 for none.
    """
    n, m = len(rows.ids), len(keys.ids)
    # Few sizes, so that few programs are compiled.
    size = min(_ROWS, max(32, 1 << (n - 1).bit_length()))
    ranks = np.full((n, chosen.k), ranking.EMPTY)
    tiles = [
        _padded(keys.ids[a : a + panels.BLOCK], panels.BLOCK)
        for a in range(0, m, panels.BLOCK)
    ]
    for start in range(0, n, size) if m else ():
        ids = rows.ids[start : start + size]
        none = excluded[start : start + size]
        scores, least = _looked_at(
            rows._replace(ids=_padded(ids, size)),
            keys,
            tiles,
            bool((none >= 0).any()),
            chosen,
        )
        least = least[: len(ids), None]
        for a, b in _shares(_held(scores, least, chosen.each)):
            i, j = _reached(scores, least, a, b, chosen.each)
            real = np.flatnonzero(j < m)
            real = real[keys.ids[j[real]] != none[a:b][i[real]]]
            closeness, i, j = rescore.scored(
                rows._replace(ids=ids[a:b]),
                keys,
                i[real],
                j[real],
                chosen.metric,
                chosen.each,
            )
            level = np.full(b - a, -np.inf, np.float32)
            ranks[start + a : start + b] = ranking.select(
                [(i, j, closeness)], keys.ids, level, chosen.k, chosen.each
            )
    return ranks


def _padded(ids: np.ndarray, size: int) -> np.ndarray:
    return np.pad(ids.astype(np.int32), (0, size - len(ids)), constant_values=-1)


def _looked_at(rows, keys, tiles, one_more, chosen):
    """Scores of rows with each tile of keys, and the least that matters to each row."""
    count = chosen.k + one_more
    group = _GROUP
    while group > 1 and len(keys.ids) // group < 4 * count:
        group //= 2
    block = prefilter.operand(
        rows.values, rows.ids, chosen.center, chosen.metric, _FLOAT32
    )
    scores, maxima, largest = [], [], []
    for tile in tiles:
        walked = _tile(
            *(block, keys.values, tile, chosen.center),
            metric=chosen.metric,
            group=group,
        )
        # Waiting for each tile keeps the gathered rows of one alive, not of all.
        scores.append(np.asarray(walked[0]))
        maxima.append(np.asarray(walked[1]))
        largest.append(walked[2])
    largest = prefilter.Largest(*(np.max(norms) for norms in zip(*largest)))
    norm = jnp.linalg.norm(chosen.center)
    bound = np.asarray(prefilter.bound(block, largest, norm, chosen.metric))
    maxima = np.concatenate(maxima, axis=1)
    if maxima.shape[1] < count:
        return scores, np.full(len(rows.ids), -np.inf, np.float32)
    kth = np.partition(maxima, -count, axis=1)[:, -count]
    return scores, kth - 2 * bound


def _held(scores, least, each) -> np.ndarray:
    """How many pairs may matter to the rows so far, row by row."""

    def count(tile):
        return np.count_nonzero(tile[: len(least)] >= least, axis=1)

    return np.cumsum(sum(each(count, scores)))


def _shares(total: np.ndarray) -> Iterator[tuple[int, int]]:
    """Spans of rows that hold about `_PAIRS` pairs together, from running totals."""
    start = 0
    while start < len(total):
        before = total[start - 1] if start else 0
        stop = int(np.searchsorted(total, before + _PAIRS, side="right"))
        yield start, max(stop, start + 1)
        start = max(stop, start + 1)


def _reached(scores, least, a, b, each):
    """Positions, from row `a` on and among the keys, of what may matter to rows a:b."""
    found = list(each(lambda tile: np.nonzero(tile[a:b] >= least[a:b]), scores))
    i = np.concatenate([row for row, _ in found])
    j = np.concatenate([at * panels.BLOCK + of for at, (_, of) in enumerate(found)])
    return i.astype(np.int32), j.astype(np.int32)


@functools.partial(jax.jit, static_argnames=("metric", "group"))
def _tile(
    rows: prefilter.Operand,
    values: Float[Array, "m d"],
    ids: Int[Array, " t"],
    center: Float[Array, " d"],
    *,
    metric: pairs.Metric,
    group: int,
) -> tuple[Float[Array, "r t"], Float[Array, "r groups"], prefilter.Largest]:
    """Scores of rows with the keys `ids` (negative ones: minus infinity).

    With them the maxima of groups of strided columns, and the keys' largest norms.
    """
    keys = prefilter.operand(values, ids, center, metric, _FLOAT32)
    scores = prefilter.filtered(rows, keys, biased=True)
    scores = jnp.where(ids[None, :] >= 0, scores, -jnp.inf)
    maxima = scores.reshape(len(scores), group, -1).max(axis=1)
    norms: Any = (jnp.max(getattr(keys, name)) for name in prefilter.Largest._fields)
    return scores, maxima, prefilter.Largest(*norms)


_FLOAT32 = np.dtype(np.float32)
