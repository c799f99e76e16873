"""Concrete rows at a safe scale, brought there block by block: one copy of them.

What `pairs.prepare` does inside a trace, for arrays of NumPy's, memory maps and arrays
on a device. Only a block beyond the result is held at a time.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from . import pairs

_BLOCK = 1 << 20  # numbers in a block: 4 MiB, which malloc gives back


def prepare(
    queries: ArrayLike,
    keys: ArrayLike,
    metric: pairs.Metric,
    *,
    one_scale: bool = False,
) -> tuple[pairs.Rows, pairs.Rows]:
    """As `pairs.prepare`; where both are one array, so may be the results."""
    exponents: tuple[Array | None, Array | None] = None, None
    if metric != "cosine":
        exponents = pairs.scales(_top(queries), _top(keys), metric, one_scale)
    others = _rows(keys, exponents[1], metric)
    if queries is keys and (one_scale or metric != "dot"):
        return others, others
    return _rows(queries, exponents[0], metric), others


def spans(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """First rows and sizes of blocks: all of one size, the last may overlap."""
    size = max(1, min(rows, _BLOCK // max(columns, 1)))
    for start in range(0, rows, size):
        yield min(start, rows - size), size


def block(x: Any, start: int, size: int) -> Array:
    """Rows from `start` on, on the device."""
    if isinstance(x, jax.Array):
        return _cut(x, start, size)
    return jnp.asarray(x[start : start + size])


def _top(x: Any) -> Int[Array, ""]:
    tops = [pairs.top_exponent(block(x, *span)) for span in spans(*x.shape)]
    return jnp.max(jnp.stack(tops)) if tops else jnp.int32(0)


def _rows(x: Any, exponent: Int[Array, ""] | None, metric: pairs.Metric) -> pairs.Rows:
    n, d = x.shape
    values = jnp.zeros((n, d), jnp.float32)
    valid, exponents = np.zeros(n, bool), np.zeros(n, np.int32)
    for start, size in spans(n, d):
        here = slice(start, start + size)
        values, valid[here], exponents[here] = _placed(
            values, block(x, start, size), start, exponent, metric=metric
        )
    return pairs.Rows(values, jnp.asarray(valid), jnp.asarray(exponents))


@functools.partial(jax.jit, static_argnames="size")
def _cut(x, start, size):
    return lax.dynamic_slice_in_dim(x, start, size)


@functools.partial(jax.jit, static_argnames="metric", donate_argnums=0)
def _placed(
    values: Float[Array, "n d"], x: Float[Array, "b d"], start, exponent, *, metric
) -> tuple[Float[Array, "n d"], Bool[Array, " b"], Int[Array, " b"]]:
    rows = pairs.at_scale(x, exponent, metric)
    values = lax.dynamic_update_slice_in_dim(values, rows.values, start, axis=0)
    return values, rows.valid, rows.exponent
