"""Passes over the rows of a batch of logistic problems: products, losses, derivatives.

A pass evaluates one function on every block of rows. It visits the blocks that have
unsolved problems in a loop, so that the others cost nothing. Where columns are few and
most blocks are visited, it is one batched product instead: XLA copies what a loop
slices, which takes as long as a product of few columns.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

WHOLE = 11  # arrays like the margins that a pass over all blocks holds


class Rows(NamedTuple):
    """Rows in blocks, less the mean of their group; the length of the longest."""

    values: Float[Array, "b r d"]
    means: Float[Array, "g d"]
    reach: Float[Array, ""]


class Units(NamedTuple):
    """The blocks that a pass visits: the first `count` of `order`."""

    order: Int[Array, " b"]
    count: Int[Array, ""]  # type: ignore[assignment]  # a tuple has a method of that name
    tile: Int[Array, " b"]  # of each block
    tiles: int


class Block(NamedTuple):
    """What a pass reads of each block, with a leading axis `b`."""

    values: Float[Array, "r d"]
    problem: Int[Array, " c"]
    labels: Int[Array, "c r"]
    weights: Float[Array, "c r"]
    margins: Float[Array, "c k r"]


def exact_product(a: Array, b: Array) -> Array:
    """Never TF32 or bfloat16: the certificate needs the gradient's last digits."""
    return jnp.matmul(
        a, b, precision=lax.Precision.HIGHEST, preferred_element_type=a.dtype
    )


def rows_of(x: Array, rows) -> Array:
    """Rows of `[n, d]` or of `[layer, n, d]`, counted through all layers."""
    return jnp.take(x.reshape(-1, x.shape[-1]), rows, axis=0, mode="clip")


@functools.partial(jax.jit, static_argnames="dtype", donate_argnums=0, keep_unused=True)
def gather(
    old: Array | None, x: Float[Array, "*l n d"], rows, centre, group, *, dtype
) -> Rows:
    """Reads the blocks `rows` `[b, r]`; `centre` `[g, q]` are rows to take a mean of.

    Centring changes the intercept only, which is free, and the conditioning much.
    `old` values, of the same shape, give their memory: to touch new memory takes
    longer than to fill it.
    """
    del old
    means = jnp.mean(rows_of(x, centre).astype(dtype), axis=1)
    values = rows_of(x, rows).astype(dtype) - means[group][:, None]
    values = lax.optimization_barrier(values)  # else they are gathered twice
    return Rows(values, means, jnp.sqrt(jnp.max(jnp.sum(jnp.square(values), axis=2))))


def by_column(values: Array, problem: Int[Array, "*b c"]) -> Array:
    """Of each column what its problem has; problem p, which is none, has the last."""
    return jnp.take(values, problem, axis=0, mode="clip")


def over_blocks(
    units: Units, skip: Bool[Array, ""], one: Callable, block: Block, *others: Array
) -> tuple:
    """`one(block, *others)` of every block: what it keeps `[b, ...]`, and sums by tile.

    `one` returns both as trees. Blocks that are not visited keep zeros or values that
    nobody may read; with `skip` none is visited.
    """
    b = len(units.order)
    given = block, *others
    shapes = jax.eval_shape(one, *jax.tree.map(lambda a: a[0], given))
    kept, sums = (
        jax.tree.map(lambda a, n=n: jnp.zeros((n, *a.shape), a.dtype), part)
        for n, part in zip((b, units.tiles), shapes)
    )

    def whole():
        kept, parts = jax.vmap(one)(*given)
        add = functools.partial(
            jax.ops.segment_sum, segment_ids=units.tile, num_segments=units.tiles
        )
        return kept, jax.tree.map(add, parts)

    def visits():
        def visit(i, carry):
            n = units.order[i]
            own, parts = one(*jax.tree.map(lambda a: a[n], given))
            return (
                jax.tree.map(lambda a, v: _set(a, n, v), carry[0], own),
                jax.tree.map(
                    lambda a, v: _set(a, units.tile[n], a[units.tile[n]] + v),
                    carry[1],
                    parts,
                ),
            )

        return lax.fori_loop(0, jnp.where(skip, 0, units.count), visit, (kept, sums))

    # Where those would take more room than the rows, the loop is as fast as well.
    if WHOLE * block.margins.size > block.values.size:
        return visits()
    return lax.cond(~skip & (2 * units.count > b), whole, visits)


def _set(a: Array, i, value: Array) -> Array:
    return lax.dynamic_update_index_in_dim(a, value, i, 0)


# In all passes a barrier keeps a block's values in hand, else they are computed anew
# in every use.


def forward(
    units: Units,
    skip: Bool[Array, ""],
    block: Block,
    moves: Float[Array, "b c k r"],
    ahead: Float[Array, "p k d"],
    shift: Float[Array, "p k"],
) -> tuple[Float[Array, "b c k r"], Float[Array, "t c 6"]]:
    """Margins of the weights `ahead`, and second derivatives of the losses: by pairs
    (0, 0), (1, 0), (1, 1), ... of the directions `shift`, `ahead` and `moves`.
    """

    def one(block: Block, moves):
        own = by_column(ahead, block.problem).reshape(-1, ahead.shape[2])
        # Rows first: XLA's CPU product repacks its second factor, here the small one.
        # It takes longer for 9 to 15 columns than for 16.
        extra = 16 - len(own) if 8 < len(own) < 16 else 0
        wide = jnp.pad(own, ((0, extra), (0, 0)))
        step = lax.optimization_barrier(exact_product(block.values, wide.T))
        step = lax.optimization_barrier(step[:, : len(own)].T.reshape(moves.shape))
        constant = by_column(shift, block.problem)[..., None]
        _, _, p = _losses(block)
        parts = [jnp.broadcast_to(constant, step.shape), step, moves]
        return step, jnp.stack(sum(_bend(p, block.weights, parts), []), axis=1)

    return over_blocks(units, skip, one, block, moves)


def along(
    units: Units, skip: Bool[Array, ""], block: Block, step: Float[Array, "b c k r"]
) -> Float[Array, "t c 2"]:
    """First and second derivative of the losses along `step`, at its end."""

    def one(block: Block, step):
        _, residual, p = _losses(block._replace(margins=block.margins + step))
        first = jnp.sum(residual * step, axis=(1, 2))
        ((second,),) = _bend(p, block.weights, [step])
        return (), jnp.stack([first, second], axis=1)

    return over_blocks(units, skip, one, block, step)[1]


class Slope(NamedTuple):
    """Loss at the margins; its gradient; second derivatives by the intercepts."""

    loss: Float[Array, "t c"]
    weights: Float[Array, "t c k d"]
    intercepts: Float[Array, "t c k"]
    curvature: Float[Array, "t c k"]


def backward(units: Units, block: Block) -> Slope:
    """Sums over the rows of every tile."""

    def one(block: Block):
        loss, residual, p = _losses(block)
        flat = residual.reshape(-1, residual.shape[2])
        gradient = exact_product(flat, block.values)
        return (), Slope(
            jnp.sum(loss, axis=1),
            gradient.reshape(*residual.shape[:2], -1),
            jnp.sum(residual, axis=2),
            jnp.einsum("cr,ckr->ck", block.weights, p * (1 - p), precision="highest"),
        )

    return over_blocks(units, jnp.array(False), one, block)[1]


def _losses(block: Block):
    """Loss `[c, r]`, and its derivative and probabilities `[c, k, r]` by margin.

    Of a row that is well classified the small numbers are kept: the probability of
    the wrong classes, never one less that of the right one.
    """
    margins, labels, weights = block.margins, block.labels, block.weights
    if margins.shape[1] == 1:
        sign = 2 * labels[:, None].astype(margins.dtype) - 1
        right = sign * margins
        small = jnp.exp(-jnp.abs(right))
        p = jnp.where(right >= 0, small, 1) / (1 + small)  # of the wrong class
        loss = jnp.maximum(-right, 0) + jnp.log1p(small)
        loss, residual = loss[:, 0], -sign * p
    else:
        p = jax.nn.softmax(margins, axis=1)
        y = jax.nn.one_hot(labels, margins.shape[1], axis=1, dtype=margins.dtype)
        wrong = jnp.sum(p * (1 - y), axis=1)
        far = jax.nn.logsumexp(margins, axis=1) - jnp.sum(y * margins, axis=1)
        loss = jnp.where(wrong < 0.5, -jnp.log1p(-jnp.minimum(wrong, 0.5)), far)
        residual = jnp.where(y > 0, -wrong[:, None], p)
    return weights * loss, *lax.optimization_barrier((weights[:, None] * residual, p))


def _bend(p, weights, directions):
    """Second derivatives `[c]` along all pairs i >= j of directions `[c, k, r]`."""
    if p.shape[1] == 1:
        mass = weights[:, None] * p * (1 - p)
    else:
        mass = weights[:, None] * p
        directions = [v - jnp.sum(p * v, axis=1, keepdims=True) for v in directions]
    mass = lax.optimization_barrier(mass)
    return [
        [jnp.sum(mass * u * v, axis=(1, 2)) for v in directions[: i + 1]]
        for i, u in enumerate(directions)
    ]
