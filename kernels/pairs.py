"""The score of one pair of rows: every score that a neighbour search returns is this.

Rows are brought to a safe scale first (unit length for cosine, powers of two
otherwise, which change no rounding), so that huge and tiny rows neither overflow nor
vanish. `closeness` is what searches rank by: larger is closer, whatever the metric.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from . import numerics

Metric = Literal["cosine", "dot", "l2"]
METRICS: tuple[Metric, ...] = ("cosine", "dot", "l2")

UNIT_ROUNDOFF = 2.0**-24  # half a unit in the last place of a float32 significand
# Rows of safe scale have entries up to 2**50: sums of their squares stay in range.
_SAFE_EXPONENT = 50


class Rows(NamedTuple):
    """Rows at a safe scale.

    Attributes:
      values: float32; a row that is not valid is zero.
      valid: False where a row holds NaN or Inf, or is zero under cosine.
      exponent: the row is `values * 2**exponent`; 0 under cosine.
      significand: of rows given in bfloat16: `values * significand` has their few bits,
        but for the rounding of a division by the length. None for wider rows.
    """

    values: Float[Array, "n d"]
    valid: Bool[Array, " n"]
    exponent: Int[Array, " n"]
    significand: Float[Array, " n"] | None = None


def check_metric(metric: str) -> None:
    """Raises ValueError where `metric` is unknown."""
    if metric not in METRICS:
        raise ValueError(f"`metric` must be one of {METRICS}; got {metric!r}.")


def prepare(
    queries: Float[Array, "n d"],
    keys: Float[Array, "m d"],
    metric: Metric,
    *,
    one_scale: bool = False,
) -> tuple[Rows, Rows]:
    """Both sides at a safe scale: one scale for all keys, so that they compare.

    With `one_scale` all queries share one too: keys look for queries as well.
    """
    exponents: tuple[Array | None, Array | None] = None, None
    if metric != "cosine":
        tops = top_exponent(queries), top_exponent(keys)
        exponents = scales(*tops, metric, one_scale)
    return (
        at_scale(queries, exponents[0], metric),
        at_scale(keys, exponents[1], metric),
    )


def top_exponent(x: Float[Array, "n d"]) -> Int[Array, ""]:
    """Smallest e with all `|x| < 2**e` in the rows that are finite; 0 for zeros."""
    return numerics.exponent_of(_finite(x)[0], axis=None)


def scales(
    of_queries: Int[Array, ""], of_keys: Int[Array, ""], metric: Metric, one_scale: bool
) -> tuple[Int[Array, ""] | None, Int[Array, ""]]:
    """Both sides' exponents for `at_scale`, from their `top_exponent`s (not cosine)."""
    if metric == "l2":
        common = jnp.maximum(of_queries, of_keys) - _SAFE_EXPONENT
        return common, common
    return of_queries - _SAFE_EXPONENT if one_scale else None, of_keys - _SAFE_EXPONENT


def at_scale(
    x: Float[Array, "n d"], exponent: Int[Array, ""] | None, metric: Metric
) -> Rows:
    """One side at a safe scale: its exponent, or with None each row's own.

    Cosine takes no exponent: rows become unit rows.
    """
    short = x.dtype == jnp.bfloat16
    x, finite = _finite(x)
    if metric == "cosine":
        valid = finite & (x != 0).any(axis=1)
        values, divisor = numerics.unit_and_divisor(x)
        zeros = jnp.zeros(len(x), jnp.int32)
        return Rows(values, valid, zeros, lax.stop_gradient(divisor) if short else None)
    own = numerics.exponent_of(x, axis=1) if exponent is None else exponent
    exponents = jnp.zeros(len(x), jnp.int32) + own
    values = times_power_of_two(x, -exponents[:, None])
    significand = jnp.ones(len(x), jnp.float32) if short else None
    return Rows(values, finite, exponents, significand)


def pair_closeness(
    queries: Float[Array, "r d"], keys: Float[Array, "r c d"], metric: Metric
) -> Float[Array, "r c"]:
    """Closeness of each safe-scale query to keys of its own, summed in float32.

    cosine, dot: sum_i x_i y_i        l2: -sum_i (x_i - y_i)^2

    A pair has the same sum, to the last bit, wherever it stands, if c is a multiple of
    eight: XLA's CPU product adds up what is left over in another order.
    """
    if metric == "l2":
        differences = queries[:, None] - keys
        return -_row_products(differences, differences)
    return _row_products(queries, keys)


def score(
    closeness: Float[Array, "n k"], exponent: Int[Array, " n"], metric: Metric
) -> Float[Array, "n k"]:
    """The metric's own value: similarity, or squared Euclidean distance for l2.

    `exponent` is the sum of both sides' exponents.
    """
    value = -closeness if metric == "l2" else closeness
    value = times_power_of_two(value, exponent[:, None])
    return jnp.where(value == 0, 0.0, value)  # no negative zeros: they sort apart


def times_power_of_two(
    x: Float[Array, "..."], exponent: Int[Array, "..."]
) -> Float[Array, "..."]:
    """`x * 2**exponent`, exact unless the result leaves the range of float32."""
    for _ in range(3):
        # Three steps reach the whole range without an intermediate power that
        # overflows.
        step = jnp.clip(exponent, -126, 127)
        exponent = exponent - step
        x = x * numerics.power_of_two(step)
    return x


def _row_products(a: Array, b: Float[Array, "r c d"]) -> Float[Array, "r c"]:
    # A batched product keeps XLA's CPU backend twice as fast as a sum over an axis.
    return jnp.einsum(
        "rd,rcd->rc" if a.ndim == 2 else "rcd,rcd->rc",
        *(a, b),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _finite(x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Bool[Array, " n"]]:
    """`x` in float32 with zeros for rows that are not finite there, and which are."""
    x = x.astype(jnp.float32)
    finite = jnp.isfinite(x).all(axis=1)
    return jnp.where(finite[:, None], x, 0), finite
