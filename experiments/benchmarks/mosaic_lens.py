"""Log-sum-exp and entropy of every row over a vocabulary, on a Hopper GPU.

A contestant of `experiments.benchmarks.gpu --case=lens`, and no more than that yet. The
product is that of `mosaic_product`; of each tile of logits, 256 tokens wide, it leaves
three numbers per row: the largest logit m, the sum of `exp(logit - m)`, and the sum of
`exp(logit - m) * (logit - m)`. Plain JAX joins the tiles.

What `kernels.project_layers` does besides (top tokens, ranks, KL, a soft cap) is not
here.

Estimated, not measured. A score costs five full-rate instructions, a maximum at half
the rate, and one exponential, of which a multiprocessor makes 16 a clock: for a tile of
128 x 256 about 2,000 clocks of exponentials beside 1,800 of the rest, which may
overlap, and 65,536 of the product at 4,096 columns, which stands still meanwhile. So
the product has 94 to 97% of the time. Of 65,536 rows and 128,256 tokens 0.4 GB of
numbers are written, a tenth of a millisecond; dense float32 logits are 34 GB. If the
product gets 85% of the peak, that is 0.09 s.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from . import mosaic_product
from .mosaic_product import DEFAULT, TuningConfig

# In place of the logits of no token: finite, as 0 times infinity is not a number.
MASKED = -1e30
_BLOCK = 8  # columns of one block of the accumulator's layout


class Prediction(NamedTuple):
    """As in `kernels.Projection`; -inf and NaN for a row without any token.

    Attributes:
      log_sum_exp: float32.
      entropy: float32, in nats.
    """

    log_sum_exp: Float[Array, "*rows"]
    entropy: Float[Array, "*rows"]


def predictions(
    hidden: Float[Array, "*rows d"],
    unembed: Float[Array, "vocab d"],
    *,
    bias: Float[Array, " vocab"] | None = None,
    config: TuningConfig = DEFAULT,
    blocks: int = 132,
    interpret: Any = False,
) -> Prediction:
    """Of `logits = hidden @ unembed.T + bias`, which are not held.

    Rows are multiplied in bfloat16 and summed in float32.

    Args:
      hidden: of any number of axes.
      unembed: bfloat16. Copied unless vocab is a multiple of the tile and d of
        `tile_k`.
      bias: -inf for a token that is none.
      config: of the product.
      blocks: of the grid; the GPU's multiprocessors.
      interpret: `plgpu.InterpretGPUParams`, to run it without such a GPU.
    """
    n, m = hidden[..., 0].size, len(unembed)
    steps = mosaic_product.walk(
        *(_rounded_up(n, config.block_m), _rounded_up(m, config.tile_n)), config
    )
    knobs = {"config": config, "blocks": blocks, "interpret": interpret}
    return _predicted(hidden, unembed, bias, steps, **knobs)


@functools.partial(jax.jit, static_argnames=("config", "blocks", "interpret"))
def _predicted(hidden, unembed, bias, walk, *, config, **knobs) -> Prediction:
    rows = hidden.reshape(-1, hidden.shape[-1]).astype(jnp.bfloat16)
    (n, d), m = rows.shape, len(unembed)
    if bias is None:
        bias = jnp.zeros(m)
    bias = jnp.maximum(bias.astype(jnp.float32), MASKED)
    bias = jnp.pad(bias, (0, -m % config.tile_n), constant_values=MASKED)
    rows, keys = (
        jnp.pad(x, ((0, -len(x) % multiple), (0, -d % config.tile_k)))
        for x, multiple in ((rows, config.block_m), (unembed, config.tile_n))
    )
    parts = moments(
        *(rows, keys, bias.reshape(-1, config.tile_n), walk), config=config, **knobs
    )
    found = joined(parts[:, :, :n])
    return Prediction(*(x.reshape(hidden.shape[:-1]) for x in found))


def moments(
    rows: Float[Array, "n d"],
    keys: Float[Array, "m d"],
    bias: Float[Array, "tiles tile_n"],
    walk: Int[Array, "steps 2"],
    *,
    config: TuningConfig,
    blocks: int = 132,
    interpret: Any = False,
) -> Float[Array, "3 tiles n"]:
    """Maximum, sum and weighted sum of each row and tile, as the file describes."""
    return mosaic_product.call(
        functools.partial(_kernel, config=config),
        (walk, rows, keys, bias),
        jax.ShapeDtypeStruct((3, *(len(bias), len(rows))), jnp.float32),
        **dict(blocks=blocks, interpret=interpret, approximate=True),
    )


def _kernel(walk, rows, keys, bias, found, *, config: TuningConfig):
    sides = mosaic_product.WARPGROUPS
    scratch = {
        "shift": plgpu.SMEM((sides, config.tile_n), jnp.float32),
        "arrived": plgpu.Barrier(num_barriers=sides),
    }

    def epilogue(tile, *, shift, arrived):
        mine, column = tile.mine, tile.column
        plgpu.copy_gmem_to_smem(bias.at[column], shift.at[mine], arrived.at[mine])
        tile.multiply()
        plgpu.barrier_wait(arrived.at[mine])
        reduced = _reduced(tile.scores[...], shift.at[mine])
        plgpu.commit_smem()  # after which the bias may be replaced
        for i, part in enumerate(reduced):
            mosaic_product.store(found.at[i, column, tile.span], part)

    mosaic_product.visit_tiles(
        walk, rows, keys, epilogue, config=config, scratch=scratch
    )


def _reduced(scores, bias):
    """The three numbers of each row; a block of columns after the other.

    So a thread has one set of scores, and nothing else of their number.
    """
    shape = scores.shape[0], _BLOCK
    logits = []
    for start in range(0, scores.shape[1], _BLOCK):
        at = slice(start, start + _BLOCK)
        shift = lax.broadcast_in_dim(bias[at], shape, (1,))
        logits.append(scores[:, at] + shift)
    top = jnp.max(functools.reduce(jnp.maximum, logits), axis=1)
    level = lax.broadcast_in_dim(top, shape, (0,))
    total = weighted = jnp.zeros(shape, jnp.float32)
    for block in logits:
        below = block - level
        weight = jnp.exp(below)
        total, weighted = total + weight, weighted + weight * below
    return top, jnp.sum(total, axis=1), jnp.sum(weighted, axis=1)


def joined(parts: Float[Array, "3 tiles n"]) -> Prediction:
    """Of all tiles together."""
    top, total, weighted = parts
    most = top.max(axis=0)
    below = top - most
    shrink = jnp.exp(below)
    weighted = jnp.sum(shrink * (weighted + total * below), axis=0)
    total = jnp.sum(shrink * total, axis=0)
    log_sum, nothing = jnp.log(total), most <= MASKED / 2
    return Prediction(
        jnp.where(nothing, -jnp.inf, most + log_sum),
        jnp.where(nothing, jnp.nan, log_sum - weighted / total),
    )


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
