"""Logistic problems of one batch, solved in lockstep.

Conjugate gradients in the locally optimal form: each step is the best one in the span
of the preconditioned gradient, the intercept and the step before, the best by Newton
on the span (three unknowns) and then by Newton along the step. The preconditioner is a
low-rank covariance that all problems share.

Of the rows an iteration makes two products, one for the margins of the new direction
and one for the gradient after the step; the margins of everything else are kept. A step
that ends beyond the minimum and climbs is taken back, and the next is at most a quarter
as long.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from . import batching, passes
from .covariance import Basis
from .passes import exact_product

PATIENCE = 50  # iterations without a better bound after which a problem is given up


class LogisticFit(NamedTuple):
    """Solutions of `p` problems, with a leading `layer` axis where `x` has one.

    weights:       `[p, d]`; `[p, classes, d]` for more than two classes.
    intercepts:    `[p]`; `[p, classes]`.
    objective:     `[p]` the penalised objective at the solution. In float32 it is as
                   exact as margins are: to about 1e-7 of the largest, relatively.
    gradient_norm: `[p]` length of its gradient there, intercepts included.
    gap:           `[p]` bound on objective - minimum.
    iterations:    `[p]` int32.
    converged:     `[p]` gap <= tolerance * objective; False says: not solved to it.
    """

    weights: Array
    intercepts: Array
    objective: Array
    gradient_norm: Array
    gap: Array
    iterations: Array
    converged: Array


class Point(NamedTuple):
    """Of each problem a point of its space, a direction in it, or a gradient."""

    weights: Float[Array, "p k d"]
    intercepts: Float[Array, "p k"]


class _Job(NamedTuple):
    """What does not change while a batch is solved."""

    values: Float[Array, "b r d"]
    reach: Float[Array, ""]
    batch: batching.Batch
    basis: Basis
    l2: Float[Array, " p"]
    tolerance: Float[Array, ""]
    max_iterations: Int[Array, ""]


class _State(NamedTuple):
    """Where the iteration stands, `k` outputs a problem."""

    at: Point
    gradient: Point
    objective: Float[Array, " p"]
    curvature: Float[Array, "p k"]
    gap: Float[Array, " p"]
    last: Point  # the step before; zero where there is none
    margins: Float[Array, "b c k r"]
    moves: Float[Array, "b c k r"]  # the part of the margins that the last step added
    limit: Float[Array, " p"]  # longest step allowed
    active: Bool[Array, " p"]
    best: Float[Array, " p"]
    patience: Int[Array, " p"]
    iterations: Int[Array, " p"]


@jax.jit
def solve(
    rows: passes.Rows,
    batch: batching.Batch,
    basis: Basis,
    l2: Float[Array, " p"],
    begin: Point,
    active: Bool[Array, " p"],
    tolerance: Float[Array, ""],
    max_iterations: Int[Array, " s"],
) -> LogisticFit:
    """Solves the active problems of a batch over its gathered rows, in `s` rounds.

    A round before the last, of one iteration, only looks at the start: a problem for
    which zero is better begins there. (A far start would also leave its rounding in
    the sums that are kept up to date from it.)
    """
    outputs = max(begin.weights.shape[1], 2)
    by_block = jnp.sum(_weights(batch, rows.values.dtype), axis=2) * np.log(outputs)
    by_tile = jax.ops.segment_sum(by_block, batch.tile, len(batch.problem))
    at_zero = _sides(by_tile, batch)

    def one(begin: Point, most):
        job = _Job(rows.values, rows.reach, batch, basis, l2, tolerance, most)
        fit = _solve(job, rows, begin, active)
        end = Point(fit.weights, fit.intercepts)
        zero = jax.tree.map(jnp.zeros_like, end)
        return _chosen(fit.objective < at_zero, end, zero), fit

    _, fits = lax.scan(one, begin, max_iterations)
    return jax.tree.map(lambda a: a[-1], fits)


def _solve(job: _Job, rows: passes.Rows, begin: Point, active) -> LogisticFit:
    batch = job.batch
    (b, c, r), (p, k, _) = batch.labels.shape, begin.weights.shape
    zeros = functools.partial(jnp.zeros, dtype=rows.values.dtype)
    begin = _among_classes(begin)
    at = Point(begin.weights, begin.intercepts + _at_means(begin.weights, rows, batch))
    state = _State(
        at=at,
        gradient=jax.tree.map(jnp.zeros_like, at),
        objective=zeros(p) + jnp.inf,
        curvature=zeros((p, k)) + 1,
        gap=zeros(p) + jnp.inf,
        last=jax.tree.map(jnp.zeros_like, at),
        margins=zeros((b, c, k, r)),
        moves=zeros((b, c, k, r)),
        limit=zeros(p) + jnp.inf,
        active=jnp.asarray(active),
        best=zeros(p) + jnp.inf,
        patience=jnp.full(p, PATIENCE, jnp.int32),
        iterations=jnp.zeros(p, jnp.int32),
    )
    state = lax.while_loop(
        lambda s: jnp.any(s.active), functools.partial(_iterate, job), state
    )
    weights, intercepts = state.at
    means = rows.means[batch.owner][:, None]
    by_weights = state.gradient.weights + state.gradient.intercepts[..., None] * means
    gradient = state.gradient._replace(weights=by_weights)  # of rows as they were
    return LogisticFit(
        weights=weights,
        intercepts=intercepts - _at_means(weights, rows, batch),
        objective=state.objective,
        gradient_norm=jnp.sqrt(_dot(gradient, gradient)),
        gap=state.gap,
        iterations=state.iterations,
        converged=_solved(state.gap, state.objective, job.tolerance),
    )


def _solved(gap, objective, tolerance) -> Bool[Array, " p"]:
    return jnp.isfinite(objective) & (gap <= tolerance * objective)


def _at_means(weights, rows: passes.Rows, batch) -> Float[Array, "p k"]:
    """Margins of each problem at the mean that was taken off its rows."""
    means = rows.means[batch.owner]
    return jnp.einsum("pkd,pd->pk", weights, means, precision="highest")


def _dot(a: Point, b: Point) -> Float[Array, " p"]:
    by_intercept = jnp.sum(a.intercepts * b.intercepts, axis=1)
    return by_intercept + _inner(a.weights, b.weights)


def _inner(a: Float[Array, "p k d"], b: Float[Array, "p k d"]) -> Float[Array, " p"]:
    return jnp.sum(a * b, axis=(1, 2))


def _scaled(length: Float[Array, " p"], a: Point) -> Point:
    return Point(length[:, None, None] * a.weights, length[:, None] * a.intercepts)


def _plus(a: Point, b: Point) -> Point:
    return jax.tree.map(jnp.add, a, b)


def _chosen(where: Bool[Array, "*p"], a, b):
    """Of each problem what `a` has, or `b`."""

    def one(a, b):
        return jnp.where(where.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(one, a, b)


def _minimiser(bend, slope) -> list[Array]:
    """Where a quadratic of these derivatives is least: coefficients, by elimination.

    A direction that those before it span, to rounding, is left out.
    """
    n, inverse = len(slope), []
    least = [100 * jnp.finfo(one.dtype).eps * bend[i][i] for i, one in enumerate(slope)]
    upper = [[bend[j][i] for j in range(i, n)] for i in range(n)]
    right = [-one for one in slope]
    for i in range(n):
        pivot = upper[i][0]
        inverse.append(jnp.where(pivot > least[i], 1 / pivot, 0))
        for j in range(i + 1, n):
            factor = upper[i][j - i] * inverse[i]
            right[j] = right[j] - factor * right[i]
            for m in range(j, n):
                upper[j][m - j] = upper[j][m - j] - factor * upper[i][m - i]
    found: list[Array] = []
    for i in reversed(range(n)):
        rest = sum(u * v for u, v in zip(upper[i][1:], found))
        found.insert(0, inverse[i] * (right[i] - rest))
    return found


def _iterate(job: _Job, s: _State) -> _State:
    """One step of every active problem."""
    batch, l2 = job.batch, job.l2
    first = jnp.all(s.iterations == 0)  # only makes the margins, from `at`
    units, block = _units(job, s)
    whole = _chosen(first, s.at, _direction(s, job.basis, l2))
    ahead, shift = lax.optimization_barrier(whole)
    skip = first & jnp.all(ahead == 0)
    steps, curved = passes.forward(units, skip, block, s.moves, ahead, shift)
    last = s.last.weights
    pairs = list(_sides(curved, batch).T)
    bend = [pairs[:1], pairs[1:3], pairs[3:]]
    bend[1][1] += l2 * _inner(ahead, ahead)
    bend[2][1] += l2 * _inner(ahead, last)
    bend[2][2] += l2 * _inner(last, last)
    slope = [jnp.sum(s.gradient.intercepts * shift, axis=1)]
    slope += [_inner(s.gradient.weights, ahead), _dot(s.gradient, s.last)]
    mix = [  # of the intercept's part, the weights' and the last step; all of the first
        jnp.where(first, one, own)
        for one, own in zip((1, 1, 0), _minimiser(bend, slope))
    ]
    step = _plus(
        Point(mix[1][:, None, None] * ahead, mix[0][:, None] * shift),
        _scaled(mix[2], s.last),
    )
    step = lax.optimization_barrier(step)

    def by_column(values):
        own = passes.by_column(values, block.problem)
        return own.reshape(*own.shape[:2], -1, 1)

    move = by_column(mix[1]) * steps + by_column(mix[2]) * s.moves
    move = lax.optimization_barrier(move + by_column(mix[0][:, None] * shift))
    slopes = _sides(passes.along(units, first, block, move), batch)
    rise = slopes[:, 0] + l2 * _inner(step.weights, s.at.weights + step.weights)
    bent = slopes[:, 1] + l2 * _inner(step.weights, step.weights)
    length = 1 - rise / jnp.maximum(bent, jnp.finfo(bent.dtype).tiny)
    length = jnp.minimum(jnp.clip(length, 0.2, 4.0), s.limit)
    length = jnp.where(s.active & jnp.isfinite(length), length, 0)
    length = jnp.where(first, 1.0, length).astype(bent.dtype)
    step, move = _scaled(length, step), by_column(length) * move
    at = _chosen(first, s.at, _plus(s.at, step))
    margins, move = lax.optimization_barrier((s.margins + move, move))

    found = _sides(passes.backward(units, block._replace(margins=margins)), batch)
    objective = found.loss + 0.5 * l2 * _inner(at.weights, at.weights)
    gradient = Point(found.weights + l2[:, None, None] * at.weights, found.intercepts)

    # A step is kept if it ends before the minimum along it, or does not climb.
    noise = 32 * jnp.finfo(objective.dtype).eps * jnp.abs(s.objective)
    kept = (_dot(gradient, step) <= 0) | (objective <= s.objective + noise)
    kept = (kept & jnp.isfinite(objective)) | first
    moved = s.active & kept
    gradient, curvature = _chosen(
        moved, (gradient, found.curvature), (s.gradient, s.curvature)
    )
    objective = jnp.where(moved, objective, s.objective)
    gap = jnp.where(moved, _gap(gradient, curvature, l2, job.reach), s.gap)
    better = (gap < s.best) | (objective < (1 - 1e-5) * s.objective)
    patience = jnp.where(better, PATIENCE, s.patience - 1)
    iterations = s.iterations + s.active
    active = s.active & ~_solved(gap, objective, job.tolerance) & (patience > 0)
    stays = by_column(s.active & ~kept)
    return _State(
        at=_chosen(moved, at, s.at),
        gradient=gradient,
        objective=objective,
        curvature=curvature,
        gap=gap,
        last=_chosen(moved & ~first, step, jax.tree.map(jnp.zeros_like, step)),
        margins=jnp.where(stays, s.margins, margins),
        moves=jnp.where(stays | first, 0, move),
        limit=jnp.where(kept, jnp.inf, 0.25 * length).astype(length.dtype),
        active=active & (iterations < job.max_iterations),
        best=jnp.minimum(gap, s.best),
        patience=patience,
        iterations=iterations,
    )


def _units(job: _Job, s: _State) -> tuple[passes.Units, passes.Block]:
    """The blocks with an unsolved problem, and all blocks."""
    batch, tiles = job.batch, len(job.batch.problem)
    live = jnp.append(s.active, False)[batch.problem].any(axis=1)[batch.tile]
    live = live & batch.used
    order = jnp.nonzero(live, size=len(live), fill_value=0)[0]
    weights = _weights(batch, s.margins.dtype)
    tile, problem = jnp.asarray(batch.tile), jnp.asarray(batch.problem)[batch.tile]
    return passes.Units(order, jnp.sum(live), tile, tiles), passes.Block(
        job.values, problem, jnp.asarray(batch.labels), weights, s.margins
    )


def _weights(batch: batching.Batch, dtype) -> Float[Array, "b c r"]:
    """Of each row in each column; zero where it has no part."""
    weights = jnp.asarray(batch.labels >= 0, dtype)
    return weights if batch.weights is None else weights * batch.weights.astype(dtype)


def _sides(values, batch: batching.Batch):
    """Sums the columns `[t, c, ...]` of each problem: `[p, ...]`."""

    def summed(values):
        flat = values.reshape(-1, *values.shape[2:])

        def side(j, total):
            used = batch.slot_used[:, j].reshape(-1, *[1] * (flat.ndim - 1))
            return total + jnp.where(used, flat[batch.slots[:, j]], 0)

        p, sides = batch.slots.shape
        return lax.fori_loop(
            0, sides, side, jnp.zeros((p, *flat.shape[1:]), flat.dtype)
        )

    return jax.tree.map(summed, values)


def _direction(s: _State, basis: Basis, l2) -> Point:
    """Minus the gradient times about the inverse Hessian."""
    curvature = s.curvature[..., None]
    flat = 1 / (l2[:, None, None] + curvature * basis.tail)
    top = 1 / (l2[:, None, None] + curvature * basis.variances) - flat
    inner = exact_product(s.gradient.weights, basis.directions) * top
    by_weights = flat * s.gradient.weights + exact_product(inner, basis.directions.T)
    floor = jnp.finfo(by_weights.dtype).eps
    by_intercepts = s.gradient.intercepts / jnp.maximum(s.curvature, floor)
    return _among_classes(Point(-by_weights, -by_intercepts))


def _among_classes(a: Point) -> Point:
    """Less what all classes share, if there are many.

    The losses do not see it, so that it is zero at the optimum, and a direction that
    has a part in it is badly scaled: only the penalty bends there.
    """
    if a.intercepts.shape[1] == 1:
        return a
    return jax.tree.map(lambda part: part - jnp.mean(part, axis=1, keepdims=True), a)


def _gap(gradient: Point, curvature, l2, reach) -> Float[Array, " p"]:
    """Bound on objective - minimum.

    Minimising over the intercept first leaves an l2-strongly convex function of w. Its
    gradient is the one at the best intercept, which is at most 1.06 g_b / a away
    (a: the curvature in b; the loss is self-concordant-like, so for g_b <= a / 10 the
    curvature changes by at most a factor 1.12 on the way).
    """
    a = jnp.min(curvature, axis=1)
    by_intercept = jnp.sqrt(jnp.sum(jnp.square(gradient.intercepts), axis=1))
    by_weights = jnp.sqrt(_inner(gradient.weights, gradient.weights))
    bound = jnp.square(by_weights + 1.2 * reach * by_intercept) / (2 * l2)
    bound = bound + 0.6 * jnp.square(by_intercept) / a
    return jnp.where(by_intercept <= 0.1 * a, bound, jnp.inf)
