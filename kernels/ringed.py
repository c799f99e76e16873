"""Exact neighbours over a mesh: blocks of keys go round, and every visit is certified.

Each visit is a search of its own (`topk`) whose result is exact for that block of
keys, as far as they reach the row's k best so far: merging by pair score and index is
all that is left. Where all rows look for each other a product serves both of its
sides: after its own block a device meets those of the next floor(P/2) devices, and
what a visitor finds travels with it, then home. With P even the last of them meet
twice, and each of the two takes half.

Rows that were given in bfloat16 travel in bfloat16.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from . import mesh as meshes
from . import pairs, topk


class Best(NamedTuple):
    """The closest keys so far, best first.

    Attributes:
      closeness: pair scores; NaN where there is no key.
      ids: -1 where there is no key.
      unproved: rows that some search had to rescue.
    """

    closeness: Float[Array, "n k"]
    ids: Int[Array, "n k"]
    unproved: Bool[Array, " n"]


class Ringed(NamedTuple):
    """`Best` of all rows on every device, and the exponents of their scores."""

    best: Best
    exponent: Int[Array, " n"]


@functools.partial(jax.jit, static_argnames=("n", "mesh", "k", "metric"))
def nearest(
    queries: Float[Array, "a d"],
    keys: Float[Array, "b d"],
    *,
    n: int,
    mesh: Mesh,
    k: int,
    metric: pairs.Metric,
) -> Ringed:
    """The k closest keys of the first `n` queries; both sides are shared out.

    Rows of NaN, which are nobody's neighbours, fill the parts up.
    """
    rows, others = pairs.prepare(queries, keys, metric)
    size = mesh.size

    def search(rows, others):
        part = others.valid.shape[0]

        rows, others = _canonical(rows), _canonical(others)

        def visit(best, block, origin):
            found = topk.search(rows, block, k=k, metric=metric, floor=_floor(best))
            return _merged(best, _scored(found, rows, block, origin * part, metric))

        return meshes.ring(visit, _none(rows, k), others, size, passed=_passed)

    found = meshes.on_each(search, mesh, meshes.ROWS)(rows, others)
    exponent = rows.exponent + others.exponent[:1]
    return _whole(Ringed(found, exponent), n, mesh)


@functools.partial(
    jax.jit, static_argnames=("n", "mesh", "k", "metric", "include_self")
)
def all_pairs(
    x: Float[Array, "a d"],
    *,
    n: int,
    mesh: Mesh,
    k: int,
    metric: pairs.Metric,
    include_self: bool,
) -> Ringed:
    """The k closest rows of `x` for each of its first `n` rows; `x` is shared out.

    Rows of NaN fill the parts up, which are of even length.
    """
    rows, _ = pairs.prepare(x, x, metric, one_scale=True)
    search = functools.partial(
        _all_pairs, size=mesh.size, k=k, metric=metric, include_self=include_self
    )
    found = meshes.on_each(search, mesh, meshes.ROWS)(rows)
    return _whole(Ringed(found, 2 * rows.exponent), n, mesh)


class _Visitor(NamedTuple):
    """A block of rows on its way, and the closeness that k rows at home reach."""

    rows: pairs.Rows
    floor: Float[Array, " n"]


def _all_pairs(rows, *, size, k, metric, include_self):
    part = rows.valid.shape[0]
    me = meshes.here()
    rows = _canonical(rows)
    found = topk.search_own(rows, k=k, metric=metric, include_self=include_self)
    best = _scored(found, rows, rows, me * part, metric)
    if size == 1:
        return best

    def meet(a, b, floors):
        return topk.search_both(a, b, k=k, metric=metric, floors=floors)

    def both(best, visitor, travelling, origin):
        block = visitor.rows
        floors = _floor(best), jnp.maximum(visitor.floor, _floor(travelling))
        of_rows, of_block = meet(rows, block, floors)
        here = _scored(of_rows, rows, block, origin * part, metric)
        there = _scored(of_block, block, rows, me * part, metric)
        return _merged(best, here), _merged(travelling, there)

    def step(s, state):
        best, visitor, travelling = state
        coming = pass_on(visitor)
        best, travelling = both(best, visitor, travelling, (me + s) % size)
        return best, coming, meshes.passed(travelling, size)

    def pass_on(visitor):
        floor = meshes.passed(visitor.floor, size)
        return _Visitor(_passed(visitor.rows, size), floor)

    visitor = pass_on(_Visitor(rows, _floor(best)))
    last = size // 2
    state = best, visitor, meshes.varying(_none(rows, k))
    if last > 1:
        state = lax.fori_loop(1, last, step, state)
    best, visitor, travelling = state
    origin = (me + last) % size
    if size % 2:
        best, travelling = both(best, visitor, travelling, origin)
    else:
        # Both partners are here and there. The whole of the lower one meets the first
        # half of the upper one on the lower one, the second on the upper one.
        half = part // 2
        lower = me < last
        block = visitor.rows

        def chosen(yes, no):
            return jax.tree.map(lambda a, b: jnp.where(lower, a, b), yes, no)

        def cut(tree, start, stop):
            return jax.tree.map(lambda x: x[start:stop], tree)

        mine = rows, _floor(best)
        theirs = block, jnp.maximum(visitor.floor, _floor(travelling))
        whole, of_whole = chosen(mine, theirs)
        some, of_some = chosen(cut(theirs, 0, half), cut(mine, half, part))
        of_whole, of_some = meet(whole, some, (of_whole, of_some))
        first = jnp.where(lower, origin * part, me * part + half)
        of_whole = _scored(of_whole, whole, some, first, metric)
        first = jnp.where(lower, me * part, origin * part)
        of_some = _scored(of_some, some, whole, first, metric)
        nothing = _none(some, k)
        of_some = chosen(_stacked(of_some, nothing), _stacked(nothing, of_some))
        best = _merged(best, chosen(of_whole, of_some))
        travelling = _merged(travelling, chosen(of_some, of_whole))
    return _merged(best, meshes.passed(travelling, size, -last))


def _canonical(rows: pairs.Rows) -> pairs.Rows:
    """Rows as they are after a journey: the two ends of a pair score it alike."""
    if rows.significand is None:
        return rows
    divisor = rows.significand[:, None]
    # Compilers may drop a conversion there and back; they may not drop this.
    near = lax.reduce_precision(rows.values * divisor, 8, 7) / divisor
    there = lax.stop_gradient(near - rows.values)  # exact, as they are so close
    return rows._replace(values=rows.values + there)


def _passed(rows: pairs.Rows, size: int) -> pairs.Rows:
    """`mesh.passed`; rows that were given in bfloat16 travel in as few bits."""
    if rows.significand is None:
        return meshes.passed(rows, size)
    values, significand = _sent(rows.values, rows.significand, size)
    valid, exponent = meshes.passed((rows.valid, rows.exponent), size)
    return pairs.Rows(values, valid, exponent, significand)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _sent(values, significand, size):
    short = (values * significand[:, None]).astype(jnp.bfloat16)
    short, significand = meshes.passed((short, significand), size)
    return short.astype(jnp.float32) / significand[:, None], significand


@_sent.defjvp
def _sent_jvp(size, primals, tangents):
    # Derivatives travel in float32.
    return _sent(*primals, size), meshes.passed(tuple(tangents), size)


def _floor(best: Best) -> Float[Array, " n"]:
    """The closeness that k keys reach; minus infinity where there are fewer."""
    last = lax.stop_gradient(best.closeness[:, -1])
    return jnp.where(best.ids[:, -1] < 0, -jnp.inf, last)


def _none(rows: pairs.Rows, k: int) -> Best:
    n = rows.valid.shape[0]
    return Best(
        jnp.full((n, k), jnp.nan), jnp.full((n, k), -1, jnp.int32), jnp.zeros(n, bool)
    )


def _stacked(a: Best, b: Best) -> Best:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), a, b)


def _scored(found: topk.Found, rows, block, first, metric) -> Best:
    """What was found among a block's rows, whose first one has the id `first`."""
    closeness = topk.scored(rows, block, found, metric)
    empty = found.indices < 0
    return Best(
        jnp.where(empty, jnp.nan, closeness),
        jnp.where(empty, -1, found.indices + first),
        found.unproved,
    )


def _merged(a: Best, b: Best) -> Best:
    """The best of both: by closeness, then by the lower id."""
    closeness = jnp.concatenate([a.closeness, b.closeness], axis=1)
    ids = jnp.concatenate([a.ids, b.ids], axis=1)
    last = jnp.iinfo(ids.dtype).max
    cost = jnp.where(ids < 0, jnp.inf, -closeness)
    order = jnp.where(ids < 0, last, ids)
    found = lax.sort((cost, order, closeness), dimension=1, num_keys=2)
    _, order, closeness = (part[:, : a.ids.shape[1]] for part in found)
    return Best(closeness, jnp.where(order == last, -1, order), a.unproved | b.unproved)


def _whole(found: Ringed, n: int, mesh: Mesh) -> Ringed:
    return meshes.everywhere(jax.tree.map(lambda x: x[:n], found), mesh)
