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


Run = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, others, closenesses


def select(
    runs: list[Run], ids: np.ndarray, level: np.ndarray, k: int, each: Callable
) -> np.ndarray:
    """The k first ranks of each row, `[len(level), k]`.

    A run holds pairs in any order: a row, the position of another in `ids`, and their
    closeness. What is below the row's `level`, or NaN, does not count. `each` is a
    parallel `map`.
    """
    rows = len(level)
    orders = [sorting(run[0], rows) for run in runs]
    held = [np.bincount(run[0], minlength=rows) for run in runs]
    ends = [np.concatenate([[0], np.cumsum(counts)]) for counts in held]
    total = np.sum(held, axis=0)
    best = np.full((rows, k), EMPTY)

    def ranks_of(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Entry by entry: the row, and its rank or none."""
        found = []
        for (mine, others, closeness), order, end in zip(runs, orders, ends):
            entry = order[end[first] : end[last]]
            row, value = mine[entry], closeness[entry]
            rank = encode(value, ids[others[entry]])
            found.append((row, np.where(value >= level[row], rank, EMPTY)))
        row, rank = (np.concatenate(part) for part in zip(*found))
        return row, rank

    def chunk(first: int) -> None:
        last = min(first + _CHUNK, rows)
        crowd = total[first:last]
        width = min(_CROWDED + k, int(crowd.max(initial=0)))
        padded = np.full((last - first, max(width, k)), EMPTY)
        row, rank = ranks_of(first, last)
        filled = np.zeros(last - first, np.int64)
        at = 0
        for counts in held:
            counts = counts[first:last]
            size = int(counts.sum())
            here = slice(at, at + size)
            # Rows ascend within a run: the place is how far its row's begin lies back.
            begin = np.cumsum(counts) - counts
            place = np.arange(size) + (filled - begin)[row[here] - first]
            fits = place < width
            padded[row[here][fits] - first, place[fits]] = rank[here][fits]
            filled, at = filled + counts, at + size
        best[first:last] = smallest(padded, k)
        for one in (first + np.flatnonzero(crowd > width)).tolist():
            best[one] = smallest(ranks_of(one, one + 1)[1][None], k)[0]

    consume(each(chunk, range(0, rows, _CHUNK)))
    return best


def sorting(rows: np.ndarray, count: int) -> np.ndarray:
    """A stable order by row, of `count` rows: int32 where it can be."""
    # NumPy sorts 16 bits by radix, several times faster.
    order = np.argsort(
        rows.astype(np.uint16 if count <= 1 << 16 else np.int32), kind="stable"
    )
    return order.astype(np.int32 if len(rows) < 1 << 31 else np.int64)


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
