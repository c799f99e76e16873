"""How alike two sets of row vectors are: angles, CKA, spectra, neighbour graphs.

Every measure works on plain `[n, d]` matrices, keeps float64 where it is enabled and
computes in float32 otherwise, and never holds an `[n, n]` matrix unless it says so.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import numerics


class Spectrum(NamedTuple):
    """Summary of a matrix's singular values; see `spectrum`."""

    singular_values: Array
    effective_rank: Array
    effective_condition_number: Array


def principal_angles(a: ArrayLike, b: ArrayLike, *, center: bool = False) -> Array:
    """Cosines of the principal angles between the column spaces of `a` and `b`.

        cos(theta) = singular values of Q_a^T Q_b,  Q an orthonormal basis of each

    The first is the cosine of the smallest angle, the largest canonical correlation
    when `center` is set. Directions that a rank-deficient matrix lacks count as
    orthogonal: cosine 0. Bjorck & Golub, 1973.

    Args:
      a: `[..., n, p]`; leading axes are a batch.
      b: `[..., n, q]`, the same `n` rows.
      center: subtract each column's mean first.

    Returns:
      `[..., min(p, q, n)]` cosines in [0, 1], descending.

    Raises:
      ValueError: the row counts differ, or there is no row.
    """
    a, b = _pair("principal_angles", a, b)

    def cosines(a, b):
        overlap = _basis(a, center).T @ _basis(b, center)
        values = jnp.linalg.svd(overlap, compute_uv=False)
        return jnp.clip(values, 0.0, 1.0)[: a.shape[0]]

    with jax.default_matmul_precision("highest"):
        return jnp.vectorize(cosines, signature="(n,p),(n,q)->(k)")(a, b)


def linear_cka(x: ArrayLike, y: ArrayLike) -> Array:
    """Linear centred kernel alignment of two representations of the same `n` items.

        CKA = |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F),  columns centred

    1 for representations equal up to rotation and scale. A constant representation
    gives NaN. Kornblith et al., 2019, https://arxiv.org/abs/1905.00414, section 3.

    Args:
      x: `[..., n, p]`.
      y: `[..., n, q]`.

    Returns:
      `[...]` in [0, 1].

    Raises:
      ValueError: the row counts differ.
    """
    x, y = _pair("linear_cka", x, y)
    return _aligned(x, y, _hsic)


def debiased_linear_cka(x: ArrayLike, y: ArrayLike) -> Array:
    """Linear CKA with the unbiased estimate of HSIC; about 0 for unrelated items.

        HSIC = [tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n (n-3))

    with the diagonals of the Gram matrices K and L removed; each term is found from
    the features without forming K. Nguyen et al., 2021,
    https://arxiv.org/abs/2010.15327, eq. 3 (Song et al., 2012).

    Args:
      x: `[..., n, p]`, `n >= 4`.
      y: `[..., n, q]`.

    Returns:
      `[...]`, at most 1; may be slightly negative. NaN where either estimate of
      HSIC(x, x) or HSIC(y, y) is not positive.

    Raises:
      ValueError: the row counts differ or are below 4.
    """
    x, y = _pair("debiased_linear_cka", x, y)
    if x.shape[-2] < 4:
        raise ValueError(
            f"`x` must have at least 4 rows for the unbiased estimate; got {x.shape}."
        )
    return _aligned(x, y, _unbiased_hsic)


def cka_grid(x: ArrayLike, y: ArrayLike, *, debiased: bool = False) -> Array:
    """CKA between every layer of `x` and every layer of `y`, same items.

    Args:
      x: `[layer, n, p]`.
      y: `[other_layer, n, q]`.
      debiased: the unbiased estimate (`debiased_linear_cka`).

    Returns:
      `[layer, other_layer]`. Nothing of size `[n, n]` exists.

    Raises:
      ValueError: not three axes, or the row counts differ.
    """
    x, y = numerics.widened(x), numerics.widened(y)
    if x.ndim != 3 or y.ndim != 3:
        raise ValueError(
            "`x` and `y` must be [layer, n, d];"
            f" got shapes {tuple(x.shape)} and {tuple(y.shape)}."
        )
    x, y = _pair("cka_grid", x, y)
    hsic = _unbiased_hsic if debiased else _hsic
    x = x - x.mean(-2, keepdims=True)
    y = y - y.mean(-2, keepdims=True)
    return _cka_grid(x, y, hsic)


@functools.partial(jax.jit, static_argnums=2)
def _cka_grid(x, y, hsic):
    with jax.default_matmul_precision("highest"):
        own_x = lax.map(lambda a: hsic(a, a), x)
        own_y = lax.map(lambda b: hsic(b, b), y)
        cross = lax.map(lambda a: lax.map(lambda b: hsic(a, b), y), x)
    return cross / jnp.sqrt(own_x)[:, None] / jnp.sqrt(own_y)[None, :]


def _aligned(x, y, hsic):
    def cka(x, y):
        x, y = x - x.mean(0), y - y.mean(0)
        return hsic(x, y) / jnp.sqrt(hsic(x, x)) / jnp.sqrt(hsic(y, y))

    with jax.default_matmul_precision("highest"):
        return jnp.vectorize(cka, signature="(n,p),(n,q)->()")(x, y)


def _hsic(x: Float[Array, "n p"], y: Float[Array, "n q"]) -> Float[Array, ""]:
    return jnp.sum(jnp.square(x.T @ y))


def _unbiased_hsic(x: Float[Array, "n p"], y: Float[Array, "n q"]) -> Float[Array, ""]:
    n = x.shape[0]
    diagonal_x, diagonal_y = jnp.sum(x * x, 1), jnp.sum(y * y, 1)
    row_x = x @ x.sum(0) - diagonal_x  # row sums of K without its diagonal
    row_y = y @ y.sum(0) - diagonal_y
    trace = jnp.sum(jnp.square(x.T @ y)) - diagonal_x @ diagonal_y
    total = row_x.sum() * row_y.sum() / ((n - 1) * (n - 2))
    return (trace + total - 2 / (n - 2) * (row_x @ row_y)) / (n * (n - 3))


def spectrum(x: ArrayLike, *, center: bool = True) -> Spectrum:
    """Singular values of `x` and what follows from them.

        effective rank  = exp(H(s / sum s)),  H in nats
        effective condition number = s_1 / s_r,  r = floor(effective rank)

    Roy & Vetterli, 2007; Dubossarsky et al., 2020, https://arxiv.org/abs/2001.11136.

    Args:
      x: `[..., n, d]`.
      center: subtract the column means first.

    Returns:
      `singular_values [..., min(n, d)]` descending, and two `[...]` numbers. A zero
      matrix has effective rank 0 and condition number NaN.

    Raises:
      ValueError: fewer than two axes, or an empty matrix.
    """
    x = numerics.widened(x)
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"`x` must be [..., n, d], not empty; got {tuple(x.shape)}.")
    if center:
        x = x - x.mean(-2, keepdims=True)
    values = jnp.linalg.svd(x, compute_uv=False)
    total = values.sum(-1, keepdims=True)
    share = values / jnp.where(total > 0, total, 1.0)
    safe = jnp.where(share > 0, share, 1.0)
    entropy = -jnp.sum(share * jnp.log(safe), -1)
    rank = jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0.0)
    # A rank within rounding of an integer is that integer: floor(2.9999998) is 3.
    last = jnp.floor(rank * (1 + 8 * jnp.finfo(x.dtype).eps)).astype(int) - 1
    smallest = jnp.take_along_axis(values, jnp.maximum(last, 0)[..., None], -1)[..., 0]
    condition = jnp.where(rank > 0, values[..., 0] / smallest, jnp.nan)
    return Spectrum(values, rank, condition)


def singular_value_gap(x: Spectrum, y: Spectrum) -> Array:
    """Sum of squared gaps between two log spectra, `sum_i (log s_i - log t_i)^2`.

    Both spaces must have the same number of singular values; the measure is not
    comparable between sample sizes. Infinite where one space lacks a direction that
    the other has. Dubossarsky et al., 2020, https://arxiv.org/abs/2001.11136.

    Returns:
      `[...]`, zero for equal spectra.

    Raises:
      ValueError: the spectra differ in length.
    """
    s, t = x.singular_values, y.singular_values
    if s.shape[-1] != t.shape[-1]:
        raise ValueError(
            "`x` and `y` must have the same number of singular values;"
            f" got {s.shape[-1]} and {t.shape[-1]}."
        )
    both_zero = (s == 0) & (t == 0)
    gap = jnp.where(both_zero, 0.0, jnp.log(jnp.where(both_zero, 1.0, s)) - jnp.log(t))
    return jnp.sum(jnp.square(jnp.where(both_zero, 0.0, gap)), -1)


def econd_hm(x: Spectrum, y: Spectrum) -> Array:
    """Harmonic mean of two effective condition numbers, `2ab / (a + b)`.

    Dubossarsky et al., 2020, https://arxiv.org/abs/2001.11136.
    """
    a, b = x.effective_condition_number, y.effective_condition_number
    return 2 * a * b / (a + b)


def relational_similarity(x: ArrayLike, y: ArrayLike, *, tile: int = 256) -> Array:
    """Pearson correlation of the two lists of within-space cosines (RSIM).

    Over the pairs i < j: corr(cos(x_i, x_j), cos(y_i, y_j)). Two sweeps over row
    tiles, means first, so that spaces whose cosines hardly vary lose no digits.
    Vulic et al., 2020, https://arxiv.org/abs/2004.04070.

    Args:
      x: `[n, p]`, `n >= 3`.
      y: `[n, q]`.
      tile: rows per step; memory is `tile * n`.

    Returns:
      A number in [-1, 1]; NaN where one space's cosines are all equal.

    Raises:
      ValueError: the row counts differ, or fewer than 3 rows.
    """
    x, y = _pair("relational_similarity", x, y)
    n = x.shape[0]
    if x.ndim != 2 or y.ndim != 2 or n < 3:
        raise ValueError(
            "`x` and `y` must be [n, d] with n >= 3;"
            f" got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    return _relational_similarity(x, y, min(tile, n))


@functools.partial(jax.jit, static_argnums=2)
def _relational_similarity(x, y, tile):
    n = x.shape[0]
    x, y = _unit(x), _unit(y)
    starts = jnp.arange(0, n, tile)
    padded = [jnp.pad(z, ((0, -n % tile), (0, 0))) for z in (x, y)]

    def cosines(start):
        rows = [lax.dynamic_slice_in_dim(z, start, tile) for z in padded]
        i = start + jnp.arange(tile)[:, None]
        later = (jnp.arange(n)[None, :] > i) & (i < n)
        with jax.default_matmul_precision("highest"):
            return later, rows[0] @ x.T, rows[1] @ y.T

    def totals(start):
        later, s, t = cosines(start)
        return jnp.sum(s * later), jnp.sum(t * later)

    mean_s, mean_t = (v.sum() / (n * (n - 1) / 2) for v in lax.map(totals, starts))

    def moments(start):
        later, s, t = cosines(start)
        s, t = (s - mean_s) * later, (t - mean_t) * later
        return jnp.sum(s * t), jnp.sum(s * s), jnp.sum(t * t)

    st, ss, tt = (v.sum() for v in lax.map(moments, starts))
    return st / jnp.sqrt(ss) / jnp.sqrt(tt)


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
    https://arxiv.org/abs/1805.03620, section 4. Holds the `[n, n]` graphs: for
    thousands of rows.

    Args:
      x: `[n, p]`.
      y: `[m, q]`; the row counts may differ.
      k: neighbours per row.
      energy: share of the spectrum that is compared, in (0, 1].
      order: "largest" or "smallest" eigenvalues first.

    Returns:
      A number, zero for equal graphs.

    Raises:
      ValueError: `k`, `energy` or `order` out of range.
    """
    x, y = numerics.widened(x), numerics.widened(y)
    rows = min(x.shape[0], y.shape[0])
    if not 1 <= k < rows:
        raise ValueError(f"`k` must be in [1, {rows - 1}], the other rows; got {k}.")
    if not 0 < energy <= 1:
        raise ValueError(f"`energy` must be in (0, 1]; got {energy}.")
    if order not in ("largest", "smallest"):
        raise ValueError(f"`order` must be 'largest' or 'smallest'; got {order!r}.")

    def leading(z):
        values = jnp.linalg.eigvalsh(_laplacian(_unit(z), k))
        values = values if order == "smallest" else values[::-1]
        held = jnp.cumsum(values) / values.sum()
        return values[:rows], 1 + jnp.sum(held[:-1] < energy)

    (s, count_s), (t, count_t) = leading(x), leading(y)
    kept = jnp.arange(rows) < jnp.minimum(count_s, count_t)
    return jnp.sum(jnp.where(kept, jnp.square(s - t), 0.0))


def _laplacian(x: Float[Array, "n d"], k: int) -> Float[Array, "n n"]:
    n = x.shape[0]
    with jax.default_matmul_precision("highest"):
        cosines = jnp.where(jnp.eye(n, dtype=bool), -jnp.inf, x @ x.T)
    nearest = lax.top_k(cosines, k)[1]
    joined = jnp.zeros((n, n), x.dtype).at[jnp.arange(n)[:, None], nearest].set(1.0)
    joined = jnp.maximum(joined, joined.T)
    return jnp.diag(joined.sum(1)) - joined


def h0_bottleneck(x: ArrayLike, y: ArrayLike) -> Array:
    """Bottleneck distance of the 0-dimensional Rips persistence diagrams.

        max_i min(|a_i - b_i|, max(a_i, b_i) / 2),  a, b: sorted MST edge lengths

    A component dies where the minimum spanning tree has an edge, so two spanning
    trees and two sorts are enough. It is what the literature reports as an
    approximation of the Gromov-Hausdorff distance, which it is not (Patra et al.,
    2019, https://arxiv.org/abs/1908.06625). Euclidean distances between the rows.

    Args:
      x: `[n, p]`.
      y: `[m, q]`; a smaller diagram is padded with points on the diagonal.

    Returns:
      A non-negative number in the rows' unit of length.

    Raises:
      ValueError: not two axes, or no row.
    """
    a, b = (jnp.sort(spanning_tree(z)) for z in (x, y))
    size = max(a.size, b.size)
    a, b = (jnp.pad(z, (size - z.size, 0)) for z in (a, b))
    if not size:
        return jnp.zeros((), a.dtype)
    return jnp.max(jnp.minimum(jnp.abs(a - b), jnp.maximum(a, b) / 2))


def spanning_tree(x: ArrayLike) -> Array:
    """Edge lengths of the Euclidean minimum spanning tree, in the order of Prim.

    One row joins per step, at the cost of its distances to all others: time
    `n * n * d`, memory `n`. Prim, 1957.

    Args:
      x: `[n, d]`.

    Returns:
      `[n - 1]` lengths, unsorted.

    Raises:
      ValueError: not two axes, or no row.
    """
    x = numerics.widened(x)
    if x.ndim != 2 or x.shape[0] < 1:
        raise ValueError(f"`x` must be [n, d] with n >= 1; got {tuple(x.shape)}.")
    return _spanning_tree(x)


@jax.jit
def _spanning_tree(x):
    n = x.shape[0]

    def join(state, _):
        nearest, outside, last = state
        distance = jnp.sqrt(jnp.sum(jnp.square(x - x[last]), 1))
        nearest = jnp.minimum(nearest, distance)
        candidate = jnp.where(outside, nearest, jnp.inf)
        new = jnp.argmin(candidate)
        return (nearest, outside.at[new].set(False), new), candidate[new]

    start = jnp.full(n, jnp.inf, x.dtype), jnp.arange(n) > 0, jnp.zeros((), int)
    return lax.scan(join, start, None, length=n - 1)[1]


def _basis(x: Float[Array, "n p"], center: bool) -> Float[Array, "n r"]:
    """Orthonormal columns that span `x`'s; columns beyond its rank are zero."""
    if center:
        x = x - x.mean(0)
    q, r = jnp.linalg.qr(x)
    u, values, _ = jnp.linalg.svd(r, full_matrices=False)
    tolerance = values[0] * max(x.shape) * jnp.finfo(x.dtype).eps
    return (q @ u) * (values > tolerance)


def _unit(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0, norm, 1.0)


def _pair(operation: str, x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    x, y = numerics.widened(x), numerics.widened(y)
    if min(x.ndim, y.ndim) < 2 or x.shape[-2] != y.shape[-2] or 0 in x.shape[-2:]:
        raise ValueError(
            f"{operation} needs two matrices over the same rows, [..., n, p] and"
            f" [..., n, q]; got shapes {np.shape(x)} and {np.shape(y)}."
        )
    return x, y
