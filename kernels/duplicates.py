"""Identical rows, found once: only one of each takes part in a search.

Vocabularies hold thousands of identical rows (unused tokens). As rows of a search each
of them would be a candidate of all the others.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

from . import ranking, scaled

_COMPARED = 1024  # pairs of rows compared together


class Groups(NamedTuple):
    """Valid rows by equality.

    Attributes:
      first: the lowest row id of each group, ascending.
      of_row: the group of each row; -1 for rows that are not valid.
      members: row ids, group after group, ascending within.
      start: where each group begins in `members`.
      size: how many rows each group has.
    """

    first: np.ndarray
    of_row: np.ndarray
    members: np.ndarray
    start: np.ndarray
    size: np.ndarray


def group(values: Float[Array, "n d"], valid: np.ndarray) -> Groups:
    """The groups of equal rows among the valid ones."""
    n = len(valid)
    keys = np.zeros(n, np.uint64)
    for at, height in scaled.spans(*values.shape):
        hashes = np.asarray(_hashes(values, at, height)).astype(np.uint64)
        keys[at : at + height] = (hashes[0] << np.uint64(32)) | hashes[1]
    rows = np.flatnonzero(valid)
    rows = rows[np.argsort(keys[rows], kind="stable")]
    same = keys[rows[1:]] == keys[rows[:-1]]
    # Equal hashes are a conjecture. Rows that differ from the one before them begin a
    # group of their own: a collision costs time, never correctness.
    doubtful = np.flatnonzero(same)
    for at in range(0, len(doubtful), _COMPARED):
        part = doubtful[at : at + _COMPARED]
        filled = np.resize(part, _COMPARED)  # one program for all
        equal = _rows_equal(values, rows[filled], rows[filled + 1])
        same[part] = np.asarray(equal)[: len(part)]
    begins = np.concatenate([[True], ~same])[: len(rows)]
    start = np.flatnonzero(begins)
    first = rows[start]
    ascending = np.argsort(first, kind="stable")
    size = np.diff(np.concatenate([start, [len(rows)]]))
    of_row = np.full(n, -1, np.int64)
    of_row[rows] = np.argsort(ascending)[np.cumsum(begins) - 1] if len(rows) else -1
    return Groups(first[ascending], of_row, rows, start[ascending], size[ascending])


@jax.jit
def _rows_equal(values, a, b):
    return (values[a] == values[b]).all(axis=1)


@functools.partial(jax.jit, static_argnames="size")
def _hashes(values: Float[Array, "n d"], start, size) -> UInt[Array, "2 b"]:
    """Two sums of the rows' bits times odd numbers: exact, in whatever order."""
    values = jax.lax.dynamic_slice_in_dim(values, start, size)
    values = jnp.where(values == 0, 0.0, values)  # -0.0 is equal and must hash so
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    bits ^= bits >> 15  # low bits of a float are often zero
    odd = np.random.default_rng(0).integers(2**31, size=(2, 1, values.shape[1])) * 2 + 1
    sums = [jnp.sum(bits * factor, axis=1) for factor in odd.astype(np.uint32)]
    return jnp.stack(sums)


def spread(ranks: np.ndarray, groups: Groups, width: int) -> np.ndarray:
    """Ranks of all keys from ranks of the first of each group: `[n, width]`, sorted.

    A group enters whole, as far as there is room; among equally close groups the
    lower ids enter, whichever group they are from. For that `ranks` holds as many
    groups as there is room for keys, or all of them.
    """
    closeness, ids = ranking.decode(ranks)
    group = groups.of_row[np.maximum(ids, 0)]
    size = np.where(ids >= 0, groups.size[group], 0)
    before = np.cumsum(size, axis=1) - size
    taken = np.clip(width - before, 0, size)
    row = np.repeat(np.arange(len(ranks)), taken.sum(axis=1))
    flat = taken.reshape(-1)
    source = np.repeat(np.arange(flat.size), flat)
    nth = np.arange(len(source)) - (np.cumsum(flat) - flat)[source]
    member = groups.members[groups.start[group.reshape(-1)[source]] + nth]
    out = np.full((len(ranks), width), ranking.EMPTY)
    place = before.reshape(-1)[source] + nth
    out[row, place] = ranking.encode(closeness.reshape(-1)[source], member)

    # Where the last group that enters is as close as another, ids decide.
    last = np.maximum((taken > 0).sum(axis=1) - 1, 0)
    at_cut = closeness == np.take_along_axis(closeness, last[:, None], axis=1)
    for i in np.flatnonzero((at_cut & (size > 0)).sum(axis=1) > 1):
        if (size[i] * at_cut[i]).max() == 1:
            continue
        tied = [
            groups.members[
                groups.start[g] : groups.start[g] + min(groups.size[g], width)
            ]
            for g in group[i][at_cut[i]]
        ]
        members = np.sort(np.concatenate(tied))
        first = int(before[i][at_cut[i]].min())
        value = np.repeat(closeness[i, last[i]], len(members))
        chosen = ranking.encode(value, members)[: width - first]
        out[i, first : first + len(chosen)] = chosen
    return np.sort(out, axis=1)
