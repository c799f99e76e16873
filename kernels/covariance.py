"""The leading directions of rows, which precondition logistic problems.

A logistic Hessian is a covariance of the rows, weighted by how uncertain each is, and
the penalty. About its inverse is had from the covariance that all problems share, so
far as its leading directions tell it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from .passes import exact_product, rows_of

# The side of an eigenproblem: from 64 on LAPACK wakes threads, which then wait for more
# of its work at full speed for a tenth of a second.
SPAN = 60
SPANS = 2  # such parts of the space in which the leading directions are sought
SPARE = 8  # directions of it that are not kept


class Basis(NamedTuple):
    """Leading directions and variances of the rows; the mean of the other variances."""

    directions: Float[Array, "d rank"]
    variances: Float[Array, " rank"]
    tail: Float[Array, ""]


@functools.partial(jax.jit, static_argnums=2)
def basis_of_rows(x: Float[Array, "*l n d"], pairs: Int[Array, "2 m"], dtype) -> Basis:
    """Spectrum of the covariance within tiles, from differences of pairs of rows."""
    difference = rows_of(x, pairs[0]).astype(dtype) - rows_of(x, pairs[1]).astype(dtype)
    difference = lax.optimization_barrier(difference)
    m, d = difference.shape
    covariance = exact_product(difference.T, difference) / (2 * m)
    scale = jnp.trace(covariance)  # without it, squares of squares overflow
    covariance = covariance / jnp.where(scale > 0, scale, 1)
    if d <= SPAN:
        variances, directions = jnp.linalg.eigh(covariance)
        tail = jnp.zeros((), dtype)
    else:
        parts = min(SPANS, -(-d // SPAN))
        width = parts * min(SPAN, d // parts)
        span = jax.random.normal(jax.random.key(0), (d, width), dtype)
        for _ in range(3):  # subspace iteration: a preconditioner may be rough
            span = _orthonormal(exact_product(covariance, span))
        variances, directions = _turned_to_axes(covariance, span, parts)
        variances, directions = variances[SPARE:], directions[:, SPARE:]
        rest = 1 - jnp.sum(variances)
        tail = jnp.maximum(rest, 0) / (d - len(variances))
    # A direction without variance is not one along which a step may be unbounded.
    floor = 1e-6 * variances[-1]
    variances, tail = jnp.maximum(variances, floor), jnp.maximum(tail, floor)
    return Basis(directions, scale * variances, scale * tail)


def _turned_to_axes(
    covariance, span: Float[Array, "d m"], count: int
) -> tuple[Array, Array]:
    """Axes of the covariance in each part of the span, and variances, ascending.

    The parts hold directions of unlike variance, so little couples them.
    """
    parts = jnp.split(span, count, axis=1)
    inner = [exact_product(part.T, exact_product(covariance, part)) for part in parts]
    variances, axes = jnp.linalg.eigh(jnp.stack(inner))
    turned = [exact_product(part, own) for part, own in zip(parts, axes)]
    order = jnp.argsort(variances.ravel())
    return variances.ravel()[order], jnp.concatenate(turned, axis=1)[:, order]


def _orthonormal(span: Float[Array, "d m"]) -> Float[Array, "d m"]:
    """Its columns made orthonormal, but shorter where they are dependent.

    By Cholesky, which is products: QR takes longer here than an iteration of all.
    """
    tiny = jnp.finfo(span.dtype).tiny
    span = span / (jnp.linalg.norm(span, axis=0) + tiny)  # they differ as variances do
    gram = exact_product(span.T, span)
    ridge = 10 * jnp.finfo(span.dtype).eps * jnp.trace(gram)
    one = jnp.eye(len(gram), dtype=span.dtype)
    root = jnp.linalg.cholesky(gram + (ridge + tiny) * one)

    def row(i, inverse):  # row by row: BLAS wakes threads for it, which takes longer
        own = one[i] - exact_product(root[i], inverse)
        return inverse.at[i].set(own / root[i, i])

    inverse = lax.fori_loop(0, len(gram), row, jnp.zeros_like(gram))
    return exact_product(span, inverse.T)
