"""Many classification problems over shared rows: the data structure and its builders.

A problem says of each row: not mine (-1), or its class (0, 1, ...). Problems that read
the same rows stand together in a `Tile`, so that one product serves all of them; a
problem may spread over several tiles (the two classes of a one-vs-one pair).
Everything here is NumPy on the host: it decides which rows meet which problems, and
never touches the features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Tile(NamedTuple):
    """Rows that some problems share.

    rows:     `[r]` indices into the features.
    problems: `[c]` the problem each column belongs to.
    labels:   `[c, r]` class of the row in that problem; -1 where it takes no part.
    weights:  `[r]` or `[c, r]` sample weights >= 0; None means one.
    """

    rows: np.ndarray
    problems: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None


class Problems(NamedTuple):
    """`count` problems of `classes` classes, as tiles of rows x columns."""

    tiles: tuple[Tile, ...]
    count: int  # type: ignore[assignment]  # a tuple has a method of that name
    classes: int = 2


def independent(tasks: Sequence[tuple], *, classes: int = 2) -> Problems:
    """One problem per `(rows, labels)`; each has rows of its own.

    Labels are integers in 0..classes-1, or -1 for a row that is left out.

    Raises:
      ValueError: a task's labels are no such integers.
    """
    tiles = []
    for p, (rows, labels) in enumerate(tasks):
        labels, _ = _checked(labels, classes, f"`labels` of task {p}")
        labels = labels.astype(label_dtype(classes))
        tiles.append(Tile(np.asarray(rows), np.array([p]), labels[None]))
    return Problems(tuple(tiles), len(tiles), classes)


def multinomial(labels, *, classes: int | None = None) -> Problems:
    """One problem: `labels` `[n]` in 0..classes-1, all at once; -1 is left out.

    Raises:
      ValueError: `labels` are no such integers, or of fewer than two classes.
    """
    labels, classes = _checked(labels, classes, least=2)
    return independent([_labelled(labels)], classes=classes)


def one_vs_rest(labels, *, classes: int | None = None) -> Problems:
    """A problem per class of `labels` `[n]`: the class against all others.

    Labels are integers in 0..classes-1; rows with label -1 are left out. Problem c is
    class c.

    Raises:
      ValueError: `labels` are no such integers, or of no class.
    """
    labels, classes = _checked(labels, classes, least=1)
    rows, labels = _labelled(labels)
    columns = labels == np.arange(classes)[:, None]
    return Problems((Tile(rows, np.arange(classes), columns.astype(np.int8)),), classes)


def one_vs_one(labels, *, keep=None) -> Problems:
    """A problem per pair of classes a < b: 0 is class a, 1 is class b.

    `keep` `[s, n]` makes s draws: in draw s only its rows take part (seeds of a
    balanced subsample). Problems are ordered by draw, then by pair, pairs as in
    `numpy.triu_indices(classes, 1)`. Labels are integers from 0 on; rows with label -1
    are left out.

    Raises:
      ValueError: `labels` are no such integers, or of fewer than two classes; `keep`
        has another shape.
    """
    labels, classes = _checked(labels, None, least=2)
    if keep is None:
        keep = np.ones((1, len(labels)), bool)
    keep = np.asarray(keep, bool)
    if keep.ndim != 2 or keep.shape[1] != len(labels):
        raise ValueError(
            f"`keep` must be [s, n] with n = {len(labels)}; got shape {keep.shape}."
        )
    first, second = np.triu_indices(classes, 1)
    tiles = []
    for c in range(classes):
        rows = np.flatnonzero((labels == c) & keep.any(axis=0))
        pairs = np.flatnonzero((first == c) | (second == c))
        side = (second[pairs] == c).astype(np.int8)
        own = np.where(keep[:, None, rows], side[None, :, None], -1).astype(np.int8)
        problems = np.arange(len(keep))[:, None] * len(first) + pairs
        if len(rows) and len(pairs):
            tiles.append(Tile(rows, problems.ravel(), own.reshape(-1, len(rows))))
    return Problems(tuple(tiles), len(keep) * len(first))


def leave_folds_out(problems: Problems, folds, count: int | None = None) -> Problems:
    """Each problem becomes `count` problems, the f-th without the rows of fold f.

    `folds` is `[n]`, the fold of each row of the features, or one `[r]` array per tile
    (problems whose rows are drawn and folded on their own). Fold -1 is in every
    training set. Problem p without fold f is number `p * count + f`.

    Raises:
      ValueError: `folds` are no integers, or not one for each row; `count` < 1.
    """
    return _folded(problems, folds, count, held_out=False)


def repeated(problems: Problems, times: int) -> Problems:
    """The same problems `times` over, sharing rows: one copy per penalty, say.

    Copy t of problem p is number `t * count + p`.
    """
    shift = np.arange(times)[:, None] * problems.count
    tiles = []
    for tile in problems.tiles:
        weights = tile.weights
        if weights is not None and weights.ndim == 2:
            weights = np.tile(weights, (times, 1))
        tiles.append(
            Tile(
                tile.rows,
                (shift + tile.problems).ravel(),
                np.tile(tile.labels, (times, 1)),
                weights,
            )
        )
    return Problems(tuple(tiles), problems.count * times, problems.classes)


def concatenated(parts: Sequence[Problems]) -> Problems:
    """Several sets of problems as one; numbers continue from part to part.

    Raises:
      ValueError: the parts differ in their number of classes.
    """
    counts = {part.classes for part in parts}
    if len(counts) > 1:
        raise ValueError(f"`parts` must agree in their classes; got {sorted(counts)}.")
    tiles, count = [], 0
    for part in parts:
        tiles += [t._replace(problems=t.problems + count) for t in part.tiles]
        count += part.count
    return Problems(tuple(tiles), count, counts.pop() if counts else 2)


def weighted(problems: Problems, sample_weight) -> Problems:
    """The same problems with weight `sample_weight[i]` (`[n]`) on row i.

    Raises:
      ValueError: `sample_weight` is not one number for each row.
    """
    weights = _at_rows(
        "sample_weight", np.asarray(sample_weight, np.float64), problems.tiles
    )
    return problems._replace(
        tiles=tuple(
            tile._replace(weights=own) for tile, own in zip(problems.tiles, weights)
        )
    )


def _at_rows(name: str, values: np.ndarray, tiles: Sequence[Tile]) -> list[np.ndarray]:
    """Of `values` `[n]` those of each tile's rows."""
    least = 1 + max((int(t.rows.max()) for t in tiles if len(t.rows)), default=-1)
    if values.ndim != 1 or len(values) < least:
        raise ValueError(
            f"`{name}` must be [n], a value for each of the {least} rows or more that"
            f" `problems` are about; got shape {values.shape}."
        )
    return [values[tile.rows] for tile in tiles]


def _at_tiles(folds, tiles: Sequence[Tile]) -> list[np.ndarray]:
    """The fold of each row of each tile; `folds` is `[n]`, or an `[r]` for each."""
    if isinstance(folds, list | tuple) and any(np.ndim(fold) for fold in folds):
        parts = [np.asarray(fold) for fold in folds]
    elif np.ndim(folds) == 2:
        parts = list(np.asarray(folds))
    else:
        parts = _at_rows("folds", np.asarray(folds), tiles)
    if len(parts) != len(tiles):
        raise ValueError(
            f"`folds` must be [n], or an [r] for each of the {len(tiles)} tiles;"
            f" got {len(parts)} of them."
        )
    for i, (part, tile) in enumerate(zip(parts, tiles)):
        integers = np.issubdtype(part.dtype, np.integer) or part.size == 0
        if part.shape != tile.rows.shape or not integers:
            raise ValueError(
                f"`folds` of tile {i} must be integers, one for each of its"
                f" {len(tile.rows)} rows; got {part.dtype} {part.shape}."
            )
    return [part.astype(np.int64) for part in parts]


def _folded(problems: Problems, folds, count, *, held_out: bool) -> Problems:
    folds = _at_tiles(folds, problems.tiles)
    if count is None:
        count = 1 + max((int(fold.max(initial=-1)) for fold in folds), default=0)
    elif count < 1:
        raise ValueError(f"`count` must be an integer > 0; got {count}.")
    each = np.arange(count)
    tiles = []
    for tile, fold in zip(problems.tiles, folds):
        dropped = (fold == each[:, None]) ^ held_out
        labels = np.where(dropped[None], -1, tile.labels[:, None]).astype(
            tile.labels.dtype
        )
        weights = tile.weights
        if weights is not None and weights.ndim == 2:
            weights = np.repeat(weights, count, axis=0)
        tiles.append(
            Tile(
                tile.rows,
                (tile.problems[:, None] * count + each).ravel(),
                labels.reshape(-1, len(tile.rows)),
                weights,
            )
        )
    return Problems(tuple(tiles), problems.count * count, problems.classes)


def _checked(
    labels, classes: int | None, name: str = "`labels`", *, least: int = 0
) -> tuple[np.ndarray, int]:
    """Labels `[n]`, and how many classes they are of, `least` or more."""
    labels = np.asarray(labels)
    integers = np.issubdtype(labels.dtype, np.integer) or labels.size == 0
    if labels.ndim != 1 or not integers:
        raise ValueError(
            f"{name} must be integers [n], from 0 on, or -1 for a row without a class;"
            f" got {labels.dtype} {labels.shape}."
        )
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (-1, -1)
    if low < -1 or (classes is not None and high >= classes):
        limit = "" if classes is None else f" and below `classes` = {classes}"
        raise ValueError(f"{name} must be >= -1{limit}; got {low}..{high}.")
    if classes is None and high >= max(len(labels), 1000):
        raise ValueError(
            f"{name} must number the classes from 0 on; got {high} among {len(labels)}"
            f" labels. `np.unique(labels, return_inverse=True)` numbers them."
        )
    classes = high + 1 if classes is None else classes
    if classes < least:
        number = ("", "one class", "two classes")[least]
        raise ValueError(f"{name} must be of at least {number}; got {classes}.")
    return labels.astype(np.int64), classes


def _labelled(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.flatnonzero(labels >= 0)
    return rows, labels[rows]


def label_dtype(classes: int) -> type:
    """The integers that hold the labels of that many classes."""
    return np.int8 if classes <= 127 else np.int32


def only_folds(problems: Problems, folds, count: int | None = None) -> Problems:
    """The other side of `leave_folds_out`: problem p * count + f has fold f alone."""
    return _folded(problems, folds, count, held_out=True)


def check(problems: Problems, n: int) -> None:
    """`check_labels`, and that every problem has a row of each class."""
    short = np.flatnonzero(~(seen := check_labels(problems, n)).all(axis=1))
    if len(short):
        p = short[0]
        raise ValueError(
            f"Every problem needs a row of each class; problem {p} has none of class"
            f" {np.flatnonzero(~seen[p])[0]} ({len(short)} such problems)."
        )


def check_labels(problems: Problems, n: int) -> np.ndarray:
    """Which classes each problem has rows of, `[p, classes]`.

    Raises:
      ValueError: a tile breaks a rule; names the tile and the value.
    """
    if not isinstance(problems, Problems):
        raise ValueError(
            "`problems` must be Problems, as `one_vs_rest(labels)` returns; got"
            f" {type(problems).__name__}."
        )
    if problems.count < 1:
        raise ValueError(f"`problems.count` must be at least 1; got {problems.count}.")
    if problems.classes < 2:
        raise ValueError(
            f"`problems.classes` must be at least 2; got {problems.classes}."
        )
    seen = np.zeros((problems.count, problems.classes), bool)
    for t, (rows, columns, labels, weights) in enumerate(problems.tiles):
        where = f"tile {t} of `problems`"
        if labels.shape != (len(columns), len(rows)):
            raise ValueError(
                f"`labels` of {where} must be [columns, rows] ="
                f" {(len(columns), len(rows))}; got {labels.shape}."
            )
        for name, values, low, high in (
            ("rows", rows, 0, n - 1),
            ("problems", columns, 0, problems.count - 1),
            ("labels", labels, -1, problems.classes - 1),
        ):
            if not np.issubdtype(values.dtype, np.integer):
                raise ValueError(
                    f"`{name}` of {where} must be integers; got {values.dtype}."
                )
            if values.size and not (low <= values.min() and values.max() <= high):
                raise ValueError(
                    f"`{name}` of {where} must be in [{low}, {high}];"
                    f" got {values.min()}..{values.max()}."
                )
        if len(np.unique(columns)) < len(columns):
            raise ValueError(f"`problems` of {where} must name each problem once.")
        used = labels >= 0
        if weights is not None:
            if weights.shape not in ((len(rows),), labels.shape):
                raise ValueError(
                    f"`weights` of {where} must be [rows] or [columns, rows];"
                    f" got {weights.shape}."
                )
            if not (np.isfinite(weights).all() and (weights >= 0).all()):
                raise ValueError(f"`weights` of {where} must be finite and >= 0.")
            used = used & (weights > 0)
        for k in range(problems.classes):
            seen[columns, k] |= ((labels == k) & used).any(axis=1)
    return seen
