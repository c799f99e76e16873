"""The search for concrete arrays: panels of distinct rows, streamed, then completed.

Only one of identical rows takes part. Rows without a proof are searched by
`exhaustive`, which looks at every pair. Everything here runs on the host; arrays are
whole (a memory map will do), or as much as a caller with a larger matrix brings.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike

from . import duplicates, exhaustive, pairs, panels, ranking, scaled, streamed

PANEL = 32_768  # rows whose candidates are held together
_CHUNK = 4096  # rows whose lists are merged and expanded together


class Lists(NamedTuple):
    """Neighbours on the host: what `neighbors.Neighbors` holds, and what proved them.

    Attributes:
      scores: float32, `[n, k]`; NaN where there is none.
      indices: int32, `[n, k]`; -1 where there is none.
      unproved: rows for which the streamed search was not enough.
    """

    scores: np.ndarray
    indices: np.ndarray
    unproved: np.ndarray


def all_pairs(x: ArrayLike, k: int, metric: pairs.Metric, include_self: bool) -> Lists:
    """The k closest rows of `x` for each of its rows."""
    rows, _ = scaled.prepare(x, x, metric, one_scale=True)
    groups = duplicates.group(rows.values, np.asarray(rows.valid))
    count = len(groups.first)
    # A row with copies finds its own group, and may be the one of it that is dropped.
    sought = k + (not include_self and bool((groups.size > 1).any()))
    ranks = np.full((count, sought), ranking.EMPTY)
    proved = np.ones(count, bool)
    alone = (groups.size == 1) & (not include_self)
    parts = np.array_split(np.arange(count), -(-count // PANEL) or 1)
    with panels.setting(rows.values, sought, metric) as chosen:
        done: list[panels.Panel] = []
        for part in parts if count else []:
            side = panels.panel(rows.values, groups.first[part], chosen)
            own = groups.of_row[side.ids]
            found = streamed.within(side, alone[own], chosen)
            _merge(ranks, proved, own, found)
            for earlier in done:
                other = groups.of_row[earlier.ids]
                floors = _floor(ranks[other]), _floor(ranks[own])
                there, back = streamed.across(earlier, side, chosen, *floors)
                assert back is not None
                _merge(ranks, proved, other, there)
                _merge(ranks, proved, own, back)
            done.append(side)
        excluded = np.where(alone, groups.first, -1)
        _complete(ranks, proved, groups, excluded, rows, rows, groups, chosen)
    return _expanded(
        ranks, proved, rows, rows, groups, groups, k, metric, not include_self
    )


def nearest(queries: ArrayLike, keys: ArrayLike, k: int, metric: pairs.Metric) -> Lists:
    """The k closest keys of each query."""
    rows, others = scaled.prepare(queries, keys, metric, one_scale=False)
    mine, theirs = (
        duplicates.group(side.values, np.asarray(side.valid)) for side in (rows, others)
    )
    ranks = np.full((len(mine.first), k), ranking.EMPTY)
    proved = np.ones(len(mine.first), bool)
    one_scale = metric != "dot"
    with panels.setting(others.values, k, metric, one_scale=one_scale) as chosen:
        for key_ids in _panels(theirs.first):
            key_side = panels.panel(others.values, key_ids, chosen)
            for row_ids in _panels(mine.first):
                side = panels.panel(rows.values, row_ids, chosen)
                own = mine.of_row[side.ids]
                found, _ = streamed.across(
                    side, key_side, chosen, _floor(ranks[own]), both=False
                )
                _merge(ranks, proved, own, found)
        nobody = np.full(len(mine.first), -1)
        _complete(ranks, proved, mine, nobody, rows, others, theirs, chosen)
    return _expanded(ranks, proved, rows, others, mine, theirs, k, metric)


def cross(
    a: ArrayLike,
    b: ArrayLike,
    k: int,
    metric: pairs.Metric,
    best_a: np.ndarray | None,
    best_b: np.ndarray | None,
) -> tuple[Lists, Lists]:
    """The k closest rows of `b` for each of `a`, and of `a` for each of `b`.

    Each `best`, a score per row or None, is that of the k-th neighbour a row has
    already: what is worse may be left out.
    """
    sides = scaled.prepare(a, b, metric, one_scale=True)
    groups = [duplicates.group(s.values, np.asarray(s.valid)) for s in sides]
    floors = [
        _least(_closeness(best, sides, metric, len(group.of_row)), group)
        for best, group in zip((best_a, best_b), groups)
    ]
    ranks = [np.full((len(group.first), k), ranking.EMPTY) for group in groups]
    proved = [np.ones(len(group.first), bool) for group in groups]
    one_scale = metric != "dot"
    with panels.setting(sides[1].values, k, metric, one_scale=one_scale) as chosen:
        for b_ids in _panels(groups[1].first):
            b_side = panels.panel(sides[1].values, b_ids, chosen)
            b_own = groups[1].of_row[b_side.ids]
            for a_ids in _panels(groups[0].first):
                a_side = panels.panel(sides[0].values, a_ids, chosen)
                a_own = groups[0].of_row[a_side.ids]
                there, back = streamed.across(
                    *(a_side, b_side, chosen),
                    np.maximum(floors[0][a_own], _floor(ranks[0][a_own])),
                    np.maximum(floors[1][b_own], _floor(ranks[1][b_own])),
                )
                assert back is not None
                _merge(ranks[0], proved[0], a_own, there)
                _merge(ranks[1], proved[1], b_own, back)
        for me in (0, 1):
            nobody = np.full(len(groups[me].first), -1)
            both = sides[me], sides[1 - me]
            _complete(
                ranks[me], proved[me], groups[me], nobody, *both, groups[1 - me], chosen
            )
    lists = [
        _expanded(
            *(ranks[me], proved[me], sides[me], sides[1 - me]),
            *(groups[me], groups[1 - me], k, metric),
        )
        for me in (0, 1)
    ]
    return lists[0], lists[1]


def _panels(ids: np.ndarray) -> list[np.ndarray]:
    return np.array_split(ids, -(-len(ids) // PANEL)) if len(ids) else []


def _floor(ranks: np.ndarray) -> np.ndarray:
    """Closeness of the last neighbour; minus infinity where slots are empty."""
    closeness, _ = ranking.decode(ranks[:, -1])
    return np.where(np.isnan(closeness), -np.inf, closeness).astype(np.float32)


def _closeness(best, sides, metric, rows) -> np.ndarray:
    """Scores of the metric as closeness at the sides' scale, rounded down."""
    if best is None:
        return np.full(rows, -np.inf, np.float32)
    value = np.asarray(best, np.float32)
    # Beyond these limits the score may have lost what its closeness had.
    known = (np.abs(value) > 1e-35) & (np.abs(value) < 1e35)
    if metric == "cosine":
        known = np.isfinite(value)
    exponent = sum(int(side.exponent[0]) if len(side.exponent) else 0 for side in sides)
    value = np.ldexp(np.where(known, value, 0), -exponent).astype(np.float32)
    return np.where(known, -value if metric == "l2" else value, -np.inf)


def _least(floor: np.ndarray, groups: duplicates.Groups) -> np.ndarray:
    """The lowest floor of each group of identical rows."""
    least = np.full(len(groups.first), np.inf, np.float32)
    rows = groups.members
    np.minimum.at(least, groups.of_row[rows], floor[rows])
    return least


def _merge(
    ranks: np.ndarray, proved: np.ndarray, rows: np.ndarray, found: panels.Ranked
) -> None:
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        both = np.concatenate([ranks[rows[part]], found.ranks[part]], axis=1)
        ranks[rows[part]] = ranking.smallest(both, ranks.shape[1])
    proved[rows] &= found.proved


def _complete(ranks, proved, groups, excluded, rows, keys, key_groups, chosen):
    """Searches all keys again for the rows that are not proved."""
    wanting = np.flatnonzero(~proved)
    ranks[wanting] = exhaustive.search(
        exhaustive.Part(rows.values, groups.first[wanting]),
        exhaustive.Part(keys.values, key_groups.first),
        *(excluded[wanting], chosen),
    )


def _expanded(
    ranks, proved, rows, keys, row_groups, key_groups, k, metric, drop_self=False
) -> Lists:
    """Neighbours of all rows among all keys, from those of and among distinct ones."""
    n = len(row_groups.of_row)
    exponent = None
    if metric != "cosine":
        # All keys share one exponent; without keys there is nothing to scale.
        exponent = np.asarray(rows.exponent) + np.asarray(keys.exponent[:1]).sum()
    scores, indices = np.empty((n, k), np.float32), np.empty((n, k), np.int32)
    for start in range(0, n, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, n))
        full = _of_rows(ranks, ids, row_groups, key_groups, k, drop_self)
        closeness, indices[ids] = ranking.decode(full)
        value = -closeness if metric == "l2" else closeness
        if exponent is not None:
            with np.errstate(over="ignore", under="ignore"):
                value = np.ldexp(value, exponent[ids, None]).astype(np.float32)
        scores[ids] = value + np.float32(0)
    unproved = np.zeros(n, bool)
    present = np.flatnonzero(row_groups.of_row >= 0)
    unproved[present] = ~proved[row_groups.of_row[present]]
    return Lists(scores, indices, unproved)


def _of_rows(ranks, ids, row_groups, key_groups, k, drop_self) -> np.ndarray:
    """The k first ranks of the rows `ids`, copies of keys among them."""
    group = row_groups.of_row[ids]
    full = np.full((len(ids), ranks.shape[1]), ranking.EMPTY)
    full[group >= 0] = ranks[group[group >= 0]]
    if (key_groups.size > 1).any():
        full = duplicates.spread(full, key_groups, k + drop_self)
    if drop_self and full.shape[1] > k:
        itself = (full & 0xFFFFFFFF) == ids[:, None]
        full = np.sort(np.where(itself, ranking.EMPTY, full), axis=1)
    return full[:, :k]
