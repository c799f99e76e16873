"""Packs problems into batches of one static shape, so that one program solves all.

Rows are cut into blocks of equal length and a batch is a list of blocks; how many of
them hold work is data, not shape. Sizes are chosen per job: padding of blocks is kept
small, batches large enough to hide dispatch and small enough to stay in cache.
"""

from typing import NamedTuple

import numpy as np

from .problems import Problems, Tile, label_dtype

COLUMNS = 64  # of one product, so that no rows x problems array of floats exists
PROBLEMS = 512  # of one batch: bounds the solver's state
MARGINS = 2**18  # rows x columns of a batch that groups of problems may share
BATCH_ROWS = 4096  # and its rows, where the largest group has less
BLOCK_ROWS = 512  # a block, its margins and its residuals stay in cache
PAIRS = 3072  # of rows, whose differences estimate the covariance


class Batch(NamedTuple):
    """One call of the solver: `b` blocks of `r` rows, `t` tiles of `c` columns.

    rows:      `[b, r]` indices into the features.
    labels:    `[b, c, r]` class, or -1.
    weights:   `[b, 1 or c, r]` sample weights, or None.
    tile:      `[b]` the tile of a block.
    problem:   `[t, c]` problem (of this batch) of each column; p where there is none.
    slots:     `[p, s]` the columns, counted through all tiles, of each problem.
    slot_used: `[p, s]` whether a slot is real.
    centre:    `[g, q]` rows whose mean is subtracted from the rows of a group.
    group:     `[b]` the group (connected tiles) of a block.
    owner:     `[p]` the group of a problem.
    used:      `[b]` whether a block is real.
    """

    rows: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None
    tile: np.ndarray
    problem: np.ndarray
    slots: np.ndarray
    slot_used: np.ndarray
    centre: np.ndarray
    group: np.ndarray
    owner: np.ndarray
    used: np.ndarray


class Packed(NamedTuple):
    """Batches, and the problem ids of each; together they hold every problem once."""

    batches: list[Batch]
    ids: list[np.ndarray]


def pack(problems: Problems) -> Packed:
    """Batches of all problems, alike in shape."""
    filled = (t for t in problems.tiles if len(t.rows) and len(t.problems))
    problems = problems._replace(tiles=tuple(filled))
    outputs = 1 if problems.classes == 2 else problems.classes
    groups = [part for all_ in _connected(problems) for part in _divide(all_, outputs)]
    lengths = np.array([len(tile.rows) for group in groups for tile in group.tiles])
    block = _block_rows(lengths)
    drawn = _drawn(groups, block, outputs)
    ids = [np.concatenate([group.ids for group in batch]) for batch in drawn]
    return Packed(_arrays(drawn, block), ids)


class _Group(NamedTuple):
    """Connected tiles and their problems."""

    tiles: list[Tile]
    ids: np.ndarray


def _drawn(groups: list[_Group], block: int, outputs: int) -> list[list[_Group]]:
    """Groups by batch, the largest first."""
    rows = [sum(-(-len(t.rows) // block) for t in g.tiles) * block for g in groups]
    widths = [max(len(t.problems) for t in g.tiles) * outputs for g in groups]
    most = max(BATCH_ROWS, *rows)  # the largest group's sets the shape of all
    batches: list[list[_Group]] = []
    size = held = width = 0
    for i in sorted(range(len(groups)), key=lambda i: -rows[i]):
        size, held = size + rows[i], held + len(groups[i].ids)
        width = max(width, widths[i])
        fits = size <= most and size * width <= MARGINS and held <= PROBLEMS
        if not batches or not fits:
            batches.append([])
            size, held, width = rows[i], len(groups[i].ids), widths[i]
        batches[-1].append(groups[i])
    return batches


def same_rows(a: Batch, b: Batch) -> bool:
    """Whether the blocks of both hold the same rows, centred alike."""
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("rows", "centre", "group", "used")
    )


def _connected(problems: Problems) -> list[list[Tile]]:
    """Tiles grouped so that no problem has columns in two groups."""
    leader = list(range(len(problems.tiles)))

    def find(t: int) -> int:
        while leader[t] != t:
            leader[t] = t = leader[leader[t]]
        return t

    first = np.full(problems.count, -1)
    for t, tile in enumerate(problems.tiles):
        for u in np.unique(first[tile.problems]).tolist():
            if u >= 0:
                leader[find(t)] = find(u)
        first[tile.problems] = t
    labels = label_dtype(problems.classes)
    groups: dict[int, list[Tile]] = {}
    for t, tile in enumerate(problems.tiles):
        tile = tile._replace(labels=tile.labels.astype(labels, copy=False))
        groups.setdefault(find(t), []).append(tile)
    return list(groups.values())


def _divide(tiles: list[Tile], outputs: int) -> list[_Group]:
    """A group of tiles cut by problems, so that columns and problems fit a batch.

    A problem has `outputs` columns in the product.
    """
    ids = np.unique(np.concatenate([tile.problems for tile in tiles]))
    widest = max(len(tile.problems) for tile in tiles)
    parts = max(-(-widest * outputs // COLUMNS), -(-len(ids) // PROBLEMS))
    parts = min(parts, len(ids))
    if parts == 1:
        return [_Group(tiles, ids)]
    # Neighbouring problems read the same rows, but they may be all those of a tile.
    cuts = np.array_split(ids, parts)
    widest = max(np.isin(tile.problems, own).sum() for tile in tiles for own in cuts)
    if widest * outputs > COLUMNS:
        cuts = [ids[i::parts] for i in range(parts)]
    divided = []
    for own in cuts:
        kept = []
        for tile in tiles:
            column = np.isin(tile.problems, own)
            labels = tile.labels[column]
            row = (labels >= 0).any(axis=0)
            weights = tile.weights
            if weights is not None:
                weights = weights[..., row]
                weights = weights[column] if weights.ndim == 2 else weights
            if row.any():
                kept.append(
                    Tile(tile.rows[row], tile.problems[column], labels[:, row], weights)
                )
        divided.append(_Group(kept, own))
    return divided


def _block_rows(lengths: np.ndarray) -> int:
    """The block length with the least padding, a block counted as 64 rows of work."""
    longest = int(lengths.max(initial=1))
    candidates = np.arange(64, max(64, min(BLOCK_ROWS, longest)) + 8, 8)
    blocks = -(-lengths[:, None] // candidates)
    return int(candidates[np.argmin((blocks * (candidates + 64)).sum(axis=0))])


def pairs_of_rows(tiles: tuple[Tile, ...]) -> np.ndarray:
    """`[2, m]` rows, two of one tile each; every tile by its share of the rows."""
    rng = np.random.default_rng(0)
    total = sum(len(tile.rows) for tile in tiles)
    pairs = []
    for tile in tiles:
        r = len(tile.rows)
        if r:
            m = -(-min(PAIRS, total) * r // total)
            one = rng.permutation(r)[:m]
            other = (one + rng.integers(1, max(r, 2), size=m)) % r
            pairs.append(tile.rows[np.stack([one, other])])
    return np.concatenate(pairs, axis=1).astype(np.int32)


def _arrays(batches: list[list[_Group]], r: int) -> list[Batch]:
    """The batches' arrays, padded to the shapes that all of them share."""
    tiles = [[tile for group in batch for tile in group.tiles] for batch in batches]
    b = max(sum(-(-len(t.rows) // r) for t in batch) for batch in tiles)
    t = max(len(batch) for batch in tiles)
    c = max(len(tile.problems) for batch in tiles for tile in batch)
    p = max(sum(len(group.ids) for group in batch) for batch in batches)
    g = max(len(batch) for batch in batches)
    s = max(
        int(np.bincount(np.concatenate([x.problems for x in group.tiles])).max())
        for batch in batches
        for group in batch
    )
    q = max(64, 512 // max(len(batch) for batch in tiles))
    weights = [tile.weights for batch in tiles for tile in batch]
    wide = 1
    if any(w is not None and w.ndim == 2 for w in weights):
        wide = c
    has_weights = any(w is not None for w in weights)
    made = []
    for batch in batches:
        one = Batch(
            rows=np.full((b, r), batch[0].tiles[0].rows[0], np.int32),
            labels=np.full((b, c, r), -1, batch[0].tiles[0].labels.dtype),
            weights=np.ones((b, wide, r)) if has_weights else None,
            tile=np.zeros(b, np.int32),
            problem=np.full((t, c), p, np.int32),
            slots=np.zeros((p, s), np.int32),
            slot_used=np.zeros((p, s), bool),
            centre=np.zeros((g, q), np.int32),
            group=np.zeros(b, np.int32),
            owner=np.zeros(p, np.int32),
            used=np.zeros(b, bool),
        )
        block = number = offset = 0
        for h, (group, ids) in enumerate(batch):
            filled = np.zeros(len(ids), int)
            rows = np.concatenate([tile.rows for tile in group])
            one.centre[h] = rows[np.linspace(0, len(rows) - 1, q).astype(int)]
            one.owner[offset : offset + len(ids)] = h
            for tile in group:
                block = _fill(one, tile, block, number, h)
                own = np.searchsorted(ids, tile.problems)
                columns = np.arange(len(own))
                one.problem[number, columns] = offset + own
                one.slots[offset + own, filled[own]] = number * c + columns
                one.slot_used[offset + own, filled[own]] = True
                filled[own] += 1
                number += 1
            offset += len(ids)
        made.append(one)
    return made


def _fill(one: Batch, tile: Tile, block: int, number: int, group: int) -> int:
    """Deals a tile out to blocks from `block` on; returns the next free block."""
    b, r = len(tile.rows), one.rows.shape[1]
    count = -(-b // r)
    place = np.arange(count * r).reshape(count, r)
    real, place = place < b, place % b
    at = slice(block, block + count)
    one.rows[at] = tile.rows[place]
    columns = len(tile.problems)
    one.labels[at, :columns] = np.where(
        real[:, None], tile.labels[:, place].swapaxes(0, 1), -1
    )
    if tile.weights is not None and one.weights is not None:
        if tile.weights.ndim == 2:
            one.weights[at, :columns] = tile.weights[:, place].swapaxes(0, 1)
        else:
            one.weights[at] = tile.weights[place][:, None]
    one.tile[at], one.group[at], one.used[at] = number, group, True
    return block + count
