"""How alike two representations of the same rows are: principal angles and CKA.

Both work on plain `[n, d]` matrices over the same `n` rows, keep float64 where it is
enabled and compute in float32 otherwise, and never hold an `[n, n]` matrix. A matrix
with a number in it that is not finite has NaN for every measure.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import numerics


def principal_angles(a: ArrayLike, b: ArrayLike, *, center: bool = False) -> Array:
    """Cosines of the principal angles between the column spaces of `a` and `b`.

        cos(theta) = singular values of Q_a^T Q_b,  Q an orthonormal basis of each

    The first is the cosine of the smallest angle, the largest canonical correlation
    when `center` is set. Directions that a rank-deficient matrix lacks count as
    orthogonal: cosine 0. Bjorck & Golub, 1973. Has a gradient where both matrices have
    full column rank, whatever their singular values, and the angles are distinct and
    not 0.

    Args:
      a: `[..., n, p]`; leading axes are a batch.
      b: `[..., n, q]`, the same `n` rows.
      center: subtract each column's mean first.

    Returns:
      `[..., min(p, q, n)]` cosines in [0, 1], descending.

    Raises:
      ValueError: the row counts differ, or there is no row.
    """
    return _cosines(*numerics.paired("principal_angles", a, b), bool(center))


@functools.partial(jax.jit, static_argnums=2)
def _cosines(a, b, center):
    def cosines(a, b):
        overlap = _basis(a, center).T @ _basis(b, center)
        values = jnp.linalg.svd(overlap, compute_uv=False)
        return jnp.clip(values, 0.0, 1.0)[: a.shape[0]]

    with jax.default_matmul_precision("highest"):
        return jnp.vectorize(cosines, signature="(n,p),(n,q)->(k)")(a, b)


def _basis(x: Float[Array, "n p"], center: bool) -> Float[Array, "n r"]:
    """Orthonormal columns that span `x`'s; columns beyond its rank are zero."""
    q, r = jnp.linalg.qr(numerics.centered(x) if center else x)
    # At full rank any rotation of q is as good a basis, so that u is a constant: the
    # derivative of an SVD is lost where singular values are equal.
    u, values, _ = jnp.linalg.svd(lax.stop_gradient(r), full_matrices=False)
    return (q @ u) * (values > lax.stop_gradient(numerics.rounding_floor(x)))


def linear_cka(x: ArrayLike, y: ArrayLike) -> Array:
    """Linear centred kernel alignment of two representations of the same `n` items.

        CKA = |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F),  columns centred

    1 for representations equal up to rotation and scale. A constant representation
    gives NaN. Differentiable. Kornblith et al., 2019,
    https://arxiv.org/abs/1905.00414, section 3.

    Args:
      x: `[..., n, p]`.
      y: `[..., n, q]`.

    Returns:
      `[...]` in [0, 1].

    Raises:
      ValueError: the row counts differ, or a side is empty.
    """
    return _aligned(*numerics.paired("linear_cka", x, y), _hsic)


def debiased_linear_cka(x: ArrayLike, y: ArrayLike) -> Array:
    """Linear CKA with the unbiased estimate of HSIC; about 0 for unrelated items.

        HSIC = [tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n (n-3))

    with the diagonals of the Gram matrices K and L removed; each term is found from
    the features without forming K. Differentiable. Nguyen et al., 2021,
    https://arxiv.org/abs/2010.15327, eq. 3 (Song et al., 2012).

    Args:
      x: `[..., n, p]`, `n >= 4`.
      y: `[..., n, q]`.

    Returns:
      `[...]`, at most 1 in expectation; may be negative. NaN where either estimate of
      HSIC(x, x) or HSIC(y, y) is not positive.

    Raises:
      ValueError: the row counts differ or are below 4, or a side is empty.
    """
    x, y = numerics.paired("debiased_linear_cka", x, y)
    return _aligned(*_enough(x, y), _unbiased_hsic)


def cka_grid(x: ArrayLike, y: ArrayLike, *, debiased: bool = False) -> Array:
    """CKA between every layer of `x` and every layer of `y`, same items.

    One program: each layer is centred and compared with itself once, each pair of
    layers costs one product `[p, n] @ [n, q]`, and one such product is held at a time.

    Args:
      x: `[layer, n, p]`.
      y: `[other_layer, n, q]`.
      debiased: the unbiased estimate (`debiased_linear_cka`).

    Returns:
      `[layer, other_layer]`. Nothing of size `[n, n]` exists.

    Raises:
      ValueError: not three axes, the row counts differ (or are below 4, if debiased),
        or a side is empty.
    """
    x, y = numerics.widened(x), numerics.widened(y)
    if x.ndim != 3 or y.ndim != 3:
        raise ValueError(
            "`x` and `y` must be [layer, n, d];"
            f" got shapes {tuple(x.shape)} and {tuple(y.shape)}."
        )
    numerics.paired("cka_grid", x[:, None], y)
    if debiased:
        return _cka_grid(*_enough(x, y), _unbiased_hsic)
    return _cka_grid(x, y, _hsic)


@functools.partial(jax.jit, static_argnums=2)
def _cka_grid(x, y, hsic):
    x, y = _comparable(x), _comparable(y)
    with jax.default_matmul_precision("highest"):
        own_x = lax.map(lambda a: hsic(a, a), x)
        own_y = lax.map(lambda b: hsic(b, b), y)
        cross = lax.map(lambda a: lax.map(lambda b: hsic(a, b), y), x)
    return _ratio(cross, own_x[:, None], own_y[None, :])


@functools.partial(jax.jit, static_argnums=2)
def _aligned(x, y, hsic):
    def cka(x, y):
        return _ratio(hsic(x, y), hsic(x, x), hsic(y, y))

    with jax.default_matmul_precision("highest"):
        batched = jnp.vectorize(cka, signature="(n,p),(n,q)->()")
        return batched(_comparable(x), _comparable(y))


def _ratio(cross, own_x, own_y):
    defined = (own_x > 0) & (own_y > 0)
    own_x, own_y = (jnp.where(defined, own, 1.0) for own in (own_x, own_y))
    return jnp.where(defined, cross / jnp.sqrt(own_x) / jnp.sqrt(own_y), jnp.nan)


def _comparable(x: Float[Array, "... n d"]) -> Float[Array, "... n d"]:
    """Centred, and scaled so that fourth powers neither overflow nor vanish."""
    x = numerics.centered(x)
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), (-2, -1), keepdims=True))
    return x / jnp.where(largest > 0, largest, 1.0)


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


def _enough(x: Array, y: Array) -> tuple[Array, Array]:
    if x.shape[-2] < 4:
        raise ValueError(
            f"`x` must have at least 4 rows for the unbiased estimate; got {x.shape}."
        )
    return x, y
