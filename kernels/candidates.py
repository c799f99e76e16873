"""Pairs that a filter could not exclude, on the host: read, thinned, ready to score.

NumPy only; whoever calls brings a parallel `map`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .prefilter import BITS

_BINS = 64
_SLACK = np.float32(0.05)  # of a step: rounding in the step's own arithmetic
_NONE = np.float32(-np.inf)


class Candidates(NamedTuple):
    """Pairs by position, with what is known of their filtered scores.

    Attributes:
      i: position among the rows, int32.
      j: position among the keys, int32.
      lower: the score is at least this; minus infinity where a word's largest score
        may belong to another of its columns.
      upper: the score is at most this.
    """

    i: np.ndarray
    j: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    def where(self, keep: np.ndarray) -> "Candidates":
        """The candidates that `keep` marks."""
        return Candidates(*(part[keep] for part in self))


def joined(parts: list[Candidates]) -> Candidates:
    """All candidates of the parts, in order."""
    nothing = np.zeros(0, np.int32), np.zeros(0, np.int32)
    nothing = Candidates(*nothing, np.zeros(0, np.float32), np.zeros(0, np.float32))
    return Candidates(*(np.concatenate(part) for part in zip(nothing, *parts)))


def read(words: np.ndarray, i: int, j: int, least: float, step: float) -> Candidates:
    """The set bits of a mask whose corner is the pair of positions `(i, j)`.

    `least` and `step` are the scale of the scores in the words' upper halves.
    """
    per_row = np.int32(words.shape[1])
    flat = words.reshape(-1)
    masks = (flat & np.uint32((1 << BITS) - 1)).astype(np.uint16)
    used = np.flatnonzero(masks != 0).astype(np.int32)
    bits = np.unpackbits(masks[used].view(np.uint8), bitorder="little")
    bits = np.flatnonzero(bits.view(bool)).astype(np.int32)
    word = used[bits >> 4]
    row = word // per_row
    column = word - row * per_row + (bits & (BITS - 1)) * per_row
    known = (flat[word] >> np.uint32(BITS)).astype(np.float32)
    least, step = np.float32(least), np.float32(step)
    lower = least + (known - _SLACK) * step
    upper = least + (known + (1 + _SLACK)) * step
    mask = masks[word]
    lower[(mask & (mask - np.uint16(1))) != 0] = _NONE
    return Candidates(row + np.int32(i), column + np.int32(j), lower, upper)


def count(words: np.ndarray) -> int:
    """How many pairs a mask holds."""
    return int(np.bitwise_count(words & np.uint32((1 << BITS) - 1)).sum(dtype=np.int64))


class Side(NamedTuple):
    """What thinning needs of one side, by position.

    Attributes:
      threshold: of the filtered score.
      bound: how far a filtered score may lie from the pair score.
      spread: the width above the threshold that is looked at closely.
    """

    threshold: np.ndarray
    bound: np.ndarray
    spread: np.ndarray


def thinned(
    found: Candidates, rows: Side, keys: Side | None, k: int, each: Callable
) -> tuple[Candidates, np.ndarray, np.ndarray]:
    """Drops pairs that k better ones are known for on both sides.

    With L the k-th largest lower score of a row, its k-th pair score is at least
    L - bound, and whatever reaches that has a filtered score of at least L - 2 bound.
    `keys` is None where both sides are the same rows.

    Returns the rest, and L of the rows and of the keys (minus infinity if unknown).
    """
    parts = _halves(len(found.i))
    same = keys is None
    off = found.i != found.j if same else None
    sides = [(found.i, rows, None), (found.j, keys or rows, off)]

    def histogram(work):
        (positions, side, keep), part = work
        at, lower = positions[part], found.lower[part]
        if keep is not None:
            at, lower = at[keep[part]], lower[keep[part]]
        bins = (lower - side.threshold[at]) * (np.float32(_BINS - 2) / side.spread)[at]
        bins = np.clip(bins, -1, _BINS - 2)
        bins = np.floor(bins).astype(np.int32) + 1 + at * np.int32(_BINS)
        return np.bincount(bins, minlength=len(side.threshold) * _BINS)

    counted = list(each(histogram, [(side, part) for side in sides for part in parts]))
    counted = [sum(counted[: len(parts)]), sum(counted[len(parts) :])]
    if same:
        counted = [counted[0] + counted[1]] * 2
    best = [_level(c, s[1], k) for c, s in zip(counted[: 1 if same else 2], sides)]
    reach = [
        (level - 2 * side.bound).astype(np.float32)
        for level, (_, side, _) in zip(best, sides)
    ]

    def kept(part):
        at = np.minimum(reach[0][found.i[part]], reach[-1][found.j[part]])
        return found.upper[part] >= at

    keep = np.concatenate(list(each(kept, parts)))
    rest = list(each(lambda part: part[keep], found))
    return Candidates(*rest), best[0], best[-1]


def _level(counted: np.ndarray, side: Side, k: int) -> np.ndarray:
    """The lower edge of the bin that holds the k-th largest lower score."""
    # Bin 0 holds scores of which nothing is known.
    from_top = counted.reshape(-1, _BINS)[:, :0:-1].cumsum(axis=1) >= k
    bin_of_kth = _BINS - 2 - from_top.argmax(axis=1)
    width = side.spread / np.float32(_BINS - 2)
    # A little lower than the edge, for the rounding of the binning itself.
    edge = side.threshold + (bin_of_kth - _SLACK) * width
    return np.where(from_top.any(axis=1), edge, _NONE).astype(np.float32)


def _halves(length: int) -> list[slice]:
    return [slice(0, length // 2), slice(length // 2, length)]
