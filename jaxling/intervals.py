"""Means of a few runs, and how far they may be from the mean of many."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special


class Interval(NamedTuple):
    """A mean and its 95% interval; NaN bounds where there is one value alone."""

    mean: float
    low: float
    high: float


def over_seeds(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean of runs with other seeds and Student's 95% interval.

        mean +- t(n - 1, 0.975) s / sqrt(n)

    Of two runs paired by seed, give the differences. With three, t is 4.30: what it
    calls a difference has to be large beside the spread of the seeds.

    Raises:
      ValueError: no value.
    """
    found = np.asarray(values, np.float64)
    if not found.size:
        raise ValueError("`values` must hold at least one number.")
    mean = float(found.mean())
    if len(found) == 1:
        return Interval(mean, float("nan"), float("nan"))
    n = len(found)
    half = float(special.stdtrit(n - 1, 0.975) * found.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half)
