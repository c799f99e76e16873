"""How alike in shape two spaces are: spectra, cosines, neighbour graphs, components.

What the literature on cross-lingual embeddings calls isomorphism. Every measure works
on plain `[n, d]` matrices, or on batches of them: leading axes broadcast. It keeps
float64 where it is enabled and computes in float32 otherwise, and never holds an
`[n, n]` matrix unless it says so.

A space with a number in it that is not finite has NaN for every measure. A zero row is
a row like any other for `spectrum` and the spanning tree. Where cosines count it has
none: `relational_similarity` takes 0 for them, and in the graphs of
`eigenvector_similarity` nothing is joined to it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import numerics


class Spectrum(NamedTuple):
    """Summary of a matrix's singular values; see `spectrum`."""

    singular_values: Array
    effective_rank: Array
    effective_condition_number: Array
    condition_number: Array


def spectrum(x: ArrayLike, *, center: bool = True) -> Spectrum:
    """Singular values of `x` and what follows from them.

        effective rank  = exp(H(s / sum s)),  H in nats
        effective condition number = s_1 / s_r,  r = floor(effective rank)
        condition number = s_1 / s_last,  the last that is not zero

    Roy & Vetterli, 2007; Dubossarsky et al., 2020, https://arxiv.org/abs/2001.11136.

    Args:
      x: `[..., n, d]`.
      center: subtract the column means first.

    Returns:
      `singular_values [..., min(n, d)]` descending, those within rounding of zero as
      zero (with centring at least one where n <= d), and three `[...]` numbers. A zero
      matrix has effective rank 0 and condition numbers NaN; one that is not finite has
      NaN everywhere.

    Raises:
      ValueError: fewer than two axes, or an empty matrix.
    """
    x = numerics.widened(x)
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"`x` must be [..., n, d], not empty; got {tuple(x.shape)}.")
    return _spectrum(x, bool(center))


@functools.partial(jax.jit, static_argnums=1)
def _spectrum(x, center):
    x = _finite_or_nan(x)
    floor = numerics.rounding_floor(x)[..., None]
    values = jnp.linalg.svd(numerics.centered(x) if center else x, compute_uv=False)
    values = jnp.where(values <= floor, 0.0, values)
    total = values.sum(-1, keepdims=True)
    share = values / jnp.where(total > 0, total, 1.0)
    safe = jnp.where(share > 0, share, 1.0)
    entropy = -jnp.sum(share * jnp.log(safe), -1)
    rank = jnp.where(total[..., 0] == 0, 0.0, jnp.exp(entropy))
    # A rank within rounding of an integer is that integer: floor(2.9999998) is 3.
    last = jnp.floor(rank * (1 + 8 * jnp.finfo(x.dtype).eps)).astype(int) - 1
    smallest = jnp.take_along_axis(values, jnp.maximum(last, 0)[..., None], -1)[..., 0]
    least = jnp.min(jnp.where(values > 0, values, jnp.inf), -1)
    effective, plain = (
        jnp.where(rank > 0, values[..., 0] / s, jnp.nan) for s in (smallest, least)
    )
    return Spectrum(values, rank, effective, plain)


def singular_value_gap(x: Spectrum, y: Spectrum) -> Array:
    """Sum of squared gaps between two log spectra, `sum_i (log s_i - log t_i)^2`.

    Leading axes broadcast. Both spaces must have the same number of singular values;
    the measure is not comparable between sample sizes. Infinite where one space lacks
    a direction that the other has. Dubossarsky et al., 2020,
    https://arxiv.org/abs/2001.11136.

    Returns:
      `[...]`, zero for equal spectra.

    Raises:
      ValueError: the spectra differ in length.
    """
    _check_lengths(x, y)
    s, t = x.singular_values, y.singular_values
    both_zero = (s == 0) & (t == 0)
    gap = jnp.where(both_zero, 0.0, jnp.log(jnp.where(both_zero, 1.0, s)) - jnp.log(t))
    return jnp.sum(jnp.square(jnp.where(both_zero, 0.0, gap)), -1)


def econd_hm(x: Spectrum, y: Spectrum) -> Array:
    """Harmonic mean `[...]` of two effective condition numbers, `2ab / (a + b)`.

    Leading axes broadcast. Both spaces must have the same number of singular values.
    Dubossarsky et al., 2020, https://arxiv.org/abs/2001.11136.

    Raises:
      ValueError: the spectra differ in length.
    """
    _check_lengths(x, y)
    a, b = x.effective_condition_number, y.effective_condition_number
    return 2 * a * b / (a + b)


def cond_hm(x: Spectrum, y: Spectrum) -> Array:
    """Harmonic mean `[...]` of two condition numbers; else as `econd_hm`."""
    _check_lengths(x, y)
    a, b = x.condition_number, y.condition_number
    return 2 * a * b / (a + b)


def _check_lengths(x: Spectrum, y: Spectrum) -> None:
    s, t = x.singular_values.shape[-1], y.singular_values.shape[-1]
    if s != t:
        raise ValueError(
            "`x` and `y` must have the same number of singular values;"
            f" got {s} and {t}."
        )


def relational_similarity(x: ArrayLike, y: ArrayLike, *, tile: int = 256) -> Array:
    """Pearson correlation of the two lists of within-space cosines (RSIM).

    Over the pairs i < j: corr(cos(x_i, x_j), cos(y_i, y_j)). Two sweeps over row
    tiles, means first, so that spaces whose cosines hardly vary lose no digits. A zero
    row has cosine 0 with every other. Differentiable.
    Vulic et al., 2020, https://arxiv.org/abs/2004.04070.

    Args:
      x: `[..., n, p]`, `n >= 3`; leading axes are a batch of pairs.
      y: `[..., n, q]`.
      tile: rows per step; memory is `tile * n` for each pair of the batch.

    Returns:
      `[...]` in [-1, 1]; NaN where one space's cosines are all equal (within 8
      roundings).

    Raises:
      ValueError: the row counts differ, a side is empty, there are fewer than 3 rows,
        or `tile` is below 1.
    """
    x, y = numerics.paired("relational_similarity", x, y)
    n = x.shape[-2]
    if n < 3:
        raise ValueError(f"`x` and `y` must have n >= 3 rows; got {n}.")
    if tile < 1:
        raise ValueError(f"`tile` must be at least 1; got {tile}.")
    return _relational_similarity(x, y, min(tile, n))


@functools.partial(jax.jit, static_argnums=2)
@functools.partial(jnp.vectorize, excluded=(2,), signature="(n,p),(n,q)->()")
def _relational_similarity(x, y, tile):
    n = x.shape[0]
    pairs = n * (n - 1) / 2
    x, y = _unit(x), _unit(y)
    starts = jnp.arange(0, n, tile)
    padded = [jnp.pad(z, ((0, -n % tile), (0, 0))) for z in (x, y)]
    first = [z[0] @ z[1] for z in (x, y)]  # equal cosines must differ by nothing

    def cosines(start):
        rows = [lax.dynamic_slice_in_dim(z, start, tile) for z in padded]
        i = start + jnp.arange(tile)[:, None]
        later = (jnp.arange(n)[None, :] > i) & (i < n)
        with jax.default_matmul_precision("highest"):
            return later, rows[0] @ x.T - first[0], rows[1] @ y.T - first[1]

    def totals(start):
        later, s, t = cosines(start)
        return jnp.sum(s * later), jnp.sum(t * later)

    mean_s, mean_t = (v.sum() / pairs for v in lax.map(totals, starts))

    def moments(start):
        later, s, t = cosines(start)
        s, t = (s - mean_s) * later, (t - mean_t) * later
        return jnp.sum(s * t), jnp.sum(s * s), jnp.sum(t * t)

    st, ss, tt = (v.sum() / pairs for v in lax.map(moments, starts))
    rounding = jnp.square(8 * jnp.finfo(x.dtype).eps)
    varies = (ss > rounding) & (tt > rounding)
    ss, tt = jnp.where(varies, ss, 1.0), jnp.where(varies, tt, 1.0)
    return jnp.where(varies, st / jnp.sqrt(ss) / jnp.sqrt(tt), jnp.nan)


def eigenvector_similarity(
    x: ArrayLike,
    y: ArrayLike,
    *,
    k: int = 10,
    energy: float = 0.9,
    order: str = "largest",
) -> Array:
    """Squared gap between the Laplacian spectra of two neighbour graphs (EVS).

        EVS = sum_{i <= m} (lambda_i - mu_i)^2

    lambda, mu: eigenvalues of `D - A`, A the graph that joins two rows when either is
    among the `k` nearest (cosine) of the other; m: the smaller of the two numbers of
    eigenvalues that hold `energy` of each spectrum's sum. The published definition
    takes the largest eigenvalues; the script released with iso-study takes them in
    ascending order: `order="smallest"`. Sogaard et al., 2018,
    https://arxiv.org/abs/1805.03620, section 4. Holds the `[n, n]` graphs of the whole
    batch: for thousands of rows. Of equally near rows the lower index is the nearer
    one. Piecewise constant in the rows: there is no gradient.

    Args:
      x: `[..., n, p]`; leading axes are a batch of pairs.
      y: `[..., m, q]`; the row counts may differ.
      k: neighbours per row.
      energy: share of the spectrum that is compared, in (0, 1].
      order: "largest" or "smallest" eigenvalues first.

    Returns:
      `[...]`, zero for equal graphs. Of a graph without edges one eigenvalue counts.

    Raises:
      ValueError: fewer than two axes or two rows, or `k`, `energy` or `order` out of
        range.
    """
    x, y = numerics.widened(x), numerics.widened(y)
    rows = min(z.shape[-2] if z.ndim > 1 else 0 for z in (x, y))
    if rows < 2:
        raise ValueError(
            "`x` and `y` must be [..., n, p] and [..., m, q] with at least 2 rows;"
            f" got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    if not 1 <= k < rows:
        raise ValueError(f"`k` must be in [1, {rows - 1}], the other rows; got {k}.")
    if not 0 < energy <= 1:
        raise ValueError(f"`energy` must be in (0, 1]; got {energy}.")
    if order not in ("largest", "smallest"):
        raise ValueError(f"`order` must be 'largest' or 'smallest'; got {order!r}.")

    return _eigenvector_similarity(x, y, k, energy, order == "largest")


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
@functools.partial(jnp.vectorize, excluded=(2, 3, 4), signature="(n,p),(m,q)->()")
def _eigenvector_similarity(x, y, k, energy, largest):
    def leading(z):
        values = jnp.linalg.eigvalsh(_laplacian(_unit(z), k))
        values = values[::-1] if largest else values
        reached = jnp.cumsum(values) >= energy * values.sum()
        return values, 1 + jnp.sum(~reached[:-1])

    rows = min(len(x), len(y))
    (s, count_s), (t, count_t) = leading(x), leading(y)
    kept = jnp.arange(rows) < jnp.minimum(count_s, count_t)
    gap = jnp.sum(jnp.where(kept, jnp.square(s[:rows] - t[:rows]), 0.0))
    return jnp.where(jnp.isfinite(x).all() & jnp.isfinite(y).all(), gap, jnp.nan)


def _laplacian(x: Float[Array, "n d"], k: int) -> Float[Array, "n n"]:
    n = x.shape[0]
    there = jnp.any(x != 0, axis=1)
    with jax.default_matmul_precision("highest"):
        cosines = x @ x.T
    allowed = there[:, None] & there & ~jnp.eye(n, dtype=bool)
    scores, nearest = lax.top_k(jnp.where(allowed, cosines, -jnp.inf), k)
    joined = jnp.zeros((n, n), x.dtype)
    joined = joined.at[jnp.arange(n)[:, None], nearest].set(1.0 * (scores > -jnp.inf))
    joined = jnp.maximum(joined, joined.T)
    return jnp.diag(joined.sum(1)) - joined


def h0_bottleneck(x: ArrayLike, y: ArrayLike) -> Array:
    """Bottleneck distance of the 0-dimensional Rips persistence diagrams.

        max_i min(|a_i - b_i|, max(a_i, b_i) / 2),  a, b: sorted MST edge lengths

    A component dies where the minimum spanning tree has an edge, so two spanning
    trees and two sorts are enough. It is what the literature reports as an
    approximation of the Gromov-Hausdorff distance, which it is not (Patra et al.,
    2019, https://arxiv.org/abs/1908.06625). Euclidean distances between the rows.
    Differentiable where the tree and the largest gap are unique.

    Args:
      x: `[..., n, p]`; leading axes are a batch of pairs.
      y: `[..., m, q]`; a smaller diagram is padded with points on the diagonal.

    Returns:
      `[...]`, not negative, in the rows' unit of length.

    Raises:
      ValueError: fewer than two axes, or no row.
    """
    a, b = (jnp.sort(spanning_tree(z)) for z in (x, y))
    size = max(a.shape[-1], b.shape[-1], 1)
    a, b = (
        jnp.pad(z, [(0, 0)] * (z.ndim - 1) + [(size - z.shape[-1], 0)]) for z in (a, b)
    )
    distance = jnp.max(jnp.minimum(jnp.abs(a - b), jnp.maximum(a, b) / 2), -1)
    # One row has no edge that could be NaN.
    finite = (jnp.isfinite(jnp.asarray(z)).all((-2, -1)) for z in (x, y))
    return jnp.where(functools.reduce(jnp.logical_and, finite), distance, jnp.nan)


def spanning_tree(x: ArrayLike) -> Array:
    """Edge lengths of the Euclidean minimum spanning tree, in the order of Prim.

    One row joins per step, at the cost of its distances to all others: time
    `n * n * d`, memory `n`. Prim, 1957. The gradient of a zero length is zero.

    Args:
      x: `[..., n, d]`; leading axes are a batch.

    Returns:
      `[..., n - 1]` lengths, unsorted.

    Raises:
      ValueError: fewer than two axes, or no row.
    """
    x = numerics.widened(x)
    if x.ndim < 2 or x.shape[-2] < 1:
        raise ValueError(f"`x` must be [..., n, d] with n >= 1; got {tuple(x.shape)}.")
    return _spanning_tree(x)


@jax.jit
@functools.partial(jnp.vectorize, signature="(n,d)->(e)")
def _spanning_tree(x):
    x = _finite_or_nan(x)
    n = x.shape[0]
    fixed = lax.stop_gradient(x)

    def join(state, _):
        nearest, parent, outside, last = state
        square = jnp.sum(jnp.square(fixed - fixed[last]), 1)
        closer = square < nearest
        nearest = jnp.where(closer | jnp.isnan(square), square, nearest)
        parent = jnp.where(closer, last, parent)
        new = jnp.argmin(jnp.where(outside, nearest, jnp.inf))
        edge = new, parent[new]
        return (nearest, parent, outside.at[new].set(False), new), edge

    start = (
        jnp.full(n, jnp.inf, x.dtype),
        jnp.zeros(n, int),
        jnp.arange(n) > 0,
        jnp.zeros((), int),
    )
    a, b = lax.scan(join, start, None, length=n - 1)[1]
    # Lengths of the chosen edges, outside of the search, so that they have gradients.
    squares = jnp.sum(jnp.square(x[a] - x[b]), 1)
    return jnp.where(squares == 0, 0.0, jnp.sqrt(jnp.where(squares == 0, 1.0, squares)))


def _finite_or_nan(x: Float[Array, "... n d"]) -> Float[Array, "... n d"]:
    """Each matrix as it is, or all NaN where any number of it is not finite."""
    finite = jnp.isfinite(x).all((-2, -1), keepdims=True)
    return jnp.where(finite, x, jnp.nan)


def _unit(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """As `numerics.unit`, and in float64 where `x` is."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=1, keepdims=True, initial=0))
    x = x / jnp.where(largest > 0, largest, 1.0)
    squares = jnp.sum(jnp.square(x), axis=1, keepdims=True)
    return x / jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
