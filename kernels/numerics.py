"""The arithmetic every kernel shares: products and norms with a stated precision."""

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int


def matmul_f32(a: Float[Array, "... n d"], b: Float[Array, "... d m"]) -> Array:
    """`a @ b`, accumulated and returned in float32 whatever the input dtype.

    Float32 inputs are multiplied in float32, never in TF32 or bfloat16.
    """
    return jnp.matmul(
        a, b, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST
    )


def scores_f32(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Array:
    """`a @ b.T` as `matmul_f32`, without the transposition.

    On XLA's CPU backend a product with a transposed operand takes twice the time.
    """
    return lax.dot_general(
        *(a, b),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST,
    )


def row_norms(x: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Euclidean length of each row, in float32; safe from overflow and underflow.

    Rows are brought near one first, so that norms up to the float32 range come out
    right.
    """
    x = x.astype(jnp.float32)
    exponent = _exponent(x)
    near_one = x * power_of_two(-exponent)[:, None]
    return power_of_two(exponent) * jnp.sqrt(jnp.sum(jnp.square(near_one), axis=1))


def unit(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows scaled to length one, in float32. A zero row stays zero."""
    return unit_and_divisor(x)[0]


def unit_and_divisor(
    x: Float[Array, "n d"],
) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    """`unit(x)`, and what each of its rows was divided by last.

    A row of the result times its divisor is the row of `x` times a power of two, but
    for the rounding of the division. Divisors are between 2**-24 and 4 sqrt(d).
    """
    x = x.astype(jnp.float32)
    x = x * power_of_two(-_exponent(x))[:, None]
    squares = jnp.sum(jnp.square(x), axis=1)
    # The root is taken of positive numbers only, so that a zero row has a gradient.
    divisor = jnp.sqrt(jnp.where(squares > 0, squares, 1.0))
    return x / divisor[:, None], divisor


def power_of_two(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """2**exponent, exactly, for exponents from -126 to 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def exponent_of(x: Float[Array, "n d"], axis: int | None) -> Int[Array, "..."]:
    """Smallest e with all `|x| < 2**e`; 0 for zeros. Of finite entries."""
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, initial=0.0))
    return jnp.frexp(largest)[1].astype(jnp.int32)


def _exponent(x: Float[Array, "n d"]) -> Int[Array, " n"]:
    """That of each row, as far as its power and the inverse are no subnormals.

    A division by the largest entry would not do: compilers multiply by the inverse.
    """
    return jnp.clip(exponent_of(x, axis=1), -126, 126)


def widened(x: ArrayLike) -> Array:
    """`x` as an array of at least float32; float64 stays where it is enabled.

    Raises:
      ValueError: complex numbers.
    """
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"Rows must be of real numbers; got dtype {x.dtype}.")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def paired(operation: str, x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    """`[..., n, p]` and `[..., n, q]`, both `widened`: the door of what compares rows.

    Raises:
      ValueError: fewer than two axes, different row counts, an empty side, leading
        axes that do not broadcast, or complex numbers.
    """
    x, y = widened(x), widened(y)
    flat = min(x.ndim, y.ndim) < 2
    if flat or x.shape[-2] != y.shape[-2] or 0 in x.shape[-2:] + y.shape[-2:]:
        raise ValueError(
            f"{operation} needs paired rows, [..., n, p] and [..., n, q] over the same"
            f" rows, not empty; got shapes {tuple(x.shape)} and {tuple(y.shape)}."
        )
    try:
        jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except ValueError:
        raise ValueError(
            f"{operation} pairs leading axes that broadcast, equal or 1;"
            f" got shapes {tuple(x.shape)} and {tuple(y.shape)}."
        ) from None
    return x, y


def centered(x: Float[Array, "... n d"]) -> Float[Array, "... n d"]:
    """Rows minus their mean; exactly zero where all rows are equal.

    The first row is taken away before the mean is: the difference of close numbers is
    exact, their sum is not.
    """
    x = x - x[..., :1, :]
    return x - x.mean(-2, keepdims=True)


def rounding_floor(x: Float[Array, "... n d"]) -> Float[Array, "..."]:
    """Singular values up to here may be the rounding of a zero: 10 eps |x|_F.

    For `x` as it was before centring, whose rounding stays. Matrices of 50 x 4 to
    30,000 x 256 with one column too many left 0.02 to 1.4 eps |x| in its place.
    """
    norm = jnp.sqrt(jnp.sum(jnp.square(x), (-2, -1)))
    return 10 * jnp.finfo(x.dtype).eps * norm
