"""Walk the tiles of `queries @ keys.T` once and reduce each row as they pass.

A reducer is four pure functions over a small carry. Because `merge` is associative
and commutative, several devices are a merge over the mesh, a matrix larger than
memory is a merge over chunks, and resuming is keeping the chunks that are done.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, Int

from . import mesh as meshes
from . import numerics, visits


class Reducer(NamedTuple):
    """What to keep of each row of scores, as four pure functions.

    Attributes:
      init: row ids `[r]` -> carry of rows that have seen no key. Data that belongs to
        a row (a threshold) is looked up here and travels in the carry.
      update: carry, scores `[r, t]` float32, key ids `[t]` -> carry.
      merge: the carries of two disjoint sets of keys -> the carry of their union;
        associative and commutative (sums to rounding).
      finish: carry -> result, with leading axis `[r]` in each of its arrays.
    """

    init: Callable[[Int[Array, " r"]], Any]
    update: Callable[[Any, Float[Array, "r t"], Int[Array, " t"]], Any]
    merge: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any]


def reduce_scores(
    queries: ArrayLike,
    keys: ArrayLike,
    reducers: Any,
    *,
    tile: int = 4096,
    rows: int = 512,
    score: Callable[..., Array] | None = None,
    mesh: Mesh | None = None,
    block: int | None = None,
) -> Any:
    """Every reducer's result over all keys, one walk over the scores for all of them.

    Equivalent, for each reducer, to

        scores = queries.astype(float32) @ keys.astype(float32).T
        carry = reducer.update(reducer.init(arange(n)), scores, arange(m))
        result = reducer.finish(carry)

    with at most `rows x tile` scores alive at a time, in the gradient too.

    Args:
      queries: `[n, d]`, floating.
      keys: `[m, d]`, floating.
      reducers: a `Reducer`, or any tree of them (tuple, dictionary).
      tile: keys per tile.
      rows: queries per tile.
      score: `(queries [r, d], keys [t, d]) -> scores [r, t]` in float32; the product
        accumulated in float32 when None.
      mesh: shares the rows of both sides out over these devices, whatever their
        number; blocks of keys go round them, and every device ends with the whole
        result. With several processes each passes the same arrays.
      block: keys that are on the device together, for those that outgrow it: `keys`
        (NumPy, or a memory map) stay on the host, and while a block is scored the
        next one is on its way. Not with a `mesh`.

    Returns:
      The results, in a tree like `reducers`.

    Raises:
      ValueError: the two sides have other ranks or widths, or a tile is not positive.
    """
    if block is not None:
        if mesh is not None:
            raise ValueError("`block` and `mesh` exclude each other.")
        knobs = {"tile": tile, "rows": rows, "score": score}
        return _visited(queries, keys, reducers, block, **knobs)
    if mesh is not None:
        return _over_mesh(queries, keys, reducers, mesh, tile, rows, score)
    return finish_scores(
        reducers,
        accumulate_scores(
            queries, keys, reducers, tile=tile, rows=rows, score=score, first_key=0
        ),
    )


def accumulate_scores(
    queries: ArrayLike,
    keys: ArrayLike,
    reducers: Any,
    *,
    first_key: int | Int[Array, ""] = 0,
    tile: int = 4096,
    rows: int = 512,
    score: Callable[..., Array] | None = None,
) -> Any:
    """The carries of `reduce_scores` before `finish`; keys may be one chunk of all.

    `first_key` is the id of the chunk's first key; it may be traced, as under
    `shard_map`. Join chunks with `merge_scores`, then call `finish_scores`.
    """
    queries, keys = jnp.asarray(queries), jnp.asarray(keys)
    _check(queries, keys, tile, rows)
    row_ids = jnp.arange(queries.shape[0], dtype=jnp.int32)
    return _accumulated(
        row_ids,
        queries,
        keys,
        first_key,
        reducers=reducers,
        tile=tile,
        rows=rows,
        score=score,
    )


def _check(queries: Any, keys: Any, tile: int, rows: int) -> None:
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(
            "`queries` and `keys` must be [n, d] and [m, d] with one d;"
            f" got {queries.shape} and {keys.shape}."
        )
    for name, size in (("tile", tile), ("rows", rows)):
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1; got {size}.")


def _accumulated(row_ids, queries, keys, first_key, *, reducers, tile, rows, score):
    score = score or numerics.scores_f32
    n = queries.shape[0]

    def block(row_ids, block_queries):
        return _walk(reducers, score, row_ids, block_queries, keys, first_key, tile)

    whole = n // rows * rows
    parts = []
    if whole:
        shape = (whole // rows, rows)
        carries = lax.map(
            lambda xs: block(*xs),
            (row_ids[:whole].reshape(shape), queries[:whole].reshape(*shape, -1)),
        )
        parts.append(jax.tree.map(lambda c: c.reshape(whole, *c.shape[2:]), carries))
    if whole < n or n == 0:
        parts.append(block(row_ids[whole:], queries[whole:]))
    return jax.tree.map(lambda *cs: jnp.concatenate(cs), *parts)


def _visited(queries, keys, reducers, block, **knobs):
    visits.check_block(block, queries, keys)
    queries = jnp.asarray(queries)
    accumulate = functools.partial(accumulate_scores, reducers=reducers, **knobs)
    first = jax.jit(accumulate)
    more = jax.jit(
        lambda carry, *new, **at: merge_scores(reducers, carry, accumulate(*new, **at)),
        donate_argnums=0,
    )

    def step(carry, keys, start):
        if carry is None:
            return first(queries, keys, first_key=start)
        return more(carry, queries, keys, first_key=start)

    keys = keys if hasattr(keys, "dtype") else jnp.asarray(keys)
    carry = visits.visit(keys, block, step, None)
    carry = accumulate(queries, keys[:0]) if carry is None else carry
    return finish_scores(reducers, carry)


def _over_mesh(queries, keys, reducers, mesh, tile, rows, score):
    queries, keys = (
        x if hasattr(x, "dtype") else jnp.asarray(x) for x in (queries, keys)
    )
    _check(queries, keys, tile, rows)
    mesh = meshes.line(mesh)
    n, m = queries.shape[0], keys.shape[0]
    # Reducers need not know of keys that fill a part up, so there are none: what is
    # left over of an even division is on every device.
    even = m // mesh.size * mesh.size
    accumulate = functools.partial(
        _accumulated, reducers=reducers, tile=tile, rows=rows, score=score
    )

    def share(queries, keys, rest):
        part = queries.shape[0]
        ids = meshes.here() * part + jnp.arange(part, dtype=jnp.int32)
        ids = jnp.minimum(ids, n - 1)

        def visit(carry, block, origin):
            new = accumulate(ids, queries, block, origin * block.shape[0])
            return merge_scores(reducers, carry, new)

        carry = accumulate(ids, queries, rest, even)
        if even:
            carry = meshes.ring(visit, carry, keys, mesh.size)
        return finish_scores(reducers, carry)

    @jax.jit
    def reduced(*arrays):
        inputs = meshes.ROWS, meshes.ROWS, meshes.EVERYWHERE
        found = meshes.on_each(share, mesh, inputs)(*arrays)
        return meshes.everywhere(jax.tree.map(lambda x: x[:n], found), mesh)

    with meshes.entered(mesh, queries, keys):
        return reduced(
            meshes.share(queries, mesh),
            meshes.share(keys[:even], mesh) if even else None,
            meshes.copy(keys[even:], mesh),
        )


def merge_scores(reducers: Any, a: Any, b: Any) -> Any:
    """The carries of the union of two disjoint chunks of keys."""
    return _each(reducers, lambda reducer, *c: reducer.merge(*c), a, b)


def finish_scores(reducers: Any, carries: Any) -> Any:
    """The results that belong to `carries`."""
    return _each(reducers, lambda reducer, carry: reducer.finish(carry), carries)


def _is_reducer(node: Any) -> bool:
    return isinstance(node, Reducer)


def _each(reducers: Any, function: Callable[..., Any], *trees: Any) -> Any:
    return jax.tree.map(function, reducers, *trees, is_leaf=_is_reducer)


def _walk(reducers, score, row_ids, queries, keys, first_key, tile):
    """The carries of one block of rows after all tiles of keys, the last one ragged."""
    m = keys.shape[0]

    # Without this the backward pass would keep the scores of every tile.
    @jax.checkpoint
    def update(carries, start, tile_keys):
        scores = score(queries, tile_keys)
        key_ids = start + jnp.arange(tile_keys.shape[0], dtype=jnp.int32)
        return _each(reducers, lambda r, c: r.update(c, scores, key_ids), carries)

    carries = _each(reducers, lambda reducer: reducer.init(row_ids))
    if m == 0:
        return carries
    # The first tile stands outside of the scan: under shard_map a carry must enter
    # the loop varying over the same mesh axes as it leaves it.
    first = min(tile, m)
    carries = update(carries, jnp.int32(first_key), keys[:first])
    whole = (m - first) // tile
    if whole:
        starts = first_key + first + tile * jnp.arange(whole, dtype=jnp.int32)
        tiles = keys[first : first + whole * tile].reshape(whole, tile, -1)
        carries, _ = lax.scan(
            lambda c, x: (update(c, *x), None), carries, (starts, tiles)
        )
    rest = first + whole * tile
    if rest < m:
        carries = update(carries, jnp.int32(first_key + rest), keys[rest:])
    return carries
