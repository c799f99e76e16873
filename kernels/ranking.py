"""Neighbours as sortable integers: closeness first, then the lower index.

One int64 per neighbour on the host: its order is the order of neighbours, so that
selecting and merging are sorting. NumPy only.
"""

import os
from collections.abc import Callable, Iterable
from concurrent import futures

import numpy as np

EMPTY = np.iinfo(np.int64).max
_MAGNITUDE = np.int32(0x7FFFFFFF)
_CHUNK = 2048  # rows that are sorted together
_CROWDED = 512  # entries beyond k with which a row is sorted alone


def encode(closeness: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Integers that ascend as closeness (float32) descends, equal ones by id."""
    # Adding zero makes -0.0 the zero it equals.
    bits = (closeness + np.float32(0)).view(np.int32)
    ascending = np.where(bits < 0, bits ^ _MAGNITUDE, bits)
    return ((~ascending).astype(np.int64) << 32) | ids


def decode(ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Closeness and ids; NaN and -1 where there is no neighbour."""
    ascending = ~(ranks >> 32).astype(np.int32)
    bits = np.where(ascending < 0, ascending ^ _MAGNITUDE, ascending)
    empty = ranks == EMPTY
    closeness = np.where(empty, np.float32(np.nan), bits.view(np.float32))
    return closeness, np.where(empty, -1, ranks & 0xFFFFFFFF).astype(np.int32)


def select(
    owners: np.ndarray,
    closeness: np.ndarray,
    ids: np.ndarray,
    level: np.ndarray,
    k: int,
    each: Callable,
) -> np.ndarray:
    """The k first ranks of each row, `[len(level), k]`.

    Entry by entry, in any order: `owners` names a row, `ids` its neighbour and
    `closeness` theirs; below the row's `level` an entry does not count. `each` is a
    parallel `map`.
    """
    rows = len(level)
    order = np.argsort(
        owners.astype(np.uint16 if rows <= 1 << 16 else np.int32), kind="stable"
    ).astype(np.int32 if len(owners) < 1 << 31 else np.int64)
    held = np.bincount(owners, minlength=rows)
    ends = np.concatenate([[0], np.cumsum(held)])
    best = np.full((rows, k), EMPTY)

    def ranks_of(part: slice) -> np.ndarray:
        entry = order[part]
        ranks = encode(closeness[entry], ids[entry])
        return np.where(closeness[entry] >= level[owners[entry]], ranks, EMPTY)

    def chunk(first: int) -> None:
        last = min(first + _CHUNK, rows)
        width = int(min(_CROWDED + k, held[first:last].max(initial=0)))
        part = slice(ends[first], ends[last])
        owner = owners[order[part]]
        place = np.arange(ends[first], ends[last]) - ends[owner]
        padded = np.full((last - first, max(width, k)), EMPTY)
        fits = place < width
        padded[owner[fits] - first, place[fits]] = ranks_of(part)[fits]
        best[first:last] = smallest(padded, k)
        for row in first + np.flatnonzero(held[first:last] > width):
            own = ranks_of(slice(ends[row], ends[row + 1]))
            best[row] = smallest(own[None], k)[0]

    consume(each(chunk, range(0, rows, _CHUNK)))
    return best


def smallest(ranks: np.ndarray, k: int) -> np.ndarray:
    """The k smallest of each row, sorted."""
    if ranks.shape[1] > 4 * k + 64:
        ranks = np.partition(ranks, k - 1, axis=1)[:, :k]
    return np.sort(ranks, axis=1)[:, :k]


def consume(results: Iterable) -> None:
    """Waits for the results of a parallel `map`, and raises what they raise."""
    for _ in results:
        pass


def threads() -> futures.ThreadPoolExecutor:
    """As many as there are processors here: NumPy releases the interpreter's lock."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    return futures.ThreadPoolExecutor(max(1, min(count, 16)))
