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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import batching, lockstep
from . import mesh as meshes
from .lockstep import LogisticFit
from .problems import Problems, check


def fit_logistic(
    x: ArrayLike,
    problems: Problems,
    *,
    l2: ArrayLike = 1.0,
    start: tuple[ArrayLike, ArrayLike] | None = None,
    tolerance: float = 5e-7,
    max_iterations: int = 500,
    mesh: Mesh | None = None,
) -> LogisticFit:
    """Solves every problem over the rows of `x` to a certified tolerance.

    Args:
      x: features `[n, d]`, or `[layer, n, d]` to solve the problems on each layer.
      problems: which rows meet which problems (`one_vs_rest`, `one_vs_one`, ...).
      l2: penalty > 0, one or `[p]`; scikit-learn's 1 / C.
      start: weights and intercepts to start from, shaped as in the result (of a
        neighbouring penalty, or of all rows before the folds); None starts at zero.
      tolerance: largest bound, relative to the objective, that counts as solved.
      max_iterations: iterations after which a problem is returned as it is.
      mesh: deals the batches of problems out to these devices, of every layer; each
        solves its own as one device would, and they send each other nothing. A device
        holds the rows of one layer; `x` stays on the host, where it may be a memory
        map, and must be concrete. With several processes each passes the same arrays
        and gets the whole result.

    Computes in float32, or in float64 where `x` is float64 and x64 is enabled. Fewer
    rows than features are solved in the row space, which is exact. `x` may be traced
    (`jit`, `vmap`); `problems` may not. Not differentiable.

    The bound is rigorous for two classes, up to rounding of the gradient; for more,
    the share of the intercepts' remaining gradient is a first-order estimate.

    Raises:
      ValueError: a shape, a label, a penalty or a value of `x` breaks a rule.
    """
    x = jnp.asarray(x) if mesh is None else _concrete(x)
    if x.ndim not in (2, 3):
        raise ValueError(f"`x` must be [n, d] or [layer, n, d]; got shape {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"`x` must be floating point; got {x.dtype}.")
    if not 0 < tolerance < 1:
        raise ValueError(f"`tolerance` must be in (0, 1); got {tolerance}.")
    check(problems, x.shape[-2])
    penalties = np.broadcast_to(np.asarray(l2, np.float64), (problems.count,))
    if not (np.isfinite(penalties) & (penalties > 0)).all():
        raise ValueError(f"`l2` must be finite and > 0; got {penalties.min()}.")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    outputs = 1 if problems.classes == 2 else problems.classes
    layers, n = (x.shape[0] if x.ndim == 3 else 1), x.shape[-2]
    starts = _starts(start, problems.count, outputs, layers, x.shape[-1], dtype)
    _check_finite(x)
    problems, used = _numbered_by_use(problems, *x.shape[-2:])
    packed = batching.pack(problems)
    order = _places(packed)
    if mesh is not None:
        penalties = penalties.astype(dtype)
        knobs = {"tolerance": tolerance, "max_iterations": max_iterations}
        parts = _dealt(
            *(x, packed, used, starts, penalties, outputs, meshes.line(mesh)), **knobs
        )
        fits = [_collected(part, order, None) for part in parts]
        return _stacked(fits) if x.ndim == 3 else fits[0]

    fits, stored = [], None
    for layer, begin in enumerate(starts):
        features, offset, rotation = x, layer * n, None
        if used is not None:
            features, rotation = _row_space(_read(x, used + offset, dtype))
            offset = 0
        d = features.shape[-1]
        basis = lockstep.covariance_basis(features, packed.pairs + offset, dtype)
        parts, before = [], None
        for batch, ids in zip(packed.batches, packed.ids):
            size, (b, r) = len(batch.owner), batch.rows.shape
            if stored is None:
                stored = lockstep.Rows(
                    lockstep.empty_blocks(b, r, d, dtype), jnp.zeros((), dtype)
                )
            kept = before is not None and batching.same_rows(batch, before)
            stored, part = lockstep.solve(
                stored,
                features,
                offset,
                batch,
                basis,
                np.resize(penalties[ids], size).astype(dtype),
                np.arange(size) < len(ids),
                _begin(begin, ids, rotation, size),
                0 if kept else int(batch.used.sum()),
                tolerance,
                max_iterations,
                outputs=outputs,
            )
            parts.append(part)
            before = batch
        fits.append(_collected(parts, order, rotation))
    return _stacked(fits) if x.ndim == 3 else fits[0]


def _concrete(x: ArrayLike) -> np.ndarray:
    if isinstance(x, jax.core.Tracer):
        raise ValueError("`x` must be concrete where there is a `mesh`; it is traced.")
    held = meshes.on_host(x)
    dtype = jax.dtypes.canonicalize_dtype(held.dtype)
    return held if held.dtype == dtype else held.astype(dtype)


class _Unit(NamedTuple):
    """What a device needs to solve one batch on one layer."""

    batch: batching.Batch
    penalties: np.ndarray
    real: np.ndarray
    begin: tuple[np.ndarray, np.ndarray] | None


def _unit(packed: batching.Packed, i: int, penalties: np.ndarray, begin) -> _Unit:
    batch, ids = packed.batches[i], packed.ids[i]
    size = len(batch.owner)
    if begin is not None:
        begin = tuple(np.asarray(part)[np.resize(ids, size)] for part in begin)
    real = np.arange(size) < len(ids)
    return _Unit(batch, np.resize(penalties[ids], size), real, begin)


class _Lines(NamedTuple):
    """Rows of `x` that are read when a device wants them; all where `used` is None."""

    x: np.ndarray
    used: np.ndarray | None

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.x if self.used is None else self.x[self.used], dtype)


def _dealt(
    x, packed, used, starts, penalties, outputs, mesh, *, tolerance, max_iterations
) -> list[list[LogisticFit]]:
    """The fits of every batch, layer by layer; in each round a device solves one."""
    layers = x[None] if x.ndim == 2 else x
    whole = [(a, i) for a in range(len(layers)) for i in range(len(packed.batches))]
    fits: list[list[LogisticFit]] = [[] for _ in layers]
    before, features = None, None
    for start in range(0, len(whole), mesh.size):
        units = whole[start : start + mesh.size]
        # A device without a batch has one of which no problem is real.
        idle = mesh.size - len(units)
        made = [_unit(packed, i, penalties, starts[layer]) for layer, i in units]
        made += [made[-1]._replace(real=made[-1].real & False)] * idle
        chosen = [layer for layer, _ in units] + [units[-1][0]] * idle
        if before != chosen:
            features = meshes.deal([_Lines(layers[a], used) for a in chosen], mesh)
        before = chosen
        with meshes.entered(mesh):
            found = _solved_on_each(
                features,
                jax.tree.map(lambda *parts: meshes.deal(parts, mesh), *made),
                *meshes.copy((packed.pairs, tolerance, max_iterations), mesh),
                outputs=outputs,
                mesh=mesh,
                row_space=used is not None,
            )
        found = jax.tree.map(np.asarray, found)
        for device, (layer, _) in enumerate(units):
            fits[layer].append(jax.tree.map(lambda a, d=device: a[d], found))
    return fits


@functools.partial(jax.jit, static_argnames=("outputs", "mesh", "row_space"))
def _solved_on_each(
    features, units, pairs, tolerance, max_iterations, *, outputs, mesh, row_space
) -> LogisticFit:
    """`[device, ...]`: the fit of each device's unit."""

    def one(features, unit, pairs, tolerance, max_iterations):
        features, unit = jax.tree.map(lambda a: a[0], (features, unit))
        dtype = jnp.promote_types(features.dtype, jnp.float32)
        batch, begin, rotation = unit.batch, unit.begin, None
        if row_space:
            features, rotation = _row_space(features.astype(dtype))
            if begin is not None:
                weights = lockstep.exact_product(begin[0], rotation.T)
                begin = weights, begin[1]
        (b, r), d = batch.rows.shape, features.shape[-1]
        blocks = lockstep.empty_blocks(b, r, d, dtype)
        _, fit = lockstep.solve(
            lockstep.Rows(blocks, jnp.zeros((), dtype)),
            *(features, 0, batch, lockstep.covariance_basis(features, pairs, dtype)),
            *(unit.penalties, unit.real, begin),
            jnp.where(unit.real.any(), batch.used.sum(), 0),
            *(tolerance, max_iterations),
            outputs=outputs,
        )
        if row_space:
            weights = lockstep.exact_product(fit.weights, rotation)
            fit = fit._replace(weights=weights)
        return jax.tree.map(lambda a: a[None], fit)

    everywhere = meshes.EVERYWHERE
    inputs = (meshes.ROWS, meshes.ROWS, everywhere, everywhere, everywhere)
    found = meshes.on_each(one, mesh, inputs, check_vma=False)(
        features, units, pairs, tolerance, max_iterations
    )
    return meshes.everywhere(found, mesh)


def _places(packed: batching.Packed) -> np.ndarray:
    """Where each problem stands among the batches' results, one after another."""
    size = len(packed.batches[0].owner)
    at = [i * size + np.arange(len(ids)) for i, ids in enumerate(packed.ids)]
    return np.concatenate(at)[np.argsort(np.concatenate(packed.ids))]


@jax.jit
def _collected(parts: list[LogisticFit], order, rotation) -> LogisticFit:
    """The batches' results in the order of the problems, in the features given."""
    fit = jax.tree.map(lambda *a: jnp.concatenate(a)[order], *parts)
    if rotation is not None:
        fit = fit._replace(weights=lockstep.exact_product(fit.weights, rotation))
    if fit.weights.shape[1] == 1:
        fit = fit._replace(weights=fit.weights[:, 0], intercepts=fit.intercepts[:, 0])
    return fit


@jax.jit
def _stacked(fits: list[LogisticFit]) -> LogisticFit:
    return jax.tree.map(lambda *a: jnp.stack(a), *fits)


def _starts(start, count, outputs, layers, d, dtype):
    """Per layer None, or weights `[p, k, d]` and intercepts `[p, k]`."""
    if start is None:
        return [None] * layers
    weights, intercepts = (jnp.asarray(part, dtype) for part in start)
    for name, value, own in (
        ("weights", weights, (outputs, d)),
        ("intercepts", intercepts, (outputs,)),
    ):
        size = layers * count * int(np.prod(own))
        if value.size != size:
            raise ValueError(
                f"`start` must hold {name} of {count} problems and {layers} layer(s),"
                f" {size} numbers; got shape {value.shape}."
            )
    weights = weights.reshape(layers, count, outputs, d)
    return list(zip(weights, intercepts.reshape(layers, count, outputs)))


def _begin(begin, ids, rotation, size):
    if begin is None:
        return None
    weights, intercepts = begin
    if rotation is not None:
        weights = lockstep.exact_product(weights, rotation.T)
    ids = np.resize(ids, size)
    return weights[ids], intercepts[ids]


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


def _check_finite(x: Array | np.ndarray) -> None:
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
    return lockstep.rows_of(x, rows).astype(dtype)


@jax.jit
def _row_space(x: Float[Array, "n d"]) -> tuple[Array, Array]:
    """Rows in an orthonormal basis of their span, `[n, n]`, and that basis `[n, d]`.

    The optimum lies in the span (a part of w outside it costs and changes no margin),
    and rotation keeps |w|.
    """
    q, r = jnp.linalg.qr(x.T)
    return r.T, q.T
