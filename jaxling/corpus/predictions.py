"""What counts in a corpus tell of a model: of its Scores, and of how it translates.

He et al., 2025, "Semantic Pivots", https://arxiv.org/abs/2505.16385, and its released
code: x = ln(count), 0 where the count is 0; Pearson's r of x and the Score, and the
area under the ROC curve of x for "co-occurrence" (1) against "pivot" (0); and a linear
fit of the Score by x and what a pair's pivots add.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxling import behaviours, kernels


class Estimate(NamedTuple):
    """A value and its 95% bootstrap interval; NaN where it cannot be had."""

    value: float
    low: float
    high: float


class Relation(NamedTuple):
    """What each kind of count tells of the items of an ordered pair of languages.

    `co_occurrence` and `pivot` count the items of either behaviour; areas are NaN
    unless there are both. Correlations are NaN where a side does not vary.
    """

    source: str
    target: str
    items: int
    co_occurrence: int
    pivot: int
    correlation: dict[str, Estimate]
    area: dict[str, Estimate]


class Relations(NamedTuple):
    """All ordered pairs of languages, and their average, each pair counting alike.

    `advantage` is the average area of the first kind of count minus that of each other.
    """

    pairs: list[Relation]
    correlation: dict[str, Estimate]
    area: dict[str, Estimate]
    advantage: dict[str, Estimate]


def log_counts(counts: np.ndarray) -> np.ndarray:
    """ln(count), and 0 where the count is 0, as in the paper's code; float64."""
    return np.log(np.maximum(np.asarray(counts, np.float64), 1))


def relate(
    pairs: Sequence[tuple[str, str]],
    counts: Mapping[str, np.ndarray],
    scores: np.ndarray,
    kinds: Sequence[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Relations:
    """Relates counts of every item to its Score and its behaviour.

    Intervals are percentiles over resampled items, the same ones for all kinds of
    counts; items of one pair count as independent.

    Args:
      pairs: the ordered pair of languages of each item.
      counts: by kind, a count for each item; the first is what the others are compared
        with.
      scores: `[item]`.
      kinds: the behaviour of each item, as `jaxling.behaviours` has them; only
        "co-occurrence" and "pivot" count in areas.
      resamples: of the bootstrap.
      seed: of the resampling.

    Raises:
      ValueError: the arguments differ in length, or there is no item.
    """
    sizes = {len(pairs), len(scores), len(kinds), *map(len, counts.values())}
    if len(sizes) != 1 or sizes == {0} or not counts:
        raise ValueError(
            f"Every item needs a pair, a Score, a behaviour and counts; got {sizes}."
        )
    names = list(counts)
    x = np.stack([log_counts(counts[name]) for name in names])
    y = np.asarray(scores, np.float64)
    coded = {behaviours.CO_OCCURRENCE: 1, behaviours.PIVOT: 0}
    labels = np.array([coded.get(kind, -1) for kind in kinds])
    groups = {
        pair: np.array([i for i, own in enumerate(pairs) if own == pair])
        for pair in dict.fromkeys(map(tuple, pairs))
    }
    longest = max(map(len, groups.values()))
    rng = np.random.default_rng(seed)
    relations, all_r, all_areas = [], [], []
    for (source, target), own in groups.items():
        # The items themselves first, then resampled.
        drawn = np.concatenate(
            [
                np.arange(len(own))[None],
                rng.integers(len(own), size=(resamples, len(own))),
            ]
        )
        chosen = own[drawn]
        r = _pearson(x[:, chosen], y[chosen])
        # All pairs have one shape, so that the kernel is compiled once.
        room = ((0, 0), (0, longest - len(own)))
        padded = np.pad(labels[chosen], room, constant_values=-1)
        logs = np.pad(x[:, chosen], ((0, 0), *room)).astype(np.float32)
        areas = np.asarray(kernels.auc(logs, np.broadcast_to(padded, logs.shape)))
        all_r.append(r)
        all_areas.append(areas)
        relations.append(
            Relation(
                source,
                target,
                len(own),
                int((labels[own] == 1).sum()),
                int((labels[own] == 0).sum()),
                dict(zip(names, map(_estimate, r))),
                dict(zip(names, map(_estimate, areas))),
            )
        )
    mean_r, mean_area = _mean(np.stack(all_r)), _mean(np.stack(all_areas))
    return Relations(
        relations,
        dict(zip(names, map(_estimate, mean_r))),
        dict(zip(names, map(_estimate, mean_area))),
        {
            name: _estimate(mean_area[0] - other)
            for name, other in zip(names[1:], mean_area[1:])
        },
    )


class Fit(NamedTuple):
    """A linear fit: `slopes` by variable, and the share of variance it explains, R².

    Slopes are those of least norm where variables determine each other; R² is NaN where
    the Score does not vary.
    """

    slopes: dict[str, Estimate]
    explained: Estimate


def fit(
    variables: Mapping[str, np.ndarray],
    scores: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Fit:
    """Least squares of the Score on variables and a constant, over all items.

    The paper's code fits two, the ln of the pair's count and a sum over its pivots
    (`pivots.company`). Intervals as in `relate`; equal seeds draw equal items.

    Raises:
      ValueError: the arguments differ in length, or there is no item or no variable.
    """
    sizes = {len(scores), *map(len, variables.values())}
    if len(sizes) != 1 or sizes == {0} or not variables:
        raise ValueError(f"Every item needs a Score and every variable; got {sizes}.")
    n = len(scores)
    draws = np.random.default_rng(seed).integers(n, size=(resamples, n))
    x = np.stack(list(variables.values()), -1).astype(np.float64)
    y = np.asarray(scores, np.float64)
    slopes, explained = [], []
    for own in [np.arange(n), *draws]:
        a, b = x[own] - x[own].mean(0), y[own] - y[own].mean()
        slope = np.linalg.lstsq(a, b)[0]
        slopes.append(slope)
        left, total = ((b - a @ slope) ** 2).sum(), (b * b).sum()
        explained.append(1 - left / total if np.ptp(y[own]) else np.nan)
    return Fit(
        dict(zip(variables, map(_estimate, np.transpose(slopes)))),
        _estimate(np.array(explained)),
    )


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Along the last axis; NaN where a side is constant."""
    x = x - x.mean(-1, keepdims=True)
    y = y - y.mean(-1, keepdims=True)
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    # What rounding leaves of a constant is not variance.
    flat = (np.ptp(x, -1) < 1e-12) | (np.ptp(y, -1) == 0)
    return np.where(flat, np.nan, (x * y).sum(-1) / np.where(flat, 1, scale))


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis, of what is a number."""
    known = np.isfinite(values)
    total = np.where(known, values, 0).sum(0)
    return np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)


def _estimate(values: np.ndarray) -> Estimate:
    """From the value of the items themselves, then those of the resamples."""
    drawn = values[1:][np.isfinite(values[1:])]
    if not np.isfinite(values[0]) or not len(drawn):
        return Estimate(float(values[0]), float("nan"), float("nan"))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high))
