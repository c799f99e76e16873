"""Thousands of L2-regularised logistic regressions as one program.

Each problem minimises, over weights w and an intercept b that is not penalised,

    sum_i s_i log(1 + exp(-y_i (x_i w + b))) + l2 / 2 |w|^2,      y_i = +1 or -1,

or its multinomial form: scikit-learn's `LogisticRegression(C=1 / l2)`. `batching` packs
the problems, `lockstep` solves a batch of them.

Every problem ends with a bound on its distance to the optimum: the objective is
strongly convex in w, so it exceeds its minimum by at most |gradient|^2 / (2 l2). That
bound relative to the objective, not a step length, is what stops the iteration.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import batching, covariance, lockstep, passes
from . import mesh as meshes
from .lockstep import LogisticFit, Point
from .problems import Problems, check


def fit_logistic(
    x: ArrayLike,
    problems: Problems,
    *,
    l2: ArrayLike = 1.0,
    start: tuple[ArrayLike, ArrayLike] | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 500,
    mesh: Mesh | None = None,
) -> LogisticFit:
    """Solves every problem over the rows of `x` to a certified tolerance.

    Args:
      x: features `[n, d]`, or `[layer, n, d]` to solve the problems on each layer.
      problems: which rows meet which problems (`one_vs_rest`, `one_vs_one`, ...).
      l2: penalty > 0, one or `[p]`; scikit-learn's 1 / C.
      start: weights and intercepts to start from, shaped as in the result (of a
        neighbouring penalty, or of all rows before the folds). Problems whose objective
        is smaller at zero start there, as all do where it is None.
      tolerance: largest bound, relative to the objective, that counts as solved.
      max_iterations: iterations after which a problem is returned as it is.
      mesh: deals the batches of problems out to these devices, of every layer; each
        solves its own as one device would, and they send each other nothing. A device
        holds the rows of one layer; `x` stays on the host, where it may be a memory
        map, and must be concrete. With several processes each passes the same arrays
        and gets the whole result.

    Computes in float32, or in float64 where `x` is float64 and x64 is enabled. Fewer
    rows than features are solved in the row space, which is exact. `x` may be traced
    (`jit`, `vmap`); nothing else may. Not differentiable in reverse.

    The bound is rigorous for two classes, up to rounding of the gradient; for more,
    the share of the intercepts' remaining gradient is a first-order estimate.

    Raises:
      ValueError: a shape, a label, a penalty or a value of `x` breaks a rule.
    """
    x = jnp.asarray(x) if mesh is None else _concrete(x)
    if x.ndim not in (2, 3):
        raise ValueError(f"`x` must be [n, d] or [layer, n, d]; got shape {x.shape}.")
    if 0 in x.shape:
        raise ValueError(f"`x` must not be empty; got shape {x.shape}.")
    if np.prod(x.shape[:-1]) >= 2**31:
        raise ValueError(f"`x` must have fewer than 2**31 rows; got shape {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"`x` must be floating point; got {x.dtype}.")
    if not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` must be in (0, 1); got {tolerance}.")
    if max_iterations != int(max_iterations) or max_iterations < 1:
        raise ValueError(
            f"`max_iterations` must be an integer > 0; got {max_iterations}."
        )
    check(problems, x.shape[-2])
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    penalties = np.asarray(l2, dtype)
    if penalties.shape not in ((), (1,), (problems.count,)):
        raise ValueError(
            f"`l2` must be one number or [{problems.count}], one a problem; got shape"
            f" {penalties.shape}."
        )
    if not (np.isfinite(penalties) & (penalties > 0)).all():
        raise ValueError(
            f"`l2` must be finite and > 0 in {dtype.name}; got {penalties.min()}.."
            f"{penalties.max()}."
        )
    penalties = np.broadcast_to(penalties, problems.count)
    outputs = 1 if problems.classes == 2 else problems.classes
    layers = x.shape[0] if x.ndim == 3 else 1
    starts = _starts(
        *(start, problems.count, outputs, layers, x.ndim == 2, x.shape[-1], dtype)
    )
    problems, used = _numbered_by_use(problems, *x.shape[-2:])
    pairs = batching.pairs_of_rows(problems.tiles)
    if mesh is None:
        on_device = jnp.asarray(x)  # as it is already
        spaces = (_space(on_device, i, used, pairs, dtype) for i in range(layers))
        first = next(spaces)  # is computed while the problems are packed
    packed = batching.pack(problems)
    check_finite(x)
    most = min(int(max_iterations), 2**31 - 1)  # they are counted in int32
    rounds = (most,) if start is None else (1, most)
    units = [
        _unit(batch, ids, penalties, tolerance, rounds)
        for batch, ids in zip(packed.batches, packed.ids)
    ]
    if mesh is None:
        fits = _solved_here(itertools.chain([first], spaces), units, starts)
    else:
        fits = _dealt(x, units, pairs, used, starts, meshes.line(mesh))
    places = _places(packed)
    found = [_finished(parts, places, rotation) for parts, rotation in fits]
    return _stacked(found) if x.ndim == 3 else found[0]


def _places(packed: batching.Packed) -> np.ndarray:
    """Where each problem stands among the batches' results, one after another."""
    size = len(packed.batches[0].owner)
    at = [i * size + np.arange(len(ids)) for i, ids in enumerate(packed.ids)]
    return np.concatenate(at)[np.argsort(np.concatenate(packed.ids))]


class _Unit(NamedTuple):
    """What a device needs to solve one batch, but where its problems begin."""

    batch: batching.Batch
    ids: np.ndarray  # of the problems; repeated where the batch holds fewer
    penalties: np.ndarray
    active: np.ndarray
    tolerance: np.ndarray
    max_iterations: np.ndarray  # of each round


def _unit(batch, ids: np.ndarray, penalties, tolerance, rounds) -> _Unit:
    own = np.resize(ids, len(batch.owner))
    return _Unit(
        batch,
        own,
        penalties[own],
        np.arange(len(own)) < len(ids),
        np.asarray(tolerance, penalties.dtype),
        np.asarray(rounds, np.int32),
    )


class _Space(NamedTuple):
    """The features of a layer, or the coordinates of its rows in their span.

    Rows of the layer are counted from `offset`; `rotation` leads from weights on
    coordinates to weights on features.
    """

    features: Array
    offset: int
    rotation: Array | None
    basis: covariance.Basis


def _space(x: Array, layer: int, used: np.ndarray | None, pairs, dtype) -> _Space:
    features, offset, rotation = x, layer * x.shape[-2], None
    if used is not None:
        features, rotation = _row_space(_read(x, used + offset, dtype))
        offset = 0
    basis = covariance.basis_of_rows(features, pairs + offset, dtype)
    return _Space(features, offset, rotation, basis)


def _solved_here(
    spaces: Iterable[_Space], units: list[_Unit], starts: list[Point]
) -> Iterator[tuple[list[LogisticFit], Array | None]]:
    """Of each layer the fits of all units, and the rotation that they are in."""
    rows = None
    for (features, offset, rotation, basis), begin in zip(spaces, starts):
        if rotation is not None:
            begin = _rotated(begin, rotation.T)
        parts, before = [], None
        for unit in units:
            batch = unit.batch
            if before is None or not batching.same_rows(batch, before):
                rows = passes.gather(
                    None if rows is None else rows.values,
                    features,
                    batch.rows + offset,
                    batch.centre + offset,
                    batch.group,
                    dtype=unit.penalties.dtype,
                )
            parts.append(
                lockstep.solve(
                    *(rows, batch, basis, unit.penalties, _taken(begin, unit.ids)),
                    *(unit.active, unit.tolerance, unit.max_iterations),
                )
            )
            before = batch
        yield parts, rotation


def _concrete(x: ArrayLike) -> np.ndarray:
    if isinstance(x, jax.core.Tracer):
        raise ValueError("`x` must be concrete where there is a `mesh`; it is traced.")
    held = meshes.on_host(x)
    dtype = jax.dtypes.canonicalize_dtype(held.dtype)
    return held if held.dtype == dtype else held.astype(dtype)


class _Lines(NamedTuple):
    """Rows of `x` that are read when a device wants them; all where `used` is None."""

    x: np.ndarray
    used: np.ndarray | None

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.x if self.used is None else self.x[self.used], dtype)


def _dealt(
    x, units: list[_Unit], pairs, used, starts: list[Point], mesh
) -> Iterator[tuple[list[LogisticFit], None]]:
    """Of each layer the fits of all units: in each round a device solves one."""
    layers = x[None] if x.ndim == 2 else x
    whole = [(a, unit) for a in range(len(layers)) for unit in units]
    parts: list[list[LogisticFit]] = [[] for _ in layers]
    before, features = None, None
    for first in range(0, len(whole), mesh.size):
        chosen = whole[first : first + mesh.size]
        # A device without a unit has one of which no problem is active.
        layer, unit = chosen[-1]
        idle = unit._replace(active=unit.active & False)
        full = [*chosen, *[(layer, idle)] * mesh.size]
        full = full[: mesh.size]
        held = [layer for layer, _ in full]
        if before != held:
            features = meshes.deal([_Lines(layers[a], used) for a in held], mesh)
        before = held
        begins = [_taken(starts[layer], unit.ids) for layer, unit in full]
        dealt = [(unit, begin) for (_, unit), begin in zip(full, begins)]
        with meshes.entered(mesh):
            found = _solved_on_each(
                features,
                jax.tree.map(lambda *parts: meshes.deal(parts, mesh), *dealt),
                meshes.copy(pairs, mesh),
                mesh=mesh,
                row_space=used is not None,
            )
        found = jax.tree.map(np.asarray, found)
        for device, (layer, _) in enumerate(chosen):
            parts[layer].append(jax.tree.map(lambda a, d=device: a[d], found))
    yield from ((own, None) for own in parts)


@functools.partial(jax.jit, static_argnames=("mesh", "row_space"))
def _solved_on_each(features, units, pairs, *, mesh, row_space) -> LogisticFit:
    """`[device, ...]`: the fit of each device's unit."""

    def one(features, unit, pairs):
        features, (unit, begin) = jax.tree.map(lambda a: a[0], (features, unit))
        dtype = jnp.promote_types(features.dtype, jnp.float32)
        batch, rotation = unit.batch, None
        if row_space:
            features, rotation = _row_space(features.astype(dtype))
            begin = _rotated(begin, rotation.T)
        fit = lockstep.solve(
            passes.gather(
                *(None, features, batch.rows, batch.centre, batch.group), dtype=dtype
            ),
            batch,
            covariance.basis_of_rows(features, pairs, dtype),
            *(unit.penalties, begin, unit.active, unit.tolerance, unit.max_iterations),
        )
        fit = fit if rotation is None else _rotated(fit, rotation)
        return jax.tree.map(lambda a: a[None], fit)

    inputs = meshes.ROWS, meshes.ROWS, meshes.EVERYWHERE
    found = meshes.on_each(one, mesh, inputs, check_vma=False)(features, units, pairs)
    return meshes.everywhere(found, mesh)


@jax.jit
def _taken(begin: Point, own) -> Point:
    return jax.tree.map(lambda a: a[own], begin)


def _rotated(fit, rotation):
    """With weights `[p, k, n]` as `[p, k, d]`, or back with the transpose."""
    return fit._replace(weights=passes.exact_product(fit.weights, rotation))


@jax.jit
def _finished(parts: list[LogisticFit], places, rotation) -> LogisticFit:
    """The parts in the problems' order, in the features given, one output squeezed."""
    fit = jax.tree.map(lambda *a: jnp.concatenate(a)[places], *parts)
    if rotation is not None:
        fit = _rotated(fit, rotation)
    if fit.weights.shape[1] == 1:
        fit = fit._replace(weights=fit.weights[:, 0], intercepts=fit.intercepts[:, 0])
    return fit


@jax.jit
def _stacked(fits: list[LogisticFit]) -> LogisticFit:
    return jax.tree.map(lambda *a: jnp.stack(a), *fits)


def _starts(start, count, outputs, layers, flat, d, dtype) -> list[Point]:
    """Of each layer where its problems begin; at zero where there is no `start`."""
    if start is None:
        zeros = (
            jnp.zeros((count, outputs, d), dtype),
            jnp.zeros((count, outputs), dtype),
        )
        return [Point(*zeros)] * layers
    if not isinstance(start, tuple | list) or len(start) != 2:
        raise ValueError("`start` must be two arrays: (weights, intercepts).")
    weights, intercepts = (jnp.asarray(part, dtype) for part in start)
    each = () if outputs == 1 else (outputs,)
    for name, value, own in (
        ("weights", weights, (d,)),
        ("intercepts", intercepts, ()),
    ):
        wanted = (count, *each, *own) if flat else (layers, count, *each, *own)
        if value.shape != wanted:
            raise ValueError(
                f"`start` must hold {name} shaped as in the result, {list(wanted)};"
                f" got {list(value.shape)}."
            )
        if not isinstance(value, jax.core.Tracer) and not np.isfinite(value.sum()):
            raise ValueError(f"`start` must be finite; its {name} are not.")
    weights = weights.reshape(layers, count, outputs, d)
    intercepts = intercepts.reshape(layers, count, outputs)
    return [Point(*own) for own in zip(weights, intercepts)]


def _numbered_by_use(
    problems: Problems, n: int, d: int
) -> tuple[Problems, np.ndarray | None]:
    """With fewer rows in use than features: the rows, and problems that count those."""
    seen = np.zeros(n, bool)
    for tile in problems.tiles:
        seen[tile.rows] = True
    used = np.flatnonzero(seen)
    if len(used) >= d:
        return problems, None
    tiles = [t._replace(rows=np.searchsorted(used, t.rows)) for t in problems.tiles]
    return problems._replace(tiles=tuple(tiles)), used


def check_finite(x: Array | np.ndarray) -> None:
    """Raises ValueError naming the first row that holds NaN or Inf, if any does."""
    if isinstance(x, jax.core.Tracer) or np.isfinite(x.sum(dtype=np.float32)):
        return
    rows = np.argwhere(~np.asarray(jnp.isfinite(x).all(axis=-1)))
    if len(rows):
        where = " of layer ".join(str(i) for i in rows[0][::-1])
        raise ValueError(
            f"`x` must be finite; row {where} is not ({len(rows)} such rows)."
        )


@functools.partial(jax.jit, static_argnums=2)
def _read(x: Array, rows, dtype) -> Float[Array, "r d"]:
    return passes.rows_of(x, rows).astype(dtype)


@jax.jit
def _row_space(x: Float[Array, "n d"]) -> tuple[Array, Array]:
    """Rows in an orthonormal basis of their span, `[n, n]`, and that basis `[n, d]`.

    The optimum lies in the span (a part of w outside it costs and changes no margin),
    and rotation keeps |w|.
    """
    q, r = jnp.linalg.qr(x.T)
    return r.T, q.T
