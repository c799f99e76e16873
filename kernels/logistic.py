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

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import batching, lockstep
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

    Computes in float32, or in float64 where `x` is float64 and x64 is enabled. Fewer
    rows than features are solved in the row space, which is exact. `x` may be traced
    (`jit`, `vmap`); `problems` may not. Not differentiable.

    The bound is rigorous for two classes, up to rounding of the gradient; for more,
    the share of the intercepts' remaining gradient is a first-order estimate.

    Raises:
      ValueError: a shape, a label, a penalty or a value of `x` breaks a rule.
    """
    x = jnp.asarray(x)
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
    problems, used = _numbered_by_use(problems, x.shape[-1])
    packed = batching.pack(problems)
    order = _places(packed)

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


def _numbered_by_use(problems: Problems, d: int) -> tuple[Problems, np.ndarray | None]:
    """With fewer rows in use than features: the rows, and problems that count those."""
    used = np.unique(np.concatenate([tile.rows for tile in problems.tiles]))
    if len(used) >= d:
        return problems, None
    tiles = [t._replace(rows=np.searchsorted(used, t.rows)) for t in problems.tiles]
    return problems._replace(tiles=tuple(tiles)), used


def _check_finite(x: Array) -> None:
    """Raises ValueError naming the first row that holds NaN or Inf, if any does."""
    if isinstance(x, jax.core.Tracer) or np.isfinite(jnp.sum(x, dtype=jnp.float32)):
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
