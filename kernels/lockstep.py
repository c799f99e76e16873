"""Logistic problems of one batch, solved in lockstep.

Conjugate gradients in the locally optimal form: each step is the best one in the span
of the preconditioned gradient, the intercept and the step before, the best by Newton
on the span (three unknowns) and then by Newton along the step. The preconditioner is a
low-rank covariance that all problems share.

Of the rows an iteration makes two products, one for the margins of the new direction
and one for the gradient after the step; the margins of everything else are kept. A pass
visits the blocks of rows that still have unsolved problems; how many there are is data,
so blocks whose problems are solved cost nothing. A step that ends beyond the minimum
and climbs is taken back and tried again at a quarter.

Tiles of many blocks are first solved on an eighth of them, where most iterations go.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from . import batching

RANK = 56  # of the covariance in the preconditioner
SPAN = 64  # of the search for it; LAPACK wakes threads for more, a hundred times slower
SAMPLE_GAP = 0.01  # relative bound at which the phase on a sample of the rows ends
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


class Rows(NamedTuple):
    """Centred rows in blocks, a one after the features; the length of the longest."""

    values: Float[Array, "b r D"]
    reach: Float[Array, ""]


class Basis(NamedTuple):
    """Leading directions and variances of the rows; the mean of the other variances."""

    directions: Float[Array, "D rank"]
    variances: Float[Array, " rank"]
    tail: Float[Array, ""]


class _Job(NamedTuple):
    """What does not change while a batch is solved; `d` features."""

    stored: Rows
    batch: batching.Batch
    basis: Basis
    l2: Float[Array, " p"]
    real: Bool[Array, " p"]  # False where the batch is padded
    tolerance: Float[Array, ""]
    max_iterations: Int[Array, ""]
    d: int


class _State(NamedTuple):
    """Where the iteration stands; `w` is weights and intercept, `k` outputs each."""

    w: Float[Array, "p k D"]
    gradient: Float[Array, "p k D"]
    objective: Float[Array, " p"]
    curvature: Float[Array, "p k"]
    gap: Float[Array, " p"]
    last: Float[Array, "p k D"]  # the step before; zero where there is none
    margins: Float[Array, "b c k r"]
    moves: Float[Array, "b c k r"]  # the part of the margins that the last step added
    rejected: Bool[Array, " p"]  # that step was no good: it is to be taken off
    limit: Float[Array, " p"]  # longest step allowed
    active: Bool[Array, " p"]
    best: Float[Array, " p"]
    patience: Int[Array, " p"]
    iterations: Int[Array, " p"]
    sampling: Bool[Array, ""]
    restart: Bool[Array, ""]  # the margins are to be made from `w`
    rounds: Int[Array, ""]


def exact_product(a: Array, b: Array) -> Array:
    """Never TF32 or bfloat16: the certificate needs the gradient's last digits."""
    return jnp.matmul(
        a, b, precision=lax.Precision.HIGHEST, preferred_element_type=a.dtype
    )


_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def rows_of(x: Array, rows) -> Array:
    """Rows of `[n, d]` or of `[layer, n, d]`, counted through all layers."""
    return x.reshape(-1, x.shape[-1])[rows]


@functools.partial(jax.jit, static_argnums=2)
def covariance_basis(
    x: Float[Array, "*l n d"], pairs: Int[Array, "2 m"], dtype
) -> Basis:
    """Spectrum of the covariance within tiles, from differences of pairs of rows."""
    difference = rows_of(x, pairs[0]).astype(dtype) - rows_of(x, pairs[1]).astype(dtype)
    m, d = difference.shape
    covariance = exact_product(difference.T, difference) / (2 * m)
    if d <= SPAN:
        variances, directions = jnp.linalg.eigh(covariance)
        tail = jnp.zeros((), dtype)
    else:
        span = jax.random.normal(jax.random.key(0), (d, SPAN), dtype)
        for _ in range(3):  # subspace iteration: a preconditioner may be rough
            span = _orthonormal(exact_product(covariance, span))
        inner = exact_product(span.T, exact_product(covariance, span))
        variances, rotation = jnp.linalg.eigh(inner)
        variances = variances[-RANK:]
        directions = exact_product(span, rotation[:, -RANK:])
        rest = jnp.trace(covariance) - jnp.sum(variances)
        tail = jnp.maximum(rest, 0) / (d - RANK)
    padded = jnp.pad(directions, ((0, padded_width(d) - d), (0, 0)))
    # A direction without variance is not one along which a step may be unbounded.
    floor = 1e-6 * variances[-1]
    return Basis(padded, jnp.maximum(variances, floor), jnp.maximum(tail, floor))


def _orthonormal(span: Float[Array, "d m"]) -> Float[Array, "d m"]:
    """Its columns made orthonormal, but shorter where they are dependent.

    By Cholesky, which is products: QR takes longer here than an iteration of all.
    """
    gram = exact_product(span.T, span)
    ridge = 10 * jnp.finfo(span.dtype).eps * jnp.trace(gram)
    tiny = jnp.finfo(span.dtype).tiny
    one = jnp.eye(len(gram), dtype=span.dtype)
    root = jnp.linalg.cholesky(gram + (ridge + tiny) * one)
    inverse = lax.linalg.triangular_solve(root, one, left_side=True, lower=True)
    return exact_product(span, inverse.T)


def padded_width(d: int) -> int:
    """Width of a stored row of `d` features: those, a one, and zeros."""
    return -(-(d + 1) // LANES) * LANES


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_blocks(b: int, r: int, d: int, dtype) -> Float[Array, "b r D"]:
    """Space for the rows of a batch; the feature after the last one is the constant."""
    # Not zeros with a column set: XLA would fold that into a constant of this size.
    constant = (jnp.arange(padded_width(d)) == d).astype(dtype)
    return jnp.broadcast_to(constant, (b, r, padded_width(d)))


@functools.partial(jax.jit, static_argnames=("outputs",), donate_argnums=(0,))
def solve(
    stored: Rows,
    x: Float[Array, "*l n d"],
    offset: Int[Array, ""],
    batch: batching.Batch,
    basis: Basis,
    l2: Float[Array, " p"],
    real: Bool[Array, " p"],
    begin,
    gathered: Int[Array, ""],
    tolerance: Float[Array, ""],
    max_iterations: Int[Array, ""],
    *,
    outputs: int,
) -> tuple[Rows, LogisticFit]:
    """Solves a batch. The first `gathered` blocks of rows are read from `x` anew."""
    d, dtype = x.shape[-1], stored.values.dtype
    batch = batch._replace(rows=batch.rows + offset, centre=batch.centre + offset)
    means = jnp.mean(rows_of(x, batch.centre).astype(dtype), axis=1)
    stored = _gather(stored, x, batch, means, gathered)
    p, (b, c, r), D = len(l2), batch.labels.shape, stored.values.shape[2]
    zeros = functools.partial(jnp.zeros, dtype=dtype)
    w = zeros((p, outputs, D))
    if begin is not None:
        centred = begin[1] + _einsum("pkd,pd->pk", begin[0], means[batch.owner])
        w = w.at[..., :d].set(begin[0]).at[..., d].set(centred)
    state = _State(
        w=w,
        gradient=zeros((p, outputs, D)),
        objective=jnp.full(p, jnp.inf, dtype),
        curvature=jnp.ones((p, outputs), dtype),
        gap=jnp.full(p, jnp.inf, dtype),
        last=zeros((p, outputs, D)),
        margins=zeros((b, c, outputs, r)),
        moves=zeros((b, c, outputs, r)),
        rejected=jnp.zeros(p, bool),
        limit=jnp.full(p, jnp.inf, dtype),
        active=real,
        best=jnp.full(p, jnp.inf, dtype),
        patience=jnp.full(p, PATIENCE, jnp.int32),
        iterations=jnp.zeros(p, jnp.int32),
        sampling=jnp.any(batch.used & (batch.share != 1)) & (begin is None),
        restart=jnp.array(True),
        rounds=jnp.int32(0),
    )
    job = _Job(stored, batch, basis, l2, real, tolerance, max_iterations, d)
    state = lax.while_loop(
        lambda s: jnp.any(s.active), functools.partial(_iterate, job), state
    )
    weights = state.w[..., :d]
    fit = LogisticFit(
        weights=weights,
        intercepts=state.w[..., d] - _einsum("pkd,pd->pk", weights, means[batch.owner]),
        objective=state.objective,
        gradient_norm=jnp.sqrt(_dot(state.gradient, state.gradient)),
        gap=state.gap,
        iterations=state.iterations,
        converged=state.gap <= tolerance * state.objective,
    )
    return stored, fit


def _gather(stored: Rows, x, batch: batching.Batch, means, gathered) -> Rows:
    """Reads the rows of each block, less the mean of its group, into `stored`.

    Centring changes the intercept only, which is free, and the conditioning much.
    """

    def one(i, stored: Rows) -> Rows:
        rows = rows_of(x, batch.rows[i]).astype(means.dtype) - means[batch.group[i]]
        longest = jnp.sqrt(jnp.max(jnp.sum(jnp.square(rows), axis=1)))
        values = lax.dynamic_update_slice(stored.values, rows[None], (i, 0, 0))
        return Rows(values, jnp.maximum(stored.reach, longest))

    reach = jnp.where(gathered > 0, 0, stored.reach)
    return lax.fori_loop(0, gathered, one, stored._replace(reach=reach))


def _dot(a: Float[Array, "p k D"], b: Float[Array, "p k D"]) -> Float[Array, " p"]:
    return jnp.sum(a * b, axis=(1, 2))  # fused with the slices of its operands


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


def _bend(p, weights, directions):
    """Second derivatives `[c]` along all pairs i >= j of directions `[c, k, r]`."""
    if p.shape[1] == 1:
        mass = weights[:, None] * p * (1 - p)
    else:
        mass = weights[:, None] * p
        directions = [v - jnp.sum(p * v, axis=1, keepdims=True) for v in directions]
    mass = lax.optimization_barrier(mass)
    return [
        [jnp.sum(mass * u * v, axis=(1, 2)) for v in directions[: i + 1]]
        for i, u in enumerate(directions)
    ]


class _Units(NamedTuple):
    """The blocks that a pass visits: the first `count` of `blocks`, and their share."""

    blocks: Int[Array, " b"]
    count: Int[Array, ""]  # type: ignore[assignment]  # a tuple has a method of that name
    share: Float[Array, " b"]


def _units(job: _Job, s: _State) -> _Units:
    """Blocks with an unsolved problem; in the first phase, of those the sampled."""
    batch = job.batch
    live = jnp.append(s.active, False)[batch.problem].any(axis=1)[batch.tile]
    live = live & batch.used & ((batch.share > 0) | ~s.sampling)
    blocks = jnp.nonzero(live, size=len(live), fill_value=0)[0]
    return _Units(blocks, jnp.sum(live), jnp.where(s.sampling, batch.share, 1))


def _visited(job: _Job, units: _Units, i):
    """Block i of a pass: number, tile, problems of its columns, labels, weights."""
    batch, block = job.batch, units.blocks[i]
    tile, labels = batch.tile[block], batch.labels[block]
    weights = (labels >= 0).astype(units.share.dtype) * units.share[block]
    if batch.weights is not None:
        weights = weights * batch.weights[block]
    return block, tile, batch.problem[tile], labels, weights


def _by_column(values: Array, problems: Int[Array, " c"]) -> Array:
    return jnp.take(values, problems, axis=0, mode="clip")


def _added(total: Array, i, value: Array) -> Array:
    return lax.dynamic_update_index_in_dim(total, total[i] + value, i, 0)


# In all passes a barrier keeps a block's values in hand, else they are computed anew
# in every use. And a pass reads from one array and writes to another: an array that a
# loop both reads and updates is copied whole for every block. Blocks that are not
# visited lose their margins, which nobody reads again.


def _stand(s: _State, block, problems):
    """A block's margins where `w` stands, and those of the step that led there."""
    rejected = _by_column(s.rejected, problems)[:, None, None]
    moves = s.moves[block]
    base = jnp.where(rejected, s.margins[block] - moves, s.margins[block])
    moves = jnp.where(rejected | s.restart, 0, moves)
    return lax.optimization_barrier((jnp.where(s.restart, 0, base), moves))


class _Mix(NamedTuple):
    """A step of each problem, as multiples of its intercept's part of the direction,
    of the weights' part, and of the last step.
    """

    shift: Float[Array, " p"]
    ahead: Float[Array, " p"]
    again: Float[Array, " p"]


def _forward(job: _Job, s: _State, units: _Units, ahead, intercept):
    """Margins `[b, c, k, r]` of the weights `ahead`, and second derivatives of the
    losses, `[t, c, 6]`: by pairs (0, 0), (1, 0), (1, 1), ... of the parts of `_Mix`.
    """

    def one(i, carry):
        steps, bend = carry
        block, tile, problems, labels, weights = _visited(job, units, i)
        own = _by_column(ahead, problems).reshape(-1, ahead.shape[2])
        step = exact_product(own, job.stored.values[block].T)
        step = lax.optimization_barrier(step.reshape(steps.shape[1:]))
        base, moves = _stand(s, block, problems)
        _, _, p = _losses(base, labels, weights)
        shift = jnp.broadcast_to(_by_column(intercept, problems)[..., None], step.shape)
        sums = sum(_bend(p, weights, [shift, step, moves]), [])
        return (
            lax.dynamic_update_index_in_dim(steps, step, block, 0),
            _added(bend, tile, jnp.stack(sums, axis=1)),
        )

    bend = jnp.zeros((*job.batch.problem.shape, 6), ahead.dtype)
    count = jnp.where(jnp.any(ahead != 0), units.count, 0)
    return lax.fori_loop(0, count, one, (jnp.zeros_like(s.margins), bend))


def _mixed(intercept, mix: _Mix, problems, step, moves):
    """What the step adds to the margins of a block, `[c, k, r]`."""
    own = jax.tree.map(lambda n: _by_column(n, problems)[:, None, None], mix)
    shift = own.shift * _by_column(intercept, problems)[..., None]
    return lax.optimization_barrier(own.ahead * step + own.again * moves + shift)


def _along(job: _Job, s: _State, units: _Units, steps, intercept, mix: _Mix):
    """First and second derivative `[t, c, 2]` of the losses after the whole step."""

    def one(i, slopes):
        block, tile, problems, labels, weights = _visited(job, units, i)
        base, moves = _stand(s, block, problems)
        step = _mixed(intercept, mix, problems, steps[block], moves)
        _, residual, p = _losses(base + step, labels, weights)
        first = jnp.sum(residual * step, axis=(1, 2))
        ((second,),) = _bend(p, weights, [step])
        return _added(slopes, tile, jnp.stack([first, second], axis=1))

    start = jnp.zeros((*job.batch.problem.shape, 2), intercept.dtype)
    return lax.fori_loop(0, jnp.where(s.restart, 0, units.count), one, start)


def _backward(job: _Job, s: _State, units: _Units, steps, intercept, mix: _Mix):
    """After the step: margins and what it added to them, and by column the gradient,
    loss and curvature.
    """

    def one(i, carry):
        margins, moved, gradient, loss, spread = carry
        block, tile, problems, labels, weights = _visited(job, units, i)
        base, moves = _stand(s, block, problems)
        step = _mixed(intercept, mix, problems, steps[block], moves)
        base = lax.optimization_barrier(base + step)
        losses, residual, p = _losses(base, labels, weights)
        flat = residual.reshape(-1, residual.shape[2])
        sums = exact_product(flat, job.stored.values[block])
        return (
            lax.dynamic_update_index_in_dim(margins, base, block, 0),
            lax.dynamic_update_index_in_dim(
                moved, jnp.where(s.restart, 0, step), block, 0
            ),
            _added(gradient, tile, sums.reshape(gradient.shape[1:])),
            _added(loss, tile, jnp.sum(losses, axis=1)),
            _added(spread, tile, _einsum("cr,ckr->ck", weights, p * (1 - p))),
        )

    (t, c), (_, k, width) = job.batch.problem.shape, s.w.shape
    zeros = functools.partial(jnp.zeros, dtype=s.w.dtype)
    empty = jnp.zeros_like(steps)
    sums = zeros((t, c, k, width)), zeros((t, c)), zeros((t, c, k))
    return lax.fori_loop(0, units.count, one, (empty, empty, *sums))


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
    l2, d = job.l2, job.d
    units = _units(job, s)
    direction = jnp.where(s.restart, s.w, _direction(s, job.basis, l2, d))
    ahead = lax.optimization_barrier(direction.at[..., d].set(0))
    intercept = direction[..., d]
    steps, bend = _forward(job, s, units, ahead, intercept)
    again = s.last.at[..., d].set(0)
    bend = list(_sides(bend, job.batch).T)
    bend = [bend[:1], bend[1:3], bend[3:]]
    bend[1][1] += l2 * _dot(ahead, ahead)
    bend[2][1] += l2 * _dot(ahead, again)
    bend[2][2] += l2 * _dot(again, again)
    slope = [jnp.sum(s.gradient[..., d] * intercept, axis=1)]
    slope += [_dot(s.gradient, ahead), _dot(s.gradient, s.last)]
    whole = zip((1, 1, 0), _minimiser(bend, slope))  # after a restart, all of it
    mix = _Mix(*[jnp.where(s.restart, one, own) for one, own in whole])

    step = mix.ahead[:, None, None] * ahead + mix.again[:, None, None] * s.last
    step = step.at[..., d].add(mix.shift[:, None] * intercept)
    step = lax.optimization_barrier(step)
    along = step.at[..., d].set(0)
    slopes = _sides(_along(job, s, units, steps, intercept, mix), job.batch)
    rise = slopes[:, 0] + l2 * _dot(along, s.w + step)
    bent = slopes[:, 1] + l2 * _dot(along, along)
    length = 1 - rise / jnp.maximum(bent, jnp.finfo(s.w.dtype).tiny)
    length = jnp.minimum(jnp.clip(length, 0.2, 4.0), s.limit)
    length = jnp.where(s.active & jnp.isfinite(length), length, 0)
    length = jnp.where(s.restart, 1.0, length).astype(s.w.dtype)
    mix = jax.tree.map(lambda own: length * own, mix)
    step = length[:, None, None] * step

    margins, moves, gradient, loss, curvature = _backward(
        job, s, units, steps, intercept, mix
    )
    w = jnp.where(s.restart, s.w, s.w + step)
    penalised = w.at[..., d].set(0)
    objective = _sides(loss, job.batch) + 0.5 * l2 * _dot(penalised, penalised)
    gradient = _sides(gradient, job.batch) + l2[:, None, None] * penalised
    curvature = _sides(curvature, job.batch)

    # A step is kept if it ends before the minimum along it, or does not climb.
    noise = 32 * jnp.finfo(w.dtype).eps * jnp.abs(s.objective)
    kept = (_dot(gradient, step) <= 0) | (objective <= s.objective + noise)
    kept = (kept & jnp.isfinite(objective)) | s.restart
    moved = s.active & kept

    pick = moved[:, None, None]
    gradient = jnp.where(pick, gradient, s.gradient)
    objective = jnp.where(moved, objective, s.objective)
    curvature = jnp.where(moved[:, None], curvature, s.curvature)
    gap = jnp.where(moved, _gap(gradient, curvature, l2, job.stored.reach, d), s.gap)
    better = (gap < s.best) | (objective < (1 - 1e-5) * s.objective)
    patience = jnp.where(better, PATIENCE, s.patience - 1)
    iterations, rounds = s.iterations + s.active, s.rounds + 1
    wanted = jnp.where(s.sampling, SAMPLE_GAP, job.tolerance)
    active = s.active & (gap > wanted * objective) & (patience > 0)
    active = active & (iterations < job.max_iterations)
    ends = s.sampling & (~jnp.any(active) | (rounds >= SAMPLE_ITERATIONS))
    return _State(
        w=jnp.where(pick, w, s.w),
        gradient=gradient,
        objective=objective,
        curvature=curvature,
        gap=gap,
        last=jnp.where(pick & ~s.restart & ~ends, step, 0),
        margins=margins,
        moves=moves,
        rejected=s.active & ~kept,
        limit=jnp.where(kept, jnp.inf, 0.25 * length).astype(w.dtype),
        active=jnp.where(ends, job.real & (iterations < job.max_iterations), active),
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


def _direction(s: _State, basis: Basis, l2, d: int) -> Float[Array, "p k D"]:
    """Minus the gradient times about the inverse Hessian."""
    curvature = s.curvature[..., None]
    flat = 1 / (l2[:, None, None] + curvature * basis.tail)
    top = 1 / (l2[:, None, None] + curvature * basis.variances) - flat
    inner = exact_product(s.gradient, basis.directions) * top
    by_weights = flat * s.gradient + exact_product(inner, basis.directions.T)
    floor = jnp.finfo(by_weights.dtype).eps
    by_intercept = s.gradient[..., d] / jnp.maximum(s.curvature, floor)
    return -by_weights.at[..., d].set(by_intercept)


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
