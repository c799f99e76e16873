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
    """Pairs of one tile, with what is known of their filtered scores.

    They are many: each takes seven bytes.

    Attributes:
      corner: positions of the tile's first row and key.
      i: row of the tile, uint16.
      j: key of the tile, uint16.
      steps: the largest score of the pair's word in steps of the scale, uint16.
      several: the word holds more pairs, and the score may be that of another.
      least: score of zero steps.
      step: size of a step.
    """

    corner: tuple[int, int]
    i: np.ndarray
    j: np.ndarray
    steps: np.ndarray
    several: np.ndarray
    least: float
    step: float

    def where(self, keep: np.ndarray) -> "Candidates":
        """The candidates that `keep` marks."""
        return self._replace(
            i=self.i[keep],
            j=self.j[keep],
            steps=self.steps[keep],
            several=self.several[keep],
        )

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions among the rows and among the keys, int32."""
        i, j = self.corner
        return self.i + np.int32(i), self.j + np.int32(j)

    def lower(self) -> np.ndarray:
        """Scores are at least this; minus infinity where nothing is known."""
        lower = self._score(-_SLACK)
        lower[self.several] = _NONE
        return lower

    def upper(self) -> np.ndarray:
        """Scores are at most this."""
        return self._score(1 + _SLACK)

    def _score(self, more: np.float32) -> np.ndarray:
        steps = self.steps.astype(np.float32) + np.float32(more)
        return np.float32(self.least) + steps * np.float32(self.step)


def read(
    words: np.ndarray, corner: tuple[int, int], least: float, step: float
) -> Candidates:
    """The set bits of a mask whose first row and key are at the `corner`.

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
    steps = (flat[word] >> np.uint32(BITS)).astype(np.uint16)
    mask = masks[word]
    several = (mask & (mask - np.uint16(1))) != 0
    row, column = row.astype(np.uint16), column.astype(np.uint16)
    return Candidates(corner, row, column, steps, several, least, step)


def count(words: np.ndarray) -> int:
    """How many pairs a mask holds."""
    return int(np.bitwise_count(words & np.uint32((1 << BITS) - 1)).sum(dtype=np.int64))


class Side(NamedTuple):
    """What thinning needs of one side, by position.

    Attributes:
      threshold: of the filtered score; infinite where nothing is looked for.
      bound: how far a filtered score may lie from the pair score.
      spread: the width above the threshold that is looked at closely.
    """

    threshold: np.ndarray
    bound: np.ndarray
    spread: np.ndarray


def thinned(
    parts: list[Candidates], rows: Side, keys: Side | None, k: int, each: Callable
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Drops pairs that k better ones are known for on both sides.

    With L the k-th largest lower score of a row, its k-th pair score is at least
    L - bound, and whatever reaches that has a filtered score of at least L - 2 bound.
    `keys` is None where both sides are the same rows.

    Returns `i` and `j` of the rest, and L of the rows and of the keys (minus infinity
    if unknown).
    """
    sides = [rows] if keys is None else [rows, keys]
    counts = [np.zeros((len(side.threshold), _BINS), np.int32) for side in sides]

    def histograms(part: Candidates):
        (i, j), lower = part.positions(), part.lower()
        off = slice(None) if keys is not None else i != j
        return _histogram(i, lower, rows), _histogram(j[off], lower[off], sides[-1])

    # A part is of one tile: its rows lie together, and so do their counts.
    for both in each(histograms, parts):
        for of_side, (first, counted) in zip((counts[0], counts[-1]), both):
            of_side[first : first + len(counted)] += counted
    best = [_level(of, side, k) for of, side in zip(counts, sides)]
    reach = [
        np.where(side.threshold == np.inf, np.inf, level - 2 * side.bound)
        for level, side in zip(best, sides)
    ]

    def kept(part: Candidates):
        i, j = part.positions()
        keep = part.upper() >= np.minimum(reach[0][i], reach[-1][j])
        return i[keep], j[keep]

    nothing = np.zeros(0, np.int32), np.zeros(0, np.int32)
    i, j = (np.concatenate(side) for side in zip(nothing, *each(kept, parts)))
    return i, j, best[0], best[-1]


def _histogram(
    positions: np.ndarray, lower: np.ndarray, side: Side
) -> tuple[int, np.ndarray]:
    """The first position, and from there on how many scores fall into each bin."""
    first = int(positions.min(initial=len(side.threshold)))
    span = slice(first, int(positions.max(initial=first - 1)) + 1)
    at = positions - np.int32(first)
    per_unit = np.float32(_BINS - 2) / side.spread[span]
    bins = (lower - side.threshold[positions]) * per_unit[at]
    bins = np.floor(np.clip(bins, -1, _BINS - 2)).astype(np.int32) + 1
    size = span.stop - first
    counted = np.bincount(bins + at * np.int32(_BINS), minlength=size * _BINS)
    return first, counted.reshape(size, _BINS)


def _level(counted: np.ndarray, side: Side, k: int) -> np.ndarray:
    """The lower edge of the bin that holds the k-th largest lower score."""
    # Bin 0 holds scores of which nothing is known.
    from_top = counted[:, :0:-1].cumsum(axis=1, dtype=np.int32) >= k
    bin_of_kth = _BINS - 2 - from_top.argmax(axis=1)
    width = side.spread / np.float32(_BINS - 2)
    # A little lower than the edge, for the rounding of the binning itself.
    edge = side.threshold + (bin_of_kth - _SLACK) * width
    return np.where(from_top.any(axis=1), edge, _NONE).astype(np.float32)
