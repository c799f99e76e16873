"""Exact top-k driven from the host, tile by tile: for concrete arrays, fastest on CPU.

A symmetric tile serves both of its sides. Each yields a mask of candidates: pairs that
the bounded error of a cheap product cannot exclude (`prefilter`). Candidates are scored
once, pair by pair, in float32 (`rescore`), and a row is proved when k of its pair
scores reach the level below which nothing was looked for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from . import candidates, panels, prefilter, rescore

_STRIP = 512  # rows of a diagonal tile taken as far as the diagonal
_BEHIND = 2  # tiles in flight
_BATCH = 16  # masks that are read together, while XLA rests


def within(
    side: panels.Panel, alone: np.ndarray, chosen: panels.Setting
) -> panels.Ranked:
    """The k closest of each row among the rows of its own panel.

    `alone` marks positions that are not their own neighbour.
    """
    both = panels.Side(side, side, chosen)
    search = _Search(both, both, chosen, alone)
    heads = search.sample()
    count = len(side.blocks)
    for key in range(count):
        for row in range(key, count):
            if row == key:
                size = side.blocks[row].bias.shape[0]
                for a in range(0, size, _STRIP):
                    b = min(a + _STRIP, size)
                    search.tile(_Tile(row, a, b, key, b))
            elif not key < heads <= row:
                search.tile(_Tile(row, 0, panels.BLOCK, key, panels.BLOCK))
    i, j, level, _ = candidates.thinned(
        search.found(), both.thinning(), None, chosen.k, chosen.each
    )
    both.raise_level(level)
    # Each unordered pair is scored once; its owner alternates, for even shares.
    odd = ((i ^ j) & 1).astype(bool)
    i, j = np.where(odd, i, j), np.where(odd, j, i)
    scores, i, j = rescore.scored(*(side, side, i, j), chosen.metric, chosen.each)
    # A row's pair with itself counts once.
    back = np.where(i != j, scores, np.float32(np.nan))
    return both.ranked([(i, j, scores), (j, i, back)], side.ids)


def across(
    rows: panels.Panel,
    keys: panels.Panel,
    chosen: panels.Setting,
    row_floor: np.ndarray | None = None,
    key_floor: np.ndarray | None = None,
    both: bool = True,
) -> tuple[panels.Ranked, panels.Ranked | None]:
    """The k closest keys of each row and, if `both`, the k closest rows of each key.

    A floor holds, by position, the closeness of the k-th neighbour that a row has
    already (minus infinity if none): nothing below it is looked for.
    """
    row_side, key_side = (
        panels.Side(rows, keys, chosen),
        panels.Side(keys, rows, chosen),
    )
    search = _Search(row_side, key_side, chosen)
    heads = 0
    if not both:
        key_side.close()
    else:
        key_floor = _or_none(key_floor, keys)
        if np.isneginf(key_floor).any():
            _Search(key_side, row_side, chosen).sample(keep=False)
        key_side.start_at(key_floor)
    row_floor = _or_none(row_floor, rows)
    if np.isneginf(row_floor).all():
        heads = search.sample()
    elif np.isneginf(row_floor).any():
        search.sample(keep=False)
    row_side.start_at(row_floor)
    for row in range(len(rows.blocks)):
        for key in range(heads, len(keys.blocks)):
            search.tile(_Tile(row, 0, panels.BLOCK, key, panels.BLOCK))
    sides = row_side.thinning(), key_side.thinning()
    i, j, row_level, key_level = candidates.thinned(
        search.found(), *sides, chosen.k, chosen.each
    )
    row_side.raise_level(row_level)
    if both:
        key_side.raise_level(key_level)
    scores, i, j = rescore.scored(*(rows, keys, i, j), chosen.metric, chosen.each)
    ranked = row_side.ranked([(i, j, scores)], keys.ids)
    return ranked, key_side.ranked([(j, i, scores)], rows.ids) if both else None


def _or_none(floor: np.ndarray | None, side: panels.Panel) -> np.ndarray:
    return np.full(len(side.ids), -np.inf, np.float32) if floor is None else floor


class _Tile(NamedTuple):
    """Rows `a:b` of block `row` against the first `width` keys from block `key` on."""

    row: int
    a: int
    b: int
    key: int
    width: int


class _Search:
    """Tiles in flight between two sides, and the candidates that have landed."""

    def __init__(
        self,
        rows: panels.Side,
        keys: panels.Side,
        chosen: panels.Setting,
        alone: np.ndarray | None = None,
    ):
        self.rows, self.keys, self.chosen, self.alone = rows, keys, chosen, alone
        self.allowance = self._allowed()
        self.flying: list[tuple[_Tile, Array]] = []
        self.landed: list[candidates.Candidates] = []
        row, key = rows.panel.largest, keys.panel.largest
        if chosen.metric == "l2":
            size = max(float(row.centred), float(key.centred)) ** 2
            self.least, most = -2.1 * size, 0.1 * size
        else:
            most = 1.05 * float(row.norm) * float(key.norm)
            self.least = -most
        self.step = max(most - self.least, 1e-30) / prefilter.LEVELS
        self.scale = prefilter.Scale(
            jnp.float32(self.least), jnp.float32(1 / self.step)
        )

    def sample(self, keep: bool = True) -> int:
        """Thresholds of all rows from a sample of the keys: its first blocks.

        Returns how many blocks of keys the rows after those have been masked against
        on the way; 0 unless `keep`, and where the sample is all there is.
        """
        keys, rows = self.keys.panel, self.rows.panel
        present = min(panels.SAMPLE, len(keys.ids))
        heads = -(-present // panels.BLOCK)
        keep = keep and present < len(keys.ids)
        values, bias = (
            jnp.concatenate(parts)[:present]
            for parts in zip(*((b.values, b.bias) for b in keys.blocks[:heads]))
        )
        count = prefilter.sample_count(self.chosen.k, present, len(keys.ids))
        same = self.rows is self.keys
        reach = prefilter.Reach(values, bias, jnp.full(present, jnp.inf))
        for row, block in enumerate(rows.blocks):
            if keep and (row == heads if same else row == 0):
                known = jnp.concatenate(self.keys.thresholds[:heads])
                reach = reach._replace(threshold=known)
            keeps = keep and (not same or row >= heads)
            size = block.bias.shape[0]
            tiles, masks, parts = [], [], []
            for a in range(0, size, panels.BLOCK // 2):
                b = min(a + panels.BLOCK // 2, size)
                words, threshold = prefilter.mask_and_thresholds(
                    prefilter.Reach(block.values, block.bias, block.bias),
                    *(reach, self.rows.bounds[row], self.scale),
                    part=(a, b),
                    count=count,
                    biased=self.chosen.biased,
                )
                tiles.append(_Tile(row, a, b, 0, present))
                masks.append(words)
                parts.append(threshold)
            self.rows.set_thresholds(row, jnp.concatenate(parts))
            for tile, words in zip(tiles, masks) if keeps else ():
                self._fly(tile, words)
        return heads if keep else 0

    def tile(self, tile: _Tile) -> None:
        """The candidates of one tile whose thresholds are known."""
        self._fly(tile, self._mask(tile))

    def found(self) -> list[candidates.Candidates]:
        """All candidates, tile by tile, after the last one."""
        self._land()
        found, self.landed = self.landed, []
        return found

    def _mask(self, tile: _Tile) -> Array:
        sides = self.rows.reach(tile.row), self.keys.reach(tile.key)
        return prefilter.mask(*sides, self.scale, **self._extent(tile))

    def _extent(self, tile: _Tile) -> dict:
        part = tile.a, tile.b
        return {"part": part, "width": tile.width, "biased": self.chosen.biased}

    def _fly(self, tile: _Tile, words: Array) -> None:
        self.flying.append((tile, words))
        if len(self.flying) > _BEHIND:
            self.flying[-1 - _BEHIND][1].block_until_ready()
        if len(self.flying) >= _BATCH:
            self._land()

    def _land(self) -> None:
        jax.block_until_ready([words for _, words in self.flying])
        flown = [(tile, np.asarray(words)) for tile, words in self.flying]
        self.flying.clear()
        held = list(self.chosen.each(lambda f: candidates.count(f[1]), flown))
        fitting = []
        for (tile, words), count in zip(flown, held):
            if count <= self._limit(tile):
                self.allowance -= count
                fitting.append((tile, words))
            else:
                fitting += self._relieved(tile)
        self.landed += self.chosen.each(lambda f: self._read(*f), fitting)

    def _allowed(self) -> int:
        """How many candidates may be held at once: what bounds the search's memory."""
        rows, keys = len(self.rows.panel.ids), len(self.keys.panel.ids)
        looking = rows if self.rows is self.keys else rows + keys
        return (4 * self.chosen.k + 256) * looking

    def _limit(self, tile: _Tile) -> int:
        """How many candidates this tile may bring.

        A tile may take a quarter of what is left of the allowance, because near rows
        often have near ids, and never has less than its even share: together that is
        at most twice the allowance.
        """
        rows, keys = len(self.rows.panel.ids), len(self.keys.panel.ids)
        tiles = rows * keys / (2 if self.rows is self.keys else 1)
        share = min(1.0, (tile.b - tile.a) * tile.width / max(tiles, 1))
        return int(max(share * self._allowed(), self.allowance / 4))

    def _relieved(self, crowded: _Tile) -> list[tuple[_Tile, np.ndarray]]:
        """The masks of a tile that has too many candidates, once some rows gave up.

        Where the filter cannot tell pairs apart, masks of nearly everything would
        outgrow memory. The rows that hold most candidates are searched otherwise.
        """
        found = []
        for start in range(0, crowded.width, panels.BLOCK):
            tile = crowded._replace(
                key=crowded.key + start // panels.BLOCK,
                width=min(panels.BLOCK, crowded.width - start),
            )
            limit = self._limit(tile)
            words = np.asarray(self._mask(tile))
            if candidates.count(words) > limit:
                self._give_up_crowded(tile, limit)
                words = np.asarray(self._mask(tile))
            self.allowance -= candidates.count(words)
            found.append((tile, words))
        return found

    def _give_up_crowded(self, tile: _Tile, limit: int) -> None:
        sides = self.rows.reach(tile.row), self.keys.reach(tile.key)
        counted = prefilter.counts(*sides, **self._extent(tile))
        of_rows, of_keys = (np.asarray(part, np.int64) for part in counted)
        every = np.sort(np.concatenate([of_rows, of_keys]))
        kept = np.searchsorted(np.cumsum(every), limit, side="right")
        most = every[kept] if kept < len(every) else every[-1] + 1
        self.rows.give_up(tile.row, tile.a + np.flatnonzero(of_rows >= most))
        self.keys.give_up(tile.key, np.flatnonzero(of_keys >= most))

    def _read(self, tile: _Tile, words: np.ndarray) -> candidates.Candidates:
        corner = tile.row * panels.BLOCK + tile.a, tile.key * panels.BLOCK
        found = candidates.read(words, corner, self.least, self.step)
        i, j = found.positions()
        rows, keys = len(self.rows.panel.ids), len(self.keys.panel.ids)
        present = (i < rows) & (j < keys)
        if self.alone is not None and tile.row == tile.key:
            itself = i == j
            itself[itself] = ~self.alone[i[itself]]
            present &= (i > j) | itself
        return found if present.all() else found.where(present)
