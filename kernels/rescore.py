"""Pair scores of candidate pairs: many rows, each with a few partners.

Pairs are sorted by their row and scored in segments of one row and eight partners, so
that a row is fetched once for eight pairs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from . import pairs, ranking

_SEGMENT = 8
_STEPS, _CHUNK = 128, 32  # of segments in one call of the compiled program


def scored(
    rows: Any,
    keys: Any,
    i: np.ndarray,
    j: np.ndarray,
    metric: pairs.Metric,
    each: Callable,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Closeness of pairs of positions in two panels; `each` is a parallel `map`.

    Returns the closenesses, `i` and `j`, all in a new order.
    """
    count = len(rows.ids)
    order = ranking.sorting(i, count)
    i, j = i[order], j[order]
    del order
    held = np.bincount(i, minlength=count)
    segments = -(-held // _SEGMENT)
    total = int(segments.sum())
    calls = -(-total // (_STEPS * _CHUNK))
    shift = (np.cumsum(segments) - segments) * _SEGMENT - (np.cumsum(held) - held)
    slot = np.arange(len(i), dtype=np.int32) + shift.astype(np.int32)[i]
    partners = np.zeros((calls, _STEPS, _CHUNK, _SEGMENT), np.int32)
    partners.reshape(-1)[slot] = keys.ids[j]
    owners = np.zeros((calls, _STEPS, _CHUNK), np.int32)
    owners.reshape(-1)[:total] = np.repeat(rows.ids, segments)
    scores = np.empty(partners.shape, np.float32)

    def score(call: int) -> None:
        scores[call] = _score(
            *(rows.values, keys.values, owners[call], partners[call]), metric
        )

    # Fetching rows is bound by memory: calls side by side keep it busy.
    ranking.consume(each(score, range(calls)))
    return scores.reshape(-1)[slot], i, j


@functools.partial(jax.jit, static_argnames=("metric",))
def _score(rows, keys, owners, partners, metric):
    def step(_, xs):
        owner, partner = xs
        theirs = keys.at[partner.reshape(-1)].get(mode="promise_in_bounds")
        theirs = theirs.reshape(*partner.shape, -1)
        mine = rows.at[owner].get(mode="promise_in_bounds")
        return _, pairs.pair_closeness(mine, theirs, metric)

    return lax.scan(step, 0, (owners, partners))[1]
