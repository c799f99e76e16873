"""What a traced tile multiplies, and how far its scores can lie from the truth.

On a CPU those are the rows. An accelerator multiplies bfloat16 an order of magnitude
faster than float32: rows that were given in bfloat16 are multiplied as they were given,
wider ones as the sum of two parts, of whose four products three are made. As everything
that filters, the result is worth its bound, which is computed row by row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from . import numerics, pairs


class Factors(NamedTuple):
    """Rows as a tile multiplies them.

    Attributes:
      parts: their sum times `scale` is nearly the row; one or two.
      scale: of each row; None for one.
      squares: squared lengths; None where the metric is not l2.
    """

    parts: tuple[Float[Array, "n d"], ...]
    scale: Float[Array, " n"] | None
    squares: Float[Array, " n"] | None


class Lengths(NamedTuple):
    """Of each row: its length, that of its second part, and that of what is missing."""

    row: Float[Array, " n"]
    second: Float[Array, " n"]
    missing: Float[Array, " n"]


def accelerated() -> bool:
    """Whether products run on something that is not a CPU."""
    return jax.default_backend() != "cpu"


def split(rows: pairs.Rows, metric: pairs.Metric) -> tuple[Factors, Lengths]:
    """The factors of rows, and what the bound needs of them."""
    values, scale = rows.values, None
    length = numerics.row_norms(values)
    squares = jnp.sum(jnp.square(values), axis=1) if metric == "l2" else None
    nothing = jnp.zeros_like(length)
    if not accelerated():
        return Factors((values,), None, squares), Lengths(length, nothing, nothing)
    parts: tuple[Array, ...]
    if rows.significand is None:
        first = _rounded(values)
        second = _rounded(values - first)
        parts, missing = (first, second), values - first - second
    else:
        scale = 1 / rows.significand
        first = _rounded(values * rows.significand[:, None])
        parts, missing = (first,), values - first * scale[:, None]
        second = jnp.zeros((len(values), 1))
    lost = numerics.row_norms(missing)
    # Computing it rounds too: three times, each at most a unit of the row. And of an
    # entry, what is below 2**-126 may count as zero in its part, which is scaled by up
    # to two, and in what is missing.
    lost += 3 * pairs.UNIT_ROUNDOFF * length + values.shape[1] ** 0.5 * 2.0**-124
    lengths = Lengths(length, numerics.row_norms(second), lost)
    narrow = tuple(part.astype(jnp.bfloat16) for part in parts)
    return Factors(narrow, scale, squares), lengths


def _rounded(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    # Compilers may drop a conversion there and back; they may not drop this.
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def closeness(a: Factors, b: Factors) -> Float[Array, "r t"]:
    """Closeness of all pairs by matrix products: within `bound` of the pairs'."""
    # A second part is so small that a product of two of them is left to the bound.
    products = [
        numerics.scores_f32(x, y)
        for i, x in enumerate(a.parts)
        for j, y in enumerate(b.parts)
        if i + j < 2
    ]
    scores = sum(products[1:], products[0])
    if a.scale is not None:
        scores = scores * a.scale[:, None]
    if b.scale is not None:
        scores = scores * b.scale[None, :]
    if a.squares is not None and b.squares is not None:
        scores = 2 * scores - (a.squares[:, None] + b.squares[None, :])
    return scores


def bound(
    rows: Lengths, keys: Lengths, columns: int, metric: pairs.Metric
) -> Float[Array, " n"]:
    """How far `closeness` may lie from `pairs.pair_closeness`, for any key.

    A sum of d products in float32, in any order, errs by at most
    `d u sum_i |x_i y_i| <= d u |x| |y|` to first order, u = 2**-24 (Higham, Accuracy
    and Stability of Numerical Algorithms, 2002, section 3.1); both sides of the
    comparison err, and l2 adds the roundings of two squared norms. To it comes, by
    Cauchy-Schwarz, what the parts of rows lack.
    """
    most = Lengths(*(jnp.max(length, initial=0.0) for length in keys))
    lost = rows.missing * most.row + (rows.row + rows.missing) * most.missing
    lost += rows.second * most.second
    size = rows.row * most.row
    if metric == "l2":
        size, lost = jnp.square(rows.row + most.row), 2 * lost
    # Tensor cores cut sums off where others round: twice the error.
    sides = 3.1 if accelerated() else 2
    sums = sides * (columns + 6) * pairs.UNIT_ROUNDOFF * size
    return 1.01 * (lost + sums) + columns * 2.0**-125
