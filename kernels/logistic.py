"""Thousands of L2-regularised logistic regressions as one program.

Each problem minimises, over weights w and an intercept b that is not penalised,

    sum_i s_i log(1 + exp(-y_i (x_i w + b))) + l2 / 2 |w|^2,      y_i = +1 or -1,

or its multinomial form: scikit-learn's `LogisticRegression(C=1 / l2)`. The solver is
L-BFGS (Liu and Nocedal 1989, https://doi.org/10.1007/BF01589116) in lockstep over the
problems of a batch, preconditioned by a low-rank covariance that all problems share.
Large tiles are first solved on an eighth of their rows, where most iterations go.
Margins are kept, so that an iteration is two products with the rows.

Every problem ends with a bound on its distance to the optimum: the objective is
strongly convex in w, so it exceeds its minimum by at most |gradient|^2 / (2 l2). That
bound relative to the objective, not a step length, is what stops the iteration.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from . import batching
from .problems import Problems, check

RANK = 96  # of the covariance in the preconditioner
MEMORY = 4  # pairs of L-BFGS
SAMPLE_GAP = 0.3  # relative bound at which the phase on a sample of the rows ends
SAMPLE_ITERATIONS = 30  # and the iterations after which it ends in any case
PATIENCE = 25  # iterations without a better bound after which a problem is given up
LANES = 16  # features and intercept are padded to a multiple, for aligned products


class LogisticFit(NamedTuple):
    """Solutions of `p` problems, with a leading `layer` axis where `x` has one.

    weights:       `[p, d]`; `[p, classes, d]` for more than two classes.
    intercepts:    `[p]`; `[p, classes]`.
    objective:     `[p]` the penalised objective at the solution.
    gradient_norm: `[p]` length of its gradient there, intercepts included.
    gap:           `[p]` bound on objective - minimum.
    iterations:    `[p]` int32, those on a sample of the rows included.
    converged:     `[p]` gap <= tolerance * objective; False says: not solved to it.
    """

    weights: Array
    intercepts: Array
    objective: Array
    gradient_norm: Array
    gap: Array
    iterations: Array
    converged: Array


class _Rows(NamedTuple):
    """Centred rows in blocks, a one after the features; the length of the longest."""

    values: Float[Array, "b r D"]
    reach: Float[Array, ""]


class _Basis(NamedTuple):
    """Leading directions and variances of the rows; the mean of the other variances."""

    directions: Float[Array, "D rank"]
    variances: Float[Array, " rank"]
    tail: Float[Array, ""]


class _State(NamedTuple):
    """Where the iteration stands; `w` is weights and intercept, `k` outputs each."""

    w: Float[Array, "p k D"]
    gradient: Float[Array, "p k D"]
    objective: Float[Array, " p"]
    curvature: Float[Array, "p k"]
    gap: Float[Array, " p"]
    margins: Float[Array, "b c k r"]
    steps: Float[Array, "b c k r"]
    undo: Float[Array, " p"]  # length of a rejected step, still in the margins
    limit: Float[Array, " p"]  # longest step allowed
    moves: Float[Array, "m p k D"]
    changes: Float[Array, "m p k D"]
    inverse: Float[Array, "m p"]  # 1 / (move . change); 0 is an empty pair
    newest: Int[Array, ""]
    active: Bool[Array, " p"]
    best: Float[Array, " p"]
    patience: Int[Array, " p"]
    iterations: Int[Array, " p"]
    sampling: Bool[Array, ""]
    restart: Bool[Array, ""]  # the margins are to be made from `w`
    rounds: Int[Array, ""]


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
        basis = _basis(features, packed.pairs + offset, dtype)
        parts, before = [], None
        for batch, ids in zip(packed.batches, packed.ids):
            size, (b, r) = len(batch.owner), batch.rows.shape
            if stored is None:
                stored = _Rows(_room(b, r, d, dtype), jnp.zeros((), dtype))
            kept = before is not None and batching.same_rows(batch, before)
            stored, part = _solve(
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


def _product(a: Array, b: Array) -> Array:
    """Never TF32 or bfloat16: the certificate needs the gradient's last digits."""
    return jnp.matmul(
        a, b, precision=lax.Precision.HIGHEST, preferred_element_type=a.dtype
    )


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
        fit = fit._replace(weights=_product(fit.weights, rotation))
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
        weights = _product(weights, rotation.T)
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


def _rows(x: Array, rows) -> Array:
    """Rows of `[n, d]` or of `[layer, n, d]`, counted through all layers."""
    return x.reshape(-1, x.shape[-1])[rows]


@functools.partial(jax.jit, static_argnums=2)
def _read(x: Array, rows, dtype) -> Float[Array, "r d"]:
    return _rows(x, rows).astype(dtype)


@jax.jit
def _row_space(x: Float[Array, "n d"]) -> tuple[Array, Array]:
    """Rows in an orthonormal basis of their span, `[n, n]`, and that basis `[n, d]`.

    The optimum lies in the span (a part of w outside it costs and changes no margin),
    and rotation keeps |w|.
    """
    q, r = jnp.linalg.qr(x.T)
    return r.T, q.T


@functools.partial(jax.jit, static_argnums=2)
def _basis(x: Float[Array, "*l n d"], pairs: Int[Array, "2 m"], dtype) -> _Basis:
    """Spectrum of the covariance within tiles, from differences of pairs of rows."""
    difference = _rows(x, pairs[0]).astype(dtype) - _rows(x, pairs[1]).astype(dtype)
    m, d = difference.shape
    covariance = _product(difference.T, difference) / (2 * m)
    if d <= RANK + 32:
        variances, directions = jnp.linalg.eigh(covariance)
        tail = jnp.zeros((), dtype)
    else:
        span = jax.random.normal(jax.random.key(0), (d, RANK + 16), dtype)
        for _ in range(3):  # subspace iteration: a preconditioner may be rough
            span = jnp.linalg.qr(_product(covariance, span))[0]
        inner = _product(span.T, _product(covariance, span))
        variances, rotation = jnp.linalg.eigh(inner)
        variances = variances[-RANK:]
        directions = _product(span, rotation[:, -RANK:])
        rest = jnp.trace(covariance) - jnp.sum(variances)
        tail = jnp.maximum(rest, 0) / (d - RANK)
    padded = jnp.pad(directions, ((0, _padded(d) - d), (0, 0)))
    # A direction without variance is not one along which a step may be unbounded.
    floor = 1e-6 * variances[-1]
    return _Basis(padded, jnp.maximum(variances, floor), jnp.maximum(tail, floor))


def _padded(d: int) -> int:
    return -(-(d + 1) // LANES) * LANES


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _room(b: int, r: int, d: int, dtype) -> Float[Array, "b r D"]:
    """Space for the rows of a batch; the feature after the last one is the constant."""
    return jnp.zeros((b, r, _padded(d)), dtype).at[:, :, d].set(1)


@functools.partial(jax.jit, static_argnames=("outputs",), donate_argnums=(0,))
def _solve(
    stored: _Rows,
    x: Float[Array, "*l n d"],
    offset: Int[Array, ""],
    batch: batching.Batch,
    basis: _Basis,
    l2: Float[Array, " p"],
    real: Bool[Array, " p"],
    begin,
    gathered: Int[Array, ""],
    tolerance: Float[Array, ""],
    max_iterations: Int[Array, ""],
    *,
    outputs: int,
) -> tuple[_Rows, LogisticFit]:
    """Solves a batch. The first `gathered` blocks of rows are read from `x` anew."""
    d, dtype = x.shape[-1], stored.values.dtype
    batch = batch._replace(rows=batch.rows + offset, centre=batch.centre + offset)
    means = jnp.mean(_rows(x, batch.centre).astype(dtype), axis=1)
    stored = _gather(stored, x, batch, means, gathered)
    p, (b, c, r), D = len(l2), batch.labels.shape, stored.values.shape[2]
    zeros = functools.partial(jnp.zeros, dtype=dtype)
    w = zeros((p, outputs, D))
    if begin is not None:
        centred = begin[1] + jnp.einsum("pkd,pd->pk", begin[0], means[batch.owner])
        w = w.at[..., :d].set(begin[0]).at[..., d].set(centred)
    state = _State(
        w=w,
        gradient=zeros((p, outputs, D)),
        objective=jnp.full(p, jnp.inf, dtype),
        curvature=jnp.ones((p, outputs), dtype),
        gap=jnp.full(p, jnp.inf, dtype),
        margins=zeros((b, c, outputs, r)),
        steps=zeros((b, c, outputs, r)),
        undo=zeros(p),
        limit=jnp.full(p, jnp.inf, dtype),
        moves=zeros((MEMORY, p, outputs, D)),
        changes=zeros((MEMORY, p, outputs, D)),
        inverse=zeros((MEMORY, p)),
        newest=jnp.int32(0),
        active=real,
        best=jnp.full(p, jnp.inf, dtype),
        patience=jnp.full(p, PATIENCE, jnp.int32),
        iterations=jnp.zeros(p, jnp.int32),
        sampling=jnp.any(batch.used & (batch.share != 1)) & (begin is None),
        restart=jnp.array(True),
        rounds=jnp.int32(0),
    )
    iterate = functools.partial(
        _iterate, stored, batch, basis, l2, real, tolerance, max_iterations, d
    )
    state = lax.while_loop(lambda s: jnp.any(s.active), iterate, state)
    weights = state.w[..., :d]
    fit = LogisticFit(
        weights=weights,
        intercepts=state.w[..., d]
        - jnp.einsum("pkd,pd->pk", weights, means[batch.owner]),
        objective=state.objective,
        gradient_norm=jnp.sqrt(_dot(state.gradient, state.gradient)),
        gap=state.gap,
        iterations=state.iterations,
        converged=state.gap <= tolerance * state.objective,
    )
    return stored, fit


def _gather(stored: _Rows, x, batch: batching.Batch, means, gathered) -> _Rows:
    """Reads the rows of each block, less the mean of its group, into `stored`.

    Centring changes the intercept only, which is free, and the conditioning much.
    """

    def one(i, stored: _Rows) -> _Rows:
        rows = _rows(x, batch.rows[i]).astype(means.dtype) - means[batch.group[i]]
        longest = jnp.sqrt(jnp.max(jnp.sum(jnp.square(rows), axis=1)))
        values = lax.dynamic_update_slice(stored.values, rows[None], (i, 0, 0))
        return _Rows(values, jnp.maximum(stored.reach, longest))

    reach = jnp.where(gathered > 0, 0, stored.reach)
    return lax.fori_loop(0, gathered, one, stored._replace(reach=reach))


def _dot(a: Float[Array, "p k D"], b: Float[Array, "p k D"]) -> Float[Array, " p"]:
    return jnp.einsum("pkd,pkd->p", a, b)


def _losses(margins, labels, weights):
    """Loss `[c, r]`, and its derivative and probabilities `[c, k, r]` by margin.

    Of a row that is well classified the small numbers are kept: the probability of
    the wrong classes, never one less that of the right one.
    """
    if margins.shape[1] == 1:
        sign = 2 * labels[:, None].astype(margins.dtype) - 1
        right = sign * margins
        small = jnp.exp(-jnp.abs(right))
        p = jnp.where(right >= 0, small, 1) / (1 + small)  # of the wrong class
        loss = jnp.maximum(-right, 0) + jnp.log1p(small)
        loss, residual = loss[:, 0], -sign * p
    else:
        p = jax.nn.softmax(margins, axis=1)
        y = jax.nn.one_hot(labels, margins.shape[1], axis=1, dtype=margins.dtype)
        wrong = jnp.sum(p * (1 - y), axis=1)
        far = jax.nn.logsumexp(margins, axis=1) - jnp.sum(y * margins, axis=1)
        loss = jnp.where(wrong < 0.5, -jnp.log1p(-jnp.minimum(wrong, 0.5)), far)
        residual = jnp.where(y > 0, -wrong[:, None], p)
    return weights * loss, *lax.optimization_barrier((weights[:, None] * residual, p))


def _curve(residual, p, weights, steps):
    """Sums over rows of the first and second derivative along `steps`, `[2, c]`."""
    first = jnp.einsum("ckr,ckr->c", residual, steps)
    if p.shape[1] == 1:
        spread = p * (1 - p) * jnp.square(steps)
    else:
        mean = jnp.sum(p * steps, axis=1, keepdims=True)
        spread = p * jnp.square(steps - mean)
    return jnp.stack([first, jnp.einsum("cr,ckr->c", weights, spread)])


def _iterate(
    stored: _Rows,
    batch: batching.Batch,
    basis: _Basis,
    l2,
    real,
    tolerance,
    max_iterations,
    d: int,
    s: _State,
) -> _State:
    """One step of every active problem."""
    penalised = s.w.at[..., d].set(0)
    live = jnp.append(s.active, False)[batch.problem].any(axis=1)[batch.tile]
    live = live & batch.used & ((batch.share > 0) | ~s.sampling)
    units, count = jnp.nonzero(live, size=len(live), fill_value=0)[0], jnp.sum(live)
    share = jnp.where(s.sampling, batch.share, 1)

    direction = jnp.where(s.restart, s.w, _direction(s, basis, l2, d))
    direction = lax.optimization_barrier(direction)
    downhill = _dot(s.gradient, direction) < 0

    def parts(i):
        block = units[i]
        labels = batch.labels[block]
        weights = (labels >= 0).astype(s.w.dtype) * share[block]
        if batch.weights is not None:
            weights = weights * batch.weights[block]
        return block, batch.tile[block], labels, weights

    # A barrier keeps a block's values in hand; else they are computed in every use.
    # The loops below read from one array and write to another: an array that a loop
    # both reads and updates is copied whole in every pass. Blocks that are skipped
    # lose their margins, which nobody reads again.
    held = lax.optimization_barrier
    empty = jnp.zeros_like(s.margins)

    def by_problem(values, columns):
        return jnp.take(values, columns, axis=0, mode="clip")

    # Margins of a step of length one, and the slope and curvature there.
    def forward(i, carry):
        bases, steps, curve = carry
        block, tile, labels, weights = parts(i)
        columns = batch.problem[tile]
        own = by_problem(direction, columns).reshape(-1, direction.shape[2])
        step = held(_product(own, stored.values[block].T).reshape(bases.shape[1:]))
        undo = by_problem(s.undo, columns)[:, None, None]
        base = s.margins[block] - undo * s.steps[block]
        base = held(jnp.where(s.restart, 0, base))
        _, residual, probability = _losses(base + step, labels, weights)
        both = _curve(residual, probability, weights, step)
        return (
            lax.dynamic_update_index_in_dim(bases, base, block, 0),
            lax.dynamic_update_index_in_dim(steps, step, block, 0),
            curve.at[:, tile].add(both),
        )

    moving = jnp.any(direction != 0)
    curve = jnp.zeros((2, *batch.problem.shape), s.w.dtype)
    bases, steps, curve = lax.fori_loop(
        0, jnp.where(moving, count, 0), forward, (empty, empty, curve)
    )
    slope, bend = (_sides(side, batch) for side in curve)
    step_penalised = direction.at[..., d].set(0)
    bend = bend + l2 * _dot(step_penalised, step_penalised)
    slope = slope + l2 * (
        _dot(penalised, step_penalised) + _dot(step_penalised, step_penalised)
    )
    length = 1 - slope / jnp.maximum(bend, jnp.finfo(s.w.dtype).tiny)
    length = jnp.minimum(jnp.clip(length, 0.2, 4.0), s.limit)
    length = jnp.where(s.active & downhill, length, 0)
    length = jnp.where(s.restart, 1.0, length).astype(s.w.dtype)

    # Objective, gradient and curvature after the step.
    def backward(i, carry):
        margins, gradient, loss, spread = carry
        block, tile, labels, weights = parts(i)
        columns = batch.problem[tile]
        own = by_problem(length, columns)[:, None, None]
        moved = held(bases[block] + own * steps[block])
        losses, residual, probability = _losses(moved, labels, weights)
        flat = residual.reshape(-1, residual.shape[2])
        product = _product(flat, stored.values[block]).reshape(gradient.shape[1:])
        own_spread = jnp.einsum("cr,ckr->ck", weights, probability * (1 - probability))
        return (
            lax.dynamic_update_index_in_dim(margins, moved, block, 0),
            gradient.at[tile].add(product),
            loss.at[tile].add(jnp.sum(losses, axis=1)),
            spread.at[tile].add(own_spread),
        )

    t, c = batch.problem.shape
    outputs, D = s.w.shape[1:]
    margins, gradient, loss, curvature = lax.fori_loop(
        0,
        count,
        backward,
        (
            empty,
            jnp.zeros((t, c, outputs, D), s.w.dtype),
            jnp.zeros((t, c), s.w.dtype),
            jnp.zeros((t, c, outputs), s.w.dtype),
        ),
    )
    step = length[:, None, None] * direction
    w = jnp.where(s.restart, s.w, s.w + step)
    penalised = w.at[..., d].set(0)
    objective = _sides(loss, batch) + 0.5 * l2 * _dot(penalised, penalised)
    gradient = _sides(gradient, batch) + l2[:, None, None] * penalised
    curvature = _sides(curvature, batch)

    # A step is kept if it ends before the minimum along it, or does not climb.
    noise = 32 * jnp.finfo(w.dtype).eps * jnp.abs(s.objective)
    kept = (length * _dot(gradient, direction) <= 0) | (
        objective <= s.objective + noise
    )
    kept = (kept & jnp.isfinite(objective)) | s.restart
    moved = s.active & kept
    change = gradient - s.gradient
    product = _dot(step, change)
    paired = moved & (product > 0) & ~s.restart
    newest = jnp.where(s.restart, s.newest, (s.newest + 1) % MEMORY)

    def pushed(pairs, new, where):
        new = jnp.where(where, new, pairs[newest])
        return lax.dynamic_update_index_in_dim(pairs, new, newest, 0)

    inverse = pushed(s.inverse, 1 / jnp.where(paired, product, 1), paired)
    inverse = jnp.where(downhill | s.restart, inverse, 0)  # forget a bad memory
    pick = moved[:, None, None]
    gradient = jnp.where(pick, gradient, s.gradient)
    objective = jnp.where(moved, objective, s.objective)
    curvature = jnp.where(moved[:, None], curvature, s.curvature)
    gap = jnp.where(moved, _gap(gradient, curvature, l2, stored.reach, d), s.gap)

    wanted = jnp.where(s.sampling, SAMPLE_GAP, tolerance)
    better = (gap < s.best) | (objective < (1 - 1e-5) * s.objective)
    patience = jnp.where(better, PATIENCE, s.patience - 1)
    iterations = s.iterations + s.active
    active = s.active & (gap > wanted * objective) & (patience > 0)
    active = active & (iterations < max_iterations)
    rounds = s.rounds + 1
    ends = s.sampling & (~jnp.any(active) | (rounds >= SAMPLE_ITERATIONS))
    return _State(
        w=jnp.where(pick, w, s.w),
        gradient=gradient,
        objective=objective,
        curvature=curvature,
        gap=gap,
        margins=margins,
        steps=steps,
        undo=jnp.where(s.active & ~kept, length, 0),
        limit=jnp.where(kept, jnp.inf, 0.25 * length).astype(w.dtype),
        moves=pushed(s.moves, step, paired[:, None, None]),
        changes=pushed(s.changes, change, paired[:, None, None]),
        inverse=inverse,
        newest=newest,
        active=jnp.where(ends, real & (iterations < max_iterations), active),
        best=jnp.where(ends, jnp.inf, jnp.minimum(gap, s.best)),
        patience=jnp.where(ends, PATIENCE, patience),
        iterations=iterations,
        sampling=s.sampling & ~ends,
        restart=ends,
        rounds=rounds,
    )


def _sides(values: Array, batch: batching.Batch) -> Array:
    """Sums the columns `[t, c, ...]` of each problem: `[p, ...]`."""
    flat = values.reshape(-1, *values.shape[2:])

    def side(j, total):
        used = batch.slot_used[:, j].reshape(-1, *[1] * (flat.ndim - 1))
        return total + jnp.where(used, flat[batch.slots[:, j]], 0)

    p, sides = batch.slots.shape
    return lax.fori_loop(0, sides, side, jnp.zeros((p, *flat.shape[1:]), flat.dtype))


def _direction(s: _State, basis: _Basis, l2, d: int) -> Float[Array, "p k D"]:
    """Minus the inverse Hessian of L-BFGS times the gradient."""
    order = [(s.newest - j) % MEMORY for j in range(MEMORY)]
    q = -s.gradient
    taken = []
    for j in order:
        a = s.inverse[j] * _dot(s.moves[j], q)
        q = lax.optimization_barrier(q - a[:, None, None] * s.changes[j])
        taken.append(a)
    curvature = s.curvature[..., None]
    flat = 1 / (l2[:, None, None] + curvature * basis.tail)
    top = 1 / (l2[:, None, None] + curvature * basis.variances) - flat
    floor = jnp.finfo(q.dtype).eps
    intercept = q[..., d] / jnp.maximum(s.curvature, floor)
    inner = _product(q, basis.directions) * top
    q = (flat * q + _product(inner, basis.directions.T)).at[..., d].set(intercept)
    for j, a in zip(order[::-1], taken[::-1]):
        b = s.inverse[j] * _dot(s.changes[j], q)
        q = lax.optimization_barrier(q + (a - b)[:, None, None] * s.moves[j])
    return q


def _gap(gradient, curvature, l2, reach, d: int) -> Float[Array, " p"]:
    """Bound on objective - minimum.

    Minimising over the intercept first leaves an l2-strongly convex function of w. Its
    gradient is the one at the best intercept, which is at most 1.06 g_b / a away
    (a: the curvature in b; the loss is self-concordant-like, so for g_b <= a / 10 the
    curvature changes by at most a factor 1.12 on the way).
    """
    a = jnp.min(curvature, axis=1)
    by_intercept = jnp.sqrt(jnp.sum(jnp.square(gradient[..., d]), axis=1))
    by_weights = jnp.sqrt(_dot(gradient.at[..., d].set(0), gradient))
    bound = jnp.square(by_weights + 1.2 * reach * by_intercept) / (2 * l2)
    bound = bound + 0.6 * jnp.square(by_intercept) / a
    return jnp.where(by_intercept <= 0.1 * a, bound, jnp.inf)
