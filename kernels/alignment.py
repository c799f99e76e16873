"""Linear maps from one space onto another.

Products are at the precision of their inputs, float32 at least (float64 where enabled
and given), and so is what is returned. A pair of spaces with a number in its pairs of
rows that is not finite has NaN for map and loss (of `ridge_map`: for the columns that
the number bears on); others of its batch keep theirs.
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


def procrustes(x: ArrayLike, y: ArrayLike) -> Array:
    """The orthogonal map that brings the rows of `x` closest to those of `y`.

        argmin_{W^T W = I} |x W - y|_F = U V^T,  U S V^T = svd(x^T y)

    Schonemann, 1966. Equals `scipy.linalg.orthogonal_procrustes(x, y)[0]`. Where
    `x^T y` is rank deficient the map is one of many optimal ones, and what they do
    not share has a gradient of zero.

    Args:
      x: `[..., n, d]`; leading axes are a batch of pairs.
      y: `[..., n, d]`.

    Returns:
      `[..., d, d]`, float32 (float64 where enabled and given).

    Raises:
      ValueError: the shapes differ, are empty or have fewer than two axes.
    """
    x, y = numerics.paired("procrustes", x, y)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            "`x` and `y` must have the same width for an orthogonal map;"
            f" got {x.shape[-1]} and {y.shape[-1]}."
        )
    product = jnp.einsum("...nd,...ne->...de", x, y, precision="highest")
    return _polar(product)


@jax.custom_jvp
def _polar(a: Float[Array, "... d d"]) -> Float[Array, "... d d"]:
    """The orthogonal factor U V^T of `a = U S V^T`."""
    u, _, vt = jnp.linalg.svd(a, full_matrices=False)
    return jnp.matmul(u, vt, precision="highest")


@_polar.defjvp
def _polar_tangent(primals, tangents):
    """U [(P - P^T)_ij / (s_i + s_j)] V^T with P = U^T da V.

    Exists wherever `a` has full rank. The derivative of the SVD itself divides by
    differences of singular values, and is lost where two of them are close.
    """
    u, s, vt = jnp.linalg.svd(primals[0], full_matrices=False)
    with jax.default_matmul_precision("highest"):
        p = jnp.swapaxes(u, -1, -2) @ tangents[0] @ jnp.swapaxes(vt, -1, -2)
        sums = s[..., :, None] + s[..., None, :]
        known = sums > 2 * s[..., :1, None] * s.shape[-1] * jnp.finfo(s.dtype).eps
        turn = (p - jnp.swapaxes(p, -1, -2)) / jnp.where(known, sums, 1.0)
        return u @ vt, u @ jnp.where(known, turn, 0.0) @ vt


def ridge_map(x: ArrayLike, y: ArrayLike, *, l2: ArrayLike = 0.0) -> Array:
    """The linear map with the least squared error plus penalty.

        argmin_W |x W - y|_F^2 + l2 |W|_F^2 = (x^T x + l2 I)^-1 x^T y

    Args:
      x: `[..., n, d]`; leading axes are a batch of pairs.
      y: `[..., n, e]`.
      l2: penalty, a number or `[...]` one for each pair; 0 gives least squares, of
        least norm where that is not unique. Without a penalty the gradient is right
        where `x` has full rank.

    Returns:
      `[..., d, e]`, float32 (float64 where enabled and given).

    Raises:
      ValueError: the row counts differ, a side is empty, or a penalty is negative.
    """
    x, y = numerics.paired("ridge_map", x, y)
    if not isinstance(l2, jax.core.Tracer) and not np.all(np.asarray(l2) >= 0):
        raise ValueError(f"`l2` must be at least 0; got {np.min(l2)}.")
    return _ridge_map(x, y, jnp.asarray(l2, x.dtype)[..., None, None])


@jax.jit
def _ridge_map(x, y, l2):
    n, d = x.shape[-2:]
    u, s, vt = jnp.linalg.svd(lax.stop_gradient(x), full_matrices=False)
    s = s[..., None]
    held = s > lax.stop_gradient(numerics.rounding_floor(x))[..., None, None]
    shrink = jnp.where(held, s / (jnp.where(s > 0, s * s, 1.0) + l2), 0.0)
    # The equations below are solved by this W, so that a Newton step changes nothing
    # but carries the derivative of the solution, whatever the singular values are.
    wide = n < d
    basis = u if wide else jnp.swapaxes(vt, -1, -2)
    square = jnp.where(held | (l2 > 0), s * s + l2, jnp.inf)
    with jax.default_matmul_precision("highest"):
        dual = jnp.swapaxes(u, -1, -2) @ lax.stop_gradient(y)
        w = jnp.swapaxes(vt, -1, -2) @ (lax.stop_gradient(shrink) * dual)

        def newton(residual):
            change = residual - lax.stop_gradient(residual)
            inverse = lax.stop_gradient(square)
            return basis @ ((jnp.swapaxes(basis, -1, -2) @ change) / inverse)

        xt = jnp.swapaxes(x, -1, -2)
        if not wide:
            return w + newton(xt @ (y - x @ w) - l2 * w)
        # w = x^T a, (x x^T + l2 I) a = y
        a = lax.stop_gradient(u @ (dual / square))
        return (
            w
            + (xt - lax.stop_gradient(xt)) @ a
            + (lax.stop_gradient(xt) @ newton(y - x @ (xt @ a) - l2 * a))
        )


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
    length one. Joulin et al., 2018, https://arxiv.org/abs/1804.07745, eq. 4. The
    gradient is that of the sum over the neighbours as they are: a subgradient, as the
    paper takes it. Scores are held for 256 pairs at a time.

    Args:
      w: `[..., d, e]`; rows are mapped as `x @ w`. Leading axes are a batch of pairs
        of spaces, in every argument.
      x: `[..., n, d]`, y: `[..., n, e]`: the pairs.
      source: `[..., p, d]`, target: `[..., q, e]`: where neighbours are sought.
      k: neighbours.

    Returns:
      The loss, `[...]`, float32 (float64 where enabled and given).

    Raises:
      ValueError: shapes do not fit, or `k` exceeds the rows of `source` or `target`.
    """
    sides = _spaces("rcsls_loss", x, y, source, target, k)
    w = numerics.widened(w)
    _check_map("w", w, x=sides[0], y=sides[1])
    loss = functools.partial(_rcsls_loss, k=k)
    return jnp.vectorize(loss, signature=f"(d,e),{_SIDES}->()")(w, *sides)


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
    the convex hull of the orthogonal maps; without it the loss has no lower bound, and
    the number of steps is what limits the map. A loss that is no longer finite counts
    as raised. Joulin et al., 2018,
    https://arxiv.org/abs/1804.07745, section 3. Their script, fastText's
    `alignment/align.py`, means to go back as well, but steps in place and so only
    halves the rate; it takes `niter + 1` steps, returns the map after the last, and
    stops at a rate below 1e-4. Where no step raises the loss, the rate is not below
    that, and `steps` is `niter + 1`, the two maps are the same.

    Args:
      x, y, source, target, k: as in `rcsls_loss`.
      steps: gradient steps.
      learning_rate: of the first step.
      spectral: project after each step.
      initial: `[..., d, e]`, instead of the Procrustes map.

    Returns:
      The map `[..., d, e]` of the lowest loss seen, and the loss before each step and
      after the last, `[..., steps + 1]`; float32 (float64 where enabled and given).
      Where no loss is finite, the map is the first.

    Raises:
      ValueError: shapes do not fit, `k` or `steps` is out of range, or there is no
        `initial` between spaces of different widths.
    """
    sides = _spaces("rcsls", x, y, source, target, k)
    if steps < 0 or not learning_rate > 0:
        raise ValueError(
            "`steps` must be at least 0 and `learning_rate` more;"
            f" got {steps} and {learning_rate}."
        )
    x, y = sides[:2]
    start = procrustes(x, y) if initial is None else numerics.widened(initial)
    start = start.astype(x.dtype)
    _check_map("initial", start, x=x, y=y)
    descend = functools.partial(
        _rcsls, learning_rate=learning_rate, k=k, steps=steps, spectral=spectral
    )
    signature = f"(d,e),{_SIDES}->(d,e),(t)"
    return Rcsls(*jnp.vectorize(descend, signature=signature)(start, *sides))


_SIDES = "(n,d),(n,e),(p,d),(q,e)"
_TILE = 256  # pairs whose scores are held together


@functools.partial(jax.jit, static_argnames="k")
def _rcsls_loss(w, x, y, source, target, *, k):
    with jax.default_matmul_precision("highest"):
        mapped = x @ w
        own = 2 * jnp.sum(mapped * y, 1)
        forward = jnp.sum(mapped * _center_of_nearest(mapped, target, k), 1)
        backward = jnp.sum(y * _center_of_nearest(y, source @ w, k), 1)
    return jnp.mean(forward + backward - own)


def _center_of_nearest(rows, keys, k):
    """Mean of the k keys with the largest inner product; the choice is a constant."""
    n, width = rows.shape
    tile = min(_TILE, n)
    padded = jnp.pad(lax.stop_gradient(rows), ((0, -n % tile), (0, 0)))
    fixed = lax.stop_gradient(keys)

    def nearest(block):
        return lax.top_k(block @ fixed.T, k)[1]

    indices = lax.map(nearest, padded.reshape(-1, tile, width)).reshape(-1, k)[:n]
    return keys[indices].mean(1)


@functools.partial(jax.jit, static_argnames=("k", "steps", "spectral"))
def _rcsls(start, x, y, source, target, *, learning_rate, k, steps, spectral):
    def loss(w):
        return _rcsls_loss(w, x, y, source, target, k=k)

    def step(state, _):
        w, best, best_loss, best_gradient, rate = state
        value, gradient = jax.value_and_grad(loss)(w)
        # Too long a step leaves the numbers, with a loss of NaN or minus infinity.
        worse = ~(jnp.isfinite(value) & (value <= best_loss))
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
    # The last round judges the last step; the step that it takes itself is dropped.
    (_, best, _, _, _), losses = lax.scan(step, state, None, length=steps + 1)
    return best, losses


def _clip_singular_values(w: Float[Array, "d e"]) -> Float[Array, "d e"]:
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return jnp.matmul(u * jnp.minimum(s, 1.0), vt, precision="highest")


def _spaces(operation, x, y, source, target, k) -> tuple[Array, ...]:
    x, y = numerics.paired(operation, x, y)
    source, target = numerics.widened(source), numerics.widened(target)
    for name, side, pairs in (("source", source, x), ("target", target, y)):
        if side.ndim < 2 or side.shape[-1] != pairs.shape[-1]:
            raise ValueError(
                f"`{name}` must be rows of width {pairs.shape[-1]}, as its side of the"
                f" pairs; got shape {tuple(side.shape)}."
            )
    most = min(source.shape[-2], target.shape[-2])
    if not 1 <= k <= most:
        raise ValueError(f"`k` must be in [1, {most}], the candidate rows; got {k}.")
    dtype = jnp.result_type(x, y, source, target)
    return tuple(side.astype(dtype) for side in (x, y, source, target))


def _check_map(name: str, w: Array, *, x: Array, y: Array) -> None:
    if w.shape[-2:] != (x.shape[-1], y.shape[-1]):
        raise ValueError(
            f"`{name}` must be [..., {x.shape[-1]}, {y.shape[-1]}], from the width of"
            f" `x` to that of `y`; got shape {tuple(w.shape)}."
        )
