"""Linear maps from one space onto another."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import numerics


def procrustes(x: ArrayLike, y: ArrayLike) -> Array:
    """The orthogonal map that brings the rows of `x` closest to those of `y`.

        argmin_{W^T W = I} |x W - y|_F = U V^T,  U S V^T = svd(x^T y)

    Schonemann, 1966. Equals `scipy.linalg.orthogonal_procrustes(x, y)[0]`. Where
    `x^T y` is rank deficient the map is one of many optimal ones.

    Args:
      x: `[..., n, d]`; leading axes are a batch of pairs.
      y: `[..., n, d]`.

    Returns:
      `[..., d, d]`, float32 (float64 where enabled and given).

    Raises:
      ValueError: the shapes differ or have fewer than two axes.
    """
    x, y = _pair("procrustes", x, y)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            "`x` and `y` must have the same width for an orthogonal map;"
            f" got {x.shape[-1]} and {y.shape[-1]}."
        )
    product = jnp.einsum("...nd,...ne->...de", x, y, precision="highest")
    u, _, vt = jnp.linalg.svd(product, full_matrices=False)
    return jnp.matmul(u, vt, precision="highest")


def ridge_map(x: ArrayLike, y: ArrayLike, *, l2: ArrayLike = 0.0) -> Array:
    """The linear map with the least squared error plus penalty.

        argmin_W |x W - y|_F^2 + l2 |W|_F^2 = (x^T x + l2 I)^-1 x^T y

    Args:
      x: `[..., n, d]`; leading axes are a batch of pairs.
      y: `[..., n, e]`.
      l2: penalty, a number or `[...]` one for each pair; 0 gives least squares, of
        least norm where that is not unique.

    Returns:
      `[..., d, e]`.

    Raises:
      ValueError: the row counts differ.
    """
    x, y = _pair("ridge_map", x, y)
    l2 = jnp.asarray(l2, x.dtype)[..., None, None]
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    s = s[..., None]
    tolerance = s[..., :1, :] * max(x.shape[-2:]) * jnp.finfo(x.dtype).eps
    shrink = jnp.where(s > tolerance, s / (jnp.where(s > 0, s * s, 1.0) + l2), 0.0)
    with jax.default_matmul_precision("highest"):
        return jnp.swapaxes(vt, -1, -2) @ (shrink * (jnp.swapaxes(u, -1, -2) @ y))


class Rcsls(NamedTuple):
    """A map and how it was reached; see `rcsls`."""

    map: Array
    losses: Array


def rcsls_loss(
    w: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    source: ArrayLike,
    target: ArrayLike,
    *,
    k: int = 10,
) -> Array:
    """Relaxed CSLS of a map over the translation pairs `(x_i, y_i)`; lower is better.

        -(1/n) sum_i [ 2 x_i W y_i - (1/k) sum_{y in N_k(x_i W)} x_i W y
                                   - (1/k) sum_{z in N_k(y_i)} z W y_i ]

    N_k(x_i W): the k rows of `target` with the largest inner product; N_k(y_i): the k
    rows z of `source` whose images z W have the largest. Rows are expected to have
    length one. Joulin et al., 2018, https://arxiv.org/abs/1804.07745, eq. 4.
    Differentiable in `w`.

    Args:
      w: `[d, e]`; rows are mapped as `x @ w`.
      x: `[n, d]`, y: `[n, e]`: the pairs.
      source: `[p, d]`, target: `[q, e]`: where neighbours are sought.
      k: neighbours.

    Returns:
      The loss, a scalar.

    Raises:
      ValueError: `k` exceeds the rows of `source` or `target`.
    """
    w, x, y, source, target = map(numerics.widened, (w, x, y, source, target))
    most = min(source.shape[0], target.shape[0])
    if not 1 <= k <= most:
        raise ValueError(f"`k` must be in [1, {most}], the candidate rows; got {k}.")
    with jax.default_matmul_precision("highest"):
        mapped = x @ w
        own = 2 * jnp.sum(mapped * y, 1)
        forward = lax.top_k(mapped @ target.T, k)[0].mean(1)
        backward = lax.top_k(y @ (source @ w).T, k)[0].mean(1)
    return jnp.mean(forward + backward - own)


def rcsls(
    x: ArrayLike,
    y: ArrayLike,
    source: ArrayLike,
    target: ArrayLike,
    *,
    k: int = 10,
    steps: int = 10,
    learning_rate: float = 1.0,
    spectral: bool = False,
    initial: ArrayLike | None = None,
) -> Rcsls:
    """The map that minimises `rcsls_loss` by the published descent.

    Starts from `procrustes(x, y)`, takes full-batch subgradient steps, and after a
    step that raised the loss goes back to the map before it with half the rate. With
    `spectral` every step is followed by clipping the map's singular values to [0, 1],
    the convex hull of the orthogonal maps. Joulin et al., 2018,
    https://arxiv.org/abs/1804.07745, section 3.

    Args:
      x, y, source, target, k: as in `rcsls_loss`; `vmap` gives a batch of pairs.
      steps: gradient steps.
      learning_rate: of the first step.
      spectral: project after each step.
      initial: `[d, e]`, instead of the Procrustes map.

    Returns:
      The map `[d, e]` of the lowest loss seen, and the loss before each step and
      after the last, `[steps + 1]`.

    Raises:
      ValueError: shapes do not fit, or `k` is out of range.
    """
    x, y = _pair("rcsls", x, y)
    start = procrustes(x, y) if initial is None else numerics.widened(initial)
    return _rcsls(
        start,
        *(x, y, numerics.widened(source), numerics.widened(target)),
        learning_rate,
        k,
        steps,
        spectral,
    )


@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def _rcsls(start, x, y, source, target, learning_rate, k, steps, spectral):
    def loss(w):
        return rcsls_loss(w, x, y, source, target, k=k)

    def step(state, _):
        w, best, best_loss, best_gradient, rate = state
        value, gradient = jax.value_and_grad(loss)(w)
        worse = value > best_loss
        rate = jnp.where(worse, rate / 2, rate)
        best = jnp.where(worse, best, w)
        best_loss = jnp.where(worse, best_loss, value)
        best_gradient = jnp.where(worse, best_gradient, gradient)
        new = best - rate * best_gradient
        if spectral:
            new = _clip_singular_values(new)
        return (new, best, best_loss, best_gradient, rate), value

    rate = jnp.asarray(learning_rate, start.dtype)
    infinite = jnp.asarray(jnp.inf, start.dtype)
    state = (start, start, infinite, jnp.zeros_like(start), rate)
    (w, best, best_loss, _, _), losses = lax.scan(step, state, None, length=steps)
    last = loss(w)
    return Rcsls(jnp.where(last < best_loss, w, best), jnp.append(losses, last))


def _clip_singular_values(w: Float[Array, "d e"]) -> Float[Array, "d e"]:
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return jnp.matmul(u * jnp.minimum(s, 1.0), vt, precision="highest")


def _pair(operation: str, x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    x, y = numerics.widened(x), numerics.widened(y)
    if min(x.ndim, y.ndim) < 2 or x.shape[-2] != y.shape[-2]:
        raise ValueError(
            f"{operation} needs paired rows, [..., n, d] and [..., n, e];"
            f" got shapes {tuple(x.shape)} and {tuple(y.shape)}."
        )
    return x, y
