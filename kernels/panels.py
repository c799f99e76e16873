"""One side of a streamed search: a panel of rows, what it looks for, what it proved."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from . import candidates, pairs, prefilter, ranking

BLOCK = 2048  # rows of a tile: 16 MiB of scores stay in the cache
SAMPLE = 4096  # rows that thresholds are read off
_STEP = 512  # the last block of a panel is padded to a multiple


class Setting(NamedTuple):
    """What one search keeps fixed.

    Attributes:
      k: how many neighbours.
      metric: of closeness.
      center: what the filter subtracts from all rows; zero where it would not help.
      biased: whether centring or l2 add a bias to the filter's product.
      each: a parallel `map`.
    """

    k: int
    metric: pairs.Metric
    center: Float[Array, " d"]
    biased: bool
    each: Callable


class Panel(NamedTuple):
    """Rows that take part in a search together, a random sample of them first.

    Attributes:
      values: all rows of this side, at a safe scale.
      ids: which of them are here, by position.
      blocks: the filter's operands, `BLOCK` rows each; the last padded with zeros.
      largest: the largest norms of the blocks.
    """

    values: Float[Array, "m d"]
    ids: np.ndarray
    blocks: list[prefilter.Operand]
    largest: prefilter.Largest


class Ranked(NamedTuple):
    """What a search found of each row of a panel, by position.

    Attributes:
      ranks: `[n, k]`, as `ranking.encode`s them, the ids being the keys'.
      proved: False where keys that belong to the k best may be missing.
    """

    ranks: np.ndarray
    proved: np.ndarray


@contextlib.contextmanager
def setting(
    values: Float[Array, "n d"], k: int, metric: pairs.Metric, one_scale: bool = True
) -> Iterator[Setting]:
    """A `Setting` for these rows, with threads that end with the context.

    `one_scale` tells that all rows of the search are at the scale of these.
    """
    mean, share = _mean(values)
    # Rows that share a direction are told apart by what is left without it, and the
    # rounding residual shrinks with it. Where there is none, adding biases to every
    # score would be for nothing.
    centred = one_scale and bool(share > 0.05)
    center = mean if centred else jnp.zeros_like(mean)
    with ranking.threads() as pool:
        yield Setting(k, metric, center, centred or metric == "l2", pool.map)


@jax.jit
def _mean(values):
    mean = values.mean(axis=0)
    share = mean @ mean / jnp.maximum(jnp.square(values).sum(axis=1).mean(), 1e-30)
    return mean, share


def panel(values: Float[Array, "m d"], ids: np.ndarray, chosen: Setting) -> Panel:
    """The rows `ids` of `values`, a random sample (the same in every run) first."""
    size = min(SAMPLE, len(ids))
    first = np.random.default_rng(0).permutation(len(ids))[:size]
    others = np.ones(len(ids), bool)
    others[first] = False
    ids = np.concatenate([ids[first], ids[others]]).astype(np.int32)
    blocks = []
    for start in range(0, len(ids), BLOCK):
        part = ids[start : start + BLOCK]
        step = _STEP if len(ids) > BLOCK else 4 * prefilter.BITS
        padded = np.full(-(-len(part) // step) * step, -1, np.int32)
        padded[: len(part)] = part
        blocks.append(
            prefilter.operand(
                *(values, padded, chosen.center, chosen.metric, prefilter.dtype())
            )
        )
    norms = [
        np.max([jnp.max(getattr(block, name)) for block in blocks])
        for name in prefilter.Largest._fields
    ]
    return Panel(values, ids, blocks, prefilter.Largest(*norms))


class Side:
    """Thresholds of one panel's rows against another, and what they prove.

    Whatever a row's threshold was read from, pairs whose closeness reaches its level,
    threshold plus bound, are all among the candidates.
    """

    def __init__(self, panel: Panel, other: Panel, chosen: Setting):
        self.panel, self.chosen = panel, chosen
        norm = jnp.linalg.norm(chosen.center)
        self.bounds = [
            prefilter.bound(block, other.largest, norm, chosen.metric)
            for block in panel.blocks
        ]
        # Of each block; read before it is set only by a mistake.
        self.thresholds: list[Any] = [None] * len(panel.blocks)
        self.floor = np.full(len(panel.ids), -np.inf, np.float32)
        self.level: np.ndarray | None = None
        reach = 0.05 * float(other.largest.centred)
        self.spread = reach * self._gathered([block.centred for block in panel.blocks])
        # Closeness is minus the squared distance; the filter has half of that.
        self.unit = np.float32(2 if chosen.metric == "l2" else 1)

    def close(self) -> None:
        """Nothing is looked for."""
        for at, block in enumerate(self.panel.blocks):
            self.thresholds[at] = jnp.full_like(block.bias, jnp.inf)

    def start_at(self, floor: np.ndarray) -> None:
        """Looks for what reaches `floor`, a closeness by position.

        Rows whose floor is minus infinity keep the threshold they have.
        """
        self.floor = floor.astype(np.float32)
        for at, bound in enumerate(self.bounds):
            part = np.full(bound.shape, np.inf, np.float32)
            known = self.floor[at * BLOCK : (at + 1) * BLOCK]
            part[: len(known)] = known / self.unit
            part -= np.asarray(bound)
            if np.isneginf(known).any():
                part = np.where(np.isneginf(part), self.thresholds[at], part)
            self.thresholds[at] = jnp.asarray(part)

    def set_thresholds(self, at: int, threshold: Array) -> None:
        """Thresholds of a block; its padding rows look for nothing."""
        position = at * BLOCK + jnp.arange(threshold.shape[0])
        present = position < len(self.panel.ids)
        self.thresholds[at] = jnp.where(present, threshold, jnp.inf)

    def reach(self, at: int) -> prefilter.Reach:
        """A block as a tile sees it."""
        block = self.panel.blocks[at]
        return prefilter.Reach(block.values, block.bias, self.thresholds[at])

    def give_up(self, at: int, positions: np.ndarray) -> None:
        """These rows of a block look for nothing any more, and stay unproved."""
        threshold = np.array(self.thresholds[at])
        threshold[positions] = np.inf
        self.thresholds[at] = jnp.asarray(threshold)

    def thinning(self) -> candidates.Side:
        """This side for `candidates.thinned`."""
        bound = self._gathered(self.bounds)
        spread = np.maximum(12 * bound, self.spread)
        spread = np.maximum(spread, 1e-6 * spread.max(initial=1e-30))
        return candidates.Side(self._gathered(self.thresholds), bound, spread)

    def raise_level(self, known: np.ndarray) -> None:
        """Nothing below `known`, a filtered score that k pairs reach, is left."""
        sure = known - self._gathered(self.bounds)
        self.level = np.maximum(self._level(), self.unit * sure)

    def ranked(self, runs: list[ranking.Run], ids: np.ndarray) -> Ranked:
        """The k best pairs of each row, from positions and closenesses of pairs.

        `ids` are the keys', by position.
        """
        level = self._level() if self.level is None else self.level
        ranks = ranking.select(runs, ids, level, self.chosen.k, self.chosen.each)
        # Below a floor nothing was asked for: fewer than k are all there are.
        complete = (ranks[:, -1] != ranking.EMPTY) | (self.floor > -np.inf)
        asked = self._gathered(self.thresholds) != np.inf
        return Ranked(ranks, complete & asked)

    def _level(self) -> np.ndarray:
        level = self._gathered(self.thresholds) + self._gathered(self.bounds)
        return np.where(np.isneginf(self.floor), self.unit * level, self.floor)

    def _gathered(self, blocks: list[Array]) -> np.ndarray:
        parts = [np.asarray(block) for block in blocks]
        return np.concatenate(parts)[: len(self.panel.ids)]
