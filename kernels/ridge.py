"""Ridge regression for every penalty, layer and target from one factorisation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float


class RidgePath(NamedTuple):
    """Solutions for `r` penalties and `t` targets; `layer` leads where `x` has it.

    weights:       `[r, d, t]`.
    intercepts:    `[r, t]`.
    leave_one_out: `[r, t]` mean squared error of each row predicted from the others.
    """

    weights: Array
    intercepts: Array
    leave_one_out: Array


def ridge_path(x: ArrayLike, y: ArrayLike, *, l2: ArrayLike) -> RidgePath:
    """Minimises |y - x w - b|^2 + l2 |w|^2 for each penalty of `l2` `[r]`.

    `x` is `[n, d]` or `[layer, n, d]`, `y` `[n]` or `[n, t]`; the intercept b is not
    penalised. With x centred and x'x = V E V' (or xx' = U E U' where n < d), every
    penalty is a rescaling by 1 / (E + l2), and the error of row i when it is left out
    is its residual over 1 - h_ii, h being the diagonal of the hat matrix (Allen's
    PRESS; Golub, Heath and Wahba 1979, https://doi.org/10.2307/1268518).

    Computes in float32 (float64 for float64 input with x64 enabled): penalties below
    about 1e-6 of the largest eigenvalue are at the mercy of rounding in float32.
    Differentiable in `y` and `l2`. With one row the left-out error is NaN.

    Raises:
      ValueError: a shape does not fit, there are no rows, numbers are complex, or a
        penalty is not positive and finite.
    """
    x, y, l2 = jnp.asarray(x), jnp.asarray(y), jnp.asarray(l2)
    for name, value in (("x", x), ("y", y), ("l2", l2)):
        if jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise ValueError(f"`{name}` must be real; got {value.dtype}.")
    if x.ndim not in (2, 3):
        raise ValueError(f"`x` must be [n, d] or [layer, n, d]; got shape {x.shape}.")
    n = x.shape[-2]
    if n == 0:
        raise ValueError(f"`x` must have rows; got shape {x.shape}.")
    if y.ndim not in (1, 2) or len(y) != n:
        raise ValueError(f"`y` must be [n] or [n, t] with n = {n}; got {y.shape}.")
    if l2.ndim != 1:
        raise ValueError(f"`l2` must be [r]; got shape {l2.shape}.")
    if not isinstance(l2, jax.core.Tracer):
        values = np.asarray(l2)
        wrong = values[~(np.isfinite(values) & (values > 0))]
        if len(wrong):
            raise ValueError(f"`l2` must be finite and > 0; got {wrong[0]}.")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    path = _path if x.ndim == 2 else _layers
    found = path(x.astype(dtype), y.reshape(n, -1).astype(dtype), l2.astype(dtype))
    if y.ndim == 1:
        return jax.tree.map(lambda a: a[..., 0], found)
    return found


@jax.jit
def _layers(x: Float[Array, "layer n d"], y, l2) -> RidgePath:
    return lax.map(lambda layer: _path(layer, y, l2), x)


@jax.jit
def _path(
    x: Float[Array, "n d"], y: Float[Array, "n t"], l2: Float[Array, " r"]
) -> RidgePath:
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    n, d = x.shape
    x_mean, y_mean = jnp.mean(x, axis=0), jnp.mean(y, axis=0)
    x, y = x - x_mean, y - y_mean
    # Coordinates of the rows along the principal directions, and those directions.
    if d <= n:
        spectrum, directions = jnp.linalg.eigh(product(x.T, x))
        spectrum = jnp.maximum(spectrum, 0)
        rows = product(x, directions)
    else:
        spectrum, left = jnp.linalg.eigh(product(x, x.T))
        # Zero but for rounding, the mean's direction among them: no directions of x.
        spectrum = jnp.where(
            spectrum > n * jnp.finfo(x.dtype).eps * spectrum[-1], spectrum, 0
        )
        scale = jnp.sqrt(spectrum)
        rows = left * scale
        directions = product(x.T, left) / jnp.where(scale > 0, scale, jnp.inf)
    targets = product(rows.T, y)

    def one(penalty):
        gain = 1 / (spectrum + penalty)
        coefficients = gain[:, None] * targets
        residual = y - product(rows, coefficients)
        leverage = 1 / n + product(jnp.square(rows), gain)
        left_out = residual / (1 - leverage)[:, None]
        weights = product(directions, coefficients)
        intercepts = y_mean - product(x_mean, weights)
        return RidgePath(weights, intercepts, jnp.mean(jnp.square(left_out), axis=0))

    return lax.map(one, l2)
