"""Who is near whom: exact nearest neighbours, and what is read off their lists."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from . import concrete, dispatch, pairs, ringed, topk, visits
from . import mesh as meshes


class Neighbors(NamedTuple):
    """The k closest keys of each query, best first; ties go to the lower index.

    Attributes:
      scores: float32, in the metric's direction: cosine and dot descend, l2 (the
        squared distance) ascends. NaN where there is no neighbour.
      indices: int32. -1 where there is no neighbour: beyond the last valid key, and in
        the whole row of an invalid query (NaN or Inf; zero under cosine).
    """

    scores: Float[Array, "n k"]
    indices: Int[Array, "n k"]


class Proof(NamedTuple):
    """How the neighbours of each query were shown to be the true ones.

    Attributes:
      unproved: rows that the filter's bound could not decide, and that were therefore
        searched again, pair by pair where needed. Their mean is the share of rows
        that fell back. All rows are exact.
    """

    unproved: Bool[Array, " n"]


def nearest_neighbors(
    queries: ArrayLike,
    keys: ArrayLike,
    *,
    k: int,
    metric: str = "cosine",
    mesh: Mesh | None = None,
    block: int | None = None,
    implementation: str | None = None,
    with_proof: bool = False,
) -> Any:
    """The k closest keys of each query, exactly.

    Equivalent, for cosine, to

        scores = unit(queries) @ unit(keys).T          # float32
        scores, indices = lax.top_k(scores, k)

    without ever holding the scores. Products run at any precision and tiling as a
    filter only: every returned score is a float32 sum over one pair of rows, and the
    k returned are the true ones within the rounding of that sum,
    `1.01 (d + 6) 2**-24 |x| |y|` (with `(|x| + |y|)**2` for l2), proved row by row.

    Entries share a power-of-two scale, and what is far below the largest of them
    underflows. With X and Y the largest |entry| of finite queries and keys, l2 may err
    by another `d 2**-223 max(X, Y)**2`, and dot by `d 2**-223 X Y` and
    `2**-175 sum_i (Y |x_i| + X |y_i|)`: rows closer than about 4e-34 of the largest
    entry have distance 0 and rank by index. Subnormal entries and scores (below
    2**-126) may count as zero, whatever the metric.

    Args:
      queries: `[n, d]`, floating (float64 is rounded to float32).
      keys: `[m, d]`, floating.
      k: how many neighbours, at least 1. Slots beyond the last valid key stay empty.
      metric: "cosine", "dot", or "l2" (squared Euclidean distance, ascending).
      mesh: shares the rows of both sides out over these devices, whatever their
        number; blocks of keys go round them. Every device ends with the whole result.
        With several processes each passes the same arrays.
      block: keys that are on the device together, for those that outgrow it: `keys`
        (NumPy, or a memory map) stay on the host, and while a block is searched the
        next one is on its way.
      implementation: "traced" is one compiled program, for use inside jit, vmap, grad
        and shard_map; "streamed" is driven from the host, for concrete arrays, and
        the fastest on a CPU; None chooses.
      with_proof: return `(Neighbors, Proof)`.

    Returns:
      `Neighbors`, `[n, k]`. Invalid keys (NaN, Inf; zero rows under cosine) are
      nobody's neighbour. Scores have gradients with respect to both sides.

    Raises:
      ValueError: an argument has the wrong shape, dtype or value.
    """
    x, y = _matrix("queries", queries), _matrix("keys", keys)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            "`queries` and `keys` must have the same number of columns;"
            f" got {x.shape} and {y.shape}."
        )
    _check(k, metric)
    if block is not None:
        visits.check_block(block, x, y)
        knobs = {"k": k, "metric": metric, "mesh": mesh}
        found = _visited(x, y, block, implementation=implementation, **knobs)
    elif mesh is not None:
        _check_traced(implementation)
        found = _meshed_nearest(x, y, k=k, metric=metric, mesh=mesh)
    else:
        chosen = dispatch.select("nearest_neighbors", _NEAREST, implementation, _ORDER)
        found = chosen(x, y, k=k, metric=metric, named=implementation)
    return found if with_proof else found[0]


def all_pairs_neighbors(
    x: ArrayLike,
    *,
    k: int,
    metric: str = "cosine",
    include_self: bool = False,
    mesh: Mesh | None = None,
    implementation: str | None = None,
    with_proof: bool = False,
) -> Any:
    """The k closest rows of `x` for each of its rows, exactly.

    As `nearest_neighbors(x, x, ...)`; without `include_self` a row is not among its
    own neighbours (a copy of it elsewhere is). About half of the products of that call
    are made, as one tile serves both of its sides: with a `mesh` of P devices each
    multiplies its rows with those of about P / 2. Scores err as there, with X = Y the
    largest finite |entry| of `x`.

    Raises:
      ValueError: an argument has the wrong shape, dtype or value.
    """
    x = _matrix("x", x)
    _check(k, metric)
    knobs = {"k": k, "metric": metric, "include_self": include_self}
    if mesh is not None:
        _check_traced(implementation)
        found = _meshed_all_pairs(x, **knobs, mesh=mesh)
    else:
        chosen = dispatch.select(
            "all_pairs_neighbors", _ALL_PAIRS, implementation, _ORDER
        )
        found = chosen(x, **knobs, named=implementation)
    return found if with_proof else found[0]


def cross_neighbors(
    a: ArrayLike,
    b: ArrayLike,
    *,
    k: int,
    metric: str = "cosine",
    best_a: Any = None,
    best_b: Any = None,
    implementation: str | None = None,
) -> tuple[Neighbors, Neighbors]:
    """The k closest rows of `b` for each of `a`, and of `a` for each of `b`, exactly.

    Equivalent to `nearest_neighbors(a, b, ...), nearest_neighbors(b, a, ...)`, from one
    product: the step of a search over a matrix of many panels.

    `best_a` and `best_b` are the k `Neighbors` that each row has from elsewhere. What
    could not enter them may be left out of the result (those slots stay empty), which
    spares "streamed" most of the work ("traced" leaves nothing out): merge the two with
    `merge_neighbors`.

    Raises:
      ValueError: an argument has the wrong shape, dtype or value.
    """
    x, y = _matrix("a", a), _matrix("b", b)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            "`a` and `b` must have the same number of columns;"
            f" got {x.shape} and {y.shape}."
        )
    _check(k, metric)
    for name, best, rows in (("best_a", best_a, x), ("best_b", best_b, y)):
        if best is not None and best.scores.shape != (rows.shape[0], k):
            raise ValueError(
                f"`{name}` must hold [{rows.shape[0]}, {k}] neighbours;"
                f" got {best.scores.shape}."
            )
    chosen = dispatch.select("cross_neighbors", _CROSS, implementation, _ORDER)
    return chosen(x, y, best_a, best_b, k=k, metric=metric, named=implementation)


def csls_neighbors(
    queries: ArrayLike,
    keys: ArrayLike,
    *,
    k: int,
    neighborhood: int = 10,
    implementation: str | None = None,
) -> Neighbors:
    """The k closest keys of each query, corrected for crowded neighbourhoods.

        CSLS(x, y) = 2 cos(x, y) - r_Y(x) - r_X(y)

    where `r_Y(x)` is the mean cosine of `x` to its `neighborhood` nearest keys, and
    `r_X(y)` that of `y` to its nearest queries (to all of them where there are fewer).
    Conneau et al., 2018, https://arxiv.org/abs/1710.04087, eq. 5.

    Raises:
      ValueError: an argument has the wrong shape, dtype or value.
    """
    queries, keys = _matrix("queries", queries), _matrix("keys", keys)
    _check(neighborhood, "cosine", name="neighborhood")

    def crowding(rows, others):
        found = nearest_neighbors(
            rows, others, k=neighborhood, implementation=implementation
        )
        mean = jnp.nanmean(found.scores, axis=1, keepdims=True)
        return jnp.where(jnp.isnan(mean), 0.0, mean)

    r_x, r_y = crowding(queries, keys), crowding(keys, queries)
    x, y = pairs.prepare(jnp.asarray(queries), jnp.asarray(keys), "cosine")
    # One inner product holds both terms that depend on the key: [2x, -1] . [y, r_y].
    # Rows that cosine calls invalid must stay so.
    left = jnp.concatenate([2 * x.values, -jnp.ones_like(r_x)], axis=1)
    right = jnp.concatenate([y.values, r_y], axis=1)
    found = nearest_neighbors(
        jnp.where(x.valid[:, None], left, jnp.nan),
        jnp.where(y.valid[:, None], right, jnp.nan),
        k=k,
        metric="dot",
        implementation=implementation,
    )
    # Rounding may make scores equal that differed before.
    return _ordered(found._replace(scores=found.scores - r_x), "dot")


def merge_neighbors(a: Neighbors, b: Neighbors, *, metric: str = "cosine") -> Neighbors:
    """The neighbours among the union of two disjoint sets of keys, from those of each.

    Keeps as many as the wider of the two. Associative and commutative, because the
    order (closeness, then index) is total.

    Raises:
      ValueError: the two describe different numbers of queries.
    """
    pairs.check_metric(metric)
    a, b = (Neighbors(*(jnp.asarray(x) for x in side)) for side in (a, b))
    if a.indices.shape[0] != b.indices.shape[0]:
        raise ValueError(
            "`a` and `b` must have the same number of rows;"
            f" got {a.indices.shape[0]} and {b.indices.shape[0]}."
        )
    joined = Neighbors(*(jnp.concatenate(pair, axis=1) for pair in zip(a, b)))
    width = max(a.indices.shape[1], b.indices.shape[1])
    return Neighbors(*(x[:, :width] for x in _ordered(joined, metric)))


def mutual_neighbors(
    forward: ArrayLike, backward: ArrayLike | None = None
) -> Bool[Array, "n k"]:
    """Which neighbours return the favour: j is in i's list and i is in j's.

    `forward` `[n, k]` holds indices of keys per query, `backward` `[m, j]` indices of
    queries per key; the same lists when None (all pairs). False at empty slots, and
    where `backward` has no such key.

    Raises:
      ValueError: an argument has the wrong shape or dtype.
    """
    forward = _lists("forward", forward)
    backward = forward if backward is None else _lists("backward", backward)
    if forward.ndim != 2 or backward.ndim != 2:
        raise ValueError(
            "`forward` and `backward` must be lists of neighbours, [n, k];"
            f" got {forward.shape} and {backward.shape}."
        )
    n = forward.shape[0]
    if 0 in forward.shape or 0 in backward.shape:
        return jnp.zeros(forward.shape, bool)
    me = jnp.arange(n, dtype=forward.dtype)[:, None]

    def slot(theirs):
        returned = (backward[jnp.maximum(theirs, 0)] == me).any(axis=1)
        return returned & (theirs >= 0) & (theirs < len(backward))

    return lax.map(slot, forward.T).T


def k_occurrence(indices: ArrayLike, keys: int) -> Int[Array, " m"]:
    """In how many of the lists `indices` `[n, k]` each of `keys` keys appears: N_k.

    Radovanovic et al., Hubs in Space, JMLR 11, 2010. Empty slots count for nobody, nor
    do indices that are no key's.

    Raises:
      ValueError: an argument has the wrong dtype or value.
    """
    _check_count("keys", keys, 0)
    flat = _lists("indices", indices).reshape(-1)
    # A negative index would count from the end; one past the end is dropped.
    slots = jnp.where(flat < 0, keys, flat)
    return jnp.zeros(keys, jnp.int32).at[slots].add(1, mode="drop")


def _ordered(found: Neighbors, metric: str) -> Neighbors:
    """Best first; equal scores by index; empty slots last."""
    empty = found.indices < 0
    cost = found.scores if metric == "l2" else -found.scores
    cost = jnp.where(empty, jnp.inf, cost)
    last = jnp.iinfo(found.indices.dtype).max
    order = jnp.where(empty, last, found.indices)
    _, order, scores = lax.sort((cost, order, found.scores), dimension=1, num_keys=2)
    empty = order == last
    return Neighbors(jnp.where(empty, jnp.nan, scores), jnp.where(empty, -1, order))


def _matrix(name: str, x: ArrayLike) -> Any:
    """`x` as it is where it has a dtype (it may be a memory map), checked."""
    matrix: Any = x if hasattr(x, "dtype") else jnp.asarray(x)
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise ValueError(f"`{name}` must be floating; got {matrix.dtype}.")
    if matrix.ndim != 2:
        raise ValueError(
            f"`{name}` must be [rows, features]; got shape {matrix.shape}."
        )
    return matrix


def _lists(name: str, indices: Any) -> Int[Array, "..."]:
    found = jnp.asarray(indices)
    if found.size and not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(f"`{name}` must be integers; got {found.dtype}.")
    return found.astype(jnp.int32)


def _check_count(name: str, count: int, least: int) -> None:
    whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if not whole or count < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}; got {count!r}."
        )


def _check(k: int, metric: str, name: str = "k") -> None:
    _check_count(name, k, 1)
    pairs.check_metric(metric)


def _scored(queries, keys, found, metric) -> Neighbors:
    """Final scores of found neighbours, which have gradients."""
    closeness = topk.scored(queries, keys, found, metric)
    dot = metric == "dot"
    exponent = queries.exponent + (keys.exponent[:1] if dot else queries.exponent)
    scores = pairs.score(closeness, exponent, metric)
    return _ordered(Neighbors(scores, found.indices), metric)


def _nobody(n: int, k: int) -> Neighbors:
    return Neighbors(
        jnp.full((n, k), jnp.nan, jnp.float32), jnp.full((n, k), -1, jnp.int32)
    )


@functools.partial(jax.jit, static_argnames=("k", "metric"))
def _traced(queries, keys, *, k, metric):
    n, m = queries.shape[0], keys.shape[0]
    if n == 0 or m == 0:
        return _nobody(n, k), Proof(jnp.zeros(n, bool))
    sides = pairs.prepare(queries, keys, metric)
    found = topk.search(*sides, k=k, metric=metric)
    return _scored(*sides, found, metric), Proof(found.unproved)


def _traced_nearest(queries, keys, *, k, metric, named):
    return _traced(queries, keys, k=k, metric=metric)


def _traced_all_pairs(x, *, k, metric, include_self, named):
    return _traced_own(x, k=k, metric=metric, include_self=include_self)


@functools.partial(jax.jit, static_argnames=("k", "metric", "include_self"))
def _traced_own(x, *, k, metric, include_self):
    if x.shape[0] == 0:
        return _nobody(0, k), Proof(jnp.zeros(0, bool))
    rows, _ = pairs.prepare(x, x, metric, one_scale=True)
    knobs = {"k": k, "metric": metric, "include_self": include_self}
    found = topk.search_own(rows, **knobs)
    return _scored(rows, rows, found, metric), Proof(found.unproved)


def _traced_cross(a, b, best_a, best_b, *, k, metric, named):
    del best_a, best_b, named  # a trace has one shape of work, whatever they hold
    return _traced_both(a, b, k=k, metric=metric)


@functools.partial(jax.jit, static_argnames=("k", "metric"))
def _traced_both(a, b, *, k, metric):
    if a.shape[0] == 0 or b.shape[0] == 0:
        return _nobody(a.shape[0], k), _nobody(b.shape[0], k)
    x, y = pairs.prepare(a, b, metric, one_scale=True)
    of_a, of_b = topk.search_both(x, y, k=k, metric=metric)
    return _scored(x, y, of_a, metric), _scored(y, x, of_b, metric)


def _visited(queries, keys, block, *, metric, mesh, **knobs):
    """Block after block: the neighbours so far, and those among one block more."""
    n, put = len(queries), jax.device_put
    if mesh is None:
        queries = jnp.asarray(queries)
    else:
        put = functools.partial(meshes.share, mesh=meshes.line(mesh), fill=np.nan)
        queries = put(queries)
    find = functools.partial(
        nearest_neighbors, metric=metric, mesh=mesh, with_proof=True, **knobs
    )

    def step(known, block, first):
        found, proof = find(queries, block)
        ids = jnp.where(found.indices < 0, -1, found.indices + first)
        found = found._replace(indices=ids)
        if known is None:
            return found, proof
        best = merge_neighbors(known[0], found, metric=metric)
        return best, Proof(known[1].unproved | proof.unproved)

    if len(keys):
        found = visits.visit(keys, block, step, None, put)
    else:
        found = find(queries, keys)
    return jax.tree.map(lambda x: x[:n], found)


def _check_traced(implementation: str | None) -> None:
    if implementation not in (None, "traced"):
        raise ValueError(
            "`implementation` must be None or 'traced' where there is a `mesh`;"
            f" got {implementation!r}."
        )


def _meshed_nearest(queries, keys, *, k, metric, mesh):
    mesh = meshes.line(mesh)
    if 0 in (queries.shape[0], keys.shape[0]):
        return _traced_nearest(queries, keys, k=k, metric=metric, named=None)
    with meshes.entered(mesh, queries, keys):
        sides = (meshes.share(side, mesh, fill=np.nan) for side in (queries, keys))
        found = ringed.nearest(
            *sides, n=queries.shape[0], mesh=mesh, k=k, metric=metric
        )
        return _from_ring(found, metric)


def _meshed_all_pairs(x, *, k, metric, include_self, mesh):
    mesh = meshes.line(mesh)
    knobs = {"k": k, "metric": metric, "include_self": include_self}
    if x.shape[0] == 0:
        return _traced_all_pairs(x, **knobs, named=None)
    with meshes.entered(mesh, x):
        rows = meshes.share(x, mesh, fill=np.nan, multiple=2)
        found = ringed.all_pairs(rows, n=x.shape[0], mesh=mesh, **knobs)
        return _from_ring(found, metric)


@functools.partial(jax.jit, static_argnames=("metric",))
def _from_ring(found, metric):
    best = found.best
    scores = pairs.score(best.closeness, found.exponent, metric)
    neighbors = _ordered(Neighbors(scores, best.ids), metric)
    return neighbors, Proof(best.unproved)


def _streamed_nearest(queries, keys, *, k, metric, named):
    _check_streamed(named, queries, keys)
    return _from_host(concrete.nearest(queries, keys, k, metric))


def _streamed_all_pairs(x, *, k, metric, include_self, named):
    _check_streamed(named, x, x)
    return _from_host(concrete.all_pairs(x, k, metric, include_self))


def _streamed_cross(a, b, best_a, best_b, *, k, metric, named):
    _check_streamed(named, a, b)
    bests = (
        None if best is None else np.asarray(best.scores)[:, -1]
        for best in (best_a, best_b)
    )
    found = concrete.cross(a, b, k, metric, *bests)
    of_a, of_b = (_from_host(lists)[0] for lists in found)
    return of_a, of_b


def _check_streamed(named, *sides):
    if any(isinstance(side, jax.core.Tracer) for side in sides):
        raise dispatch.Unavailable("`streamed` needs concrete arrays, not traced ones.")
    rows, keys = (side.shape[0] for side in sides)
    if named is None:
        if jax.default_backend() != "cpu":
            raise dispatch.Unavailable("`streamed` is made for CPUs.")
        if rows * keys < _WORTH_STREAMING:
            raise dispatch.Unavailable("`streamed` is made for large inputs.")


def _from_host(found: concrete.Lists) -> tuple[Neighbors, Proof]:
    lists = jnp.asarray(found.scores), jnp.asarray(found.indices)
    return Neighbors(*lists), Proof(jnp.asarray(found.unproved))


_WORTH_STREAMING = 2048 * 2048  # pairs
_ORDER = ("streamed", "traced")
_NEAREST = {"streamed": _streamed_nearest, "traced": _traced_nearest}
_ALL_PAIRS = {"streamed": _streamed_all_pairs, "traced": _traced_all_pairs}
_CROSS = {"streamed": _streamed_cross, "traced": _traced_cross}
