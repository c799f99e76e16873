"""All pairs on a Hopper GPU: group maxima taken where the product's tiles are made.

A contestant of `experiments.benchmarks.gpu`, and no more than that yet: it moves to
`kernels/mosaic_gpu.py` behind `implementation="mosaic_gpu"` when the record shows that
it wins, else it is deleted.

The kernel multiplies bfloat16 rows with `wgmma`. Of each tile of scores, 256 columns
wide, it leaves three numbers per row and group, a group being every eighth column: the
two largest scores, with their columns in the lowest bits, and the third. The k best of
a row are among the largest two of all groups, unless a third is as good: so the top
few of those numbers are the candidates, and the rest is bounded. XLA selects, scores
the candidates pair by pair in float32, and proves each row; the few rows without a
proof go to `kernels.nearest_neighbors`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from jaxling import kernels
from jaxling.kernels import numerics, pairs, topk

GROUPS = 8  # of a tile: as many columns as one block of the accumulator's layout
KEPT = 2  # scores of a group whose columns are known
# Added to every score, so that none is near zero: the bits of a number that is not
# normal may be flushed, and with them the column. What is left below `NOBODY` is
# padding or an invalid key.
OFFSET, NOBODY = 1.25, 0.125
_WARPGROUPS = 2  # that multiply; one more fetches


class TuningConfig(NamedTuple):
    """Sizes of tiles, all of them powers of two.

    Attributes:
      tile_m: rows of a warpgroup's tile; two warpgroups share a block's keys.
      tile_n: keys of a tile, at most 256.
      tile_k: columns that are fetched together.
      steps: how many such fetches are in flight.
      band: row tiles that walk the keys together, so that L2 holds what they share.
      rows: rows whose candidates are selected and scored together.
    """

    tile_m: int = 64
    tile_n: int = 256
    tile_k: int = 64
    steps: int = 4
    band: int = 16
    rows: int = 1024

    @property
    def block_m(self) -> int:
        """Rows of a block's tile."""
        return self.tile_m * _WARPGROUPS


_DEFAULT = TuningConfig()


def group_maxima(
    x: Float[Array, "n d"],
    columns: Float[Array, "tiles 2 tile_n"],
    walk: Int[Array, "steps 2"],
    *,
    config: TuningConfig,
    blocks: int = 132,
    interpret: Any = False,
) -> tuple[Float[Array, "n maxima"], Float[Array, "tiles n"]]:
    """The largest scores of each row's groups, without the scores ever being held.

    The score of row i and key j is `x_i . x_j * columns[0, j] + columns[1, j]`, summed
    in float32, for all tiles that the `walk` names.

    Args:
      x: bfloat16; n a multiple of the tiles' sides, d of `tile_k`.
      columns: float32, scale and offset of the keys, tile by tile.
      walk: int32, tiles in order: number of the row tile, number of the key tile.
      blocks: of the grid; the GPU's multiprocessors.
      interpret: `plgpu.InterpretGPUParams`, to run it without such a GPU.

    Returns:
      Float32. For each row and tile of keys `KEPT * GROUPS` scores: the largest of each
      group, then the second of each, whose lowest bits say which member it is; and the
      largest third score of all groups of the tile.
    """
    n = x.shape[0]
    tiles = n // config.tile_n
    return plgpu.kernel(
        functools.partial(_kernel, config=config),
        out_type=(
            jax.ShapeDtypeStruct((n, tiles * KEPT * GROUPS), jnp.float32),
            jax.ShapeDtypeStruct((tiles, n), jnp.float32),
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )(walk, x, columns)


def _kernel(walk, x, columns, maxima, thirds, *, config: TuningConfig):
    tile_m, tile_n, tile_k = config.tile_m, config.tile_n, config.tile_k
    swizzle = plgpu.find_swizzle(8 * tile_k * x.dtype.itemsize)
    transforms = (
        plgpu.TilingTransform((8, swizzle // x.dtype.itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )

    def pipeline(body, context):
        operands = [
            plgpu.BlockSpec(
                *((size, tile_k), lambda k: (0, k)),
                transforms=transforms,
                memory_space=plgpu.SMEM,
            )
            for size in (config.block_m, tile_n)
        ]
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(x.shape[1] // tile_k,),
            in_specs=operands,
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=_WARPGROUPS,
            max_concurrent_steps=config.steps,
            compute_context=context,
        )

    def nothing(*_):
        return None

    # Buffers outlive a tile: the next one's operands arrive during the epilogue.
    @functools.partial(
        pl.run_scoped,
        operands=pipeline(nothing, nothing).get_allocations(x, x),
        keys=plgpu.SMEM((_WARPGROUPS, 2, tile_n), jnp.float32),
        kept=plgpu.SMEM((_WARPGROUPS, tile_m, KEPT * GROUPS), jnp.float32),
        third=plgpu.SMEM((_WARPGROUPS, tile_m), jnp.float32),
        arrived=plgpu.Barrier(num_barriers=_WARPGROUPS),
        collective_axes="warpgroup",
    )
    def _(operands, keys, kept, third, arrived):
        mine = lax.axis_index("warpgroup")

        @plgpu.nd_loop((walk.shape[0],), collective_axes="block")
        def _(loop):
            row, column = walk[loop.index[0], 0], walk[loop.index[0], 1]

            def multiply(_, a, b, scores):
                a = a.at[pl.ds(mine * tile_m, tile_m)]
                plgpu.wgmma(scores, a, b.transpose((1, 0)))
                plgpu.wgmma_wait(0)
                return scores

            def context(run):
                @functools.partial(
                    pl.run_scoped, scores=plgpu.ACC((tile_m, tile_n), jnp.float32)
                )
                def _(scores):
                    plgpu.copy_gmem_to_smem(
                        columns.at[column], keys.at[mine], arrived.at[mine]
                    )
                    run(scores)
                    plgpu.barrier_wait(arrived.at[mine])
                    first, second, last = _three_largest(scores[...], keys.at[mine])
                    # The previous tile's results must have left before these come.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    kept[mine, :, :GROUPS] = first
                    kept[mine, :, GROUPS:] = second
                    third[mine] = jnp.max(last, axis=1)
                    plgpu.commit_smem()
                    rows = pl.ds(row * config.block_m + mine * tile_m, tile_m)
                    at = pl.ds(column * KEPT * GROUPS, KEPT * GROUPS)
                    plgpu.copy_smem_to_gmem(kept.at[mine], maxima.at[rows, at])
                    plgpu.copy_smem_to_gmem(third.at[mine], thirds.at[column, rows])

            pipeline(multiply, context)(
                x.at[pl.ds(row * config.block_m, config.block_m)],
                x.at[pl.ds(column * tile_n, tile_n)],
                allocations=operands,
            )

        plgpu.wait_smem_to_gmem(0)


def _three_largest(scores, keys):
    """The three largest of each row's groups, `[tile_m, GROUPS]`; columns in the bits.

    Member j of group g is column `j * GROUPS + g`: taken so, a thread holds all members
    and nothing travels between threads.
    """
    members = scores.shape[1] // GROUPS
    first = second = third = jnp.zeros((scores.shape[0], GROUPS), jnp.float32)
    for j in range(members):
        at = slice(j * GROUPS, (j + 1) * GROUPS)
        scale, offset = (
            lax.broadcast_in_dim(keys[i, at], first.shape, (1,)) for i in range(2)
        )
        bits = lax.bitcast_convert_type(scores[:, at] * scale + offset, jnp.int32)
        score = lax.bitcast_convert_type((bits & -members) | j, jnp.float32)
        first, below = jnp.maximum(first, score), jnp.minimum(first, score)
        second, below = jnp.maximum(second, below), jnp.minimum(second, below)
        third = jnp.maximum(third, below)
    return first, second, third


@functools.lru_cache(maxsize=4)
def walk(n: int, config: TuningConfig) -> Int[Array, "steps 2"]:
    """All tiles of `n` rows and keys, a band of rows after the other."""
    sides = n // config.block_m, n // config.tile_n
    row, column = (side.ravel() for side in np.indices(sides, np.int32))
    order = np.lexsort((row, column, row // config.band))
    return jnp.asarray(np.stack([row, column], axis=1)[order])


def all_pairs_neighbors(
    x: Float[Array, "n d"],
    *,
    k: int,
    config: TuningConfig = _DEFAULT,
    blocks: int = 132,
    interpret: Any = False,
) -> tuple[kernels.Neighbors, kernels.Proof]:
    """As `kernels.all_pairs_neighbors(x, k=k, include_self=True, with_proof=True)`.

    Cosine only. Every score is a float32 sum over one pair of rows.
    """
    multiple = max(config.rows, config.tile_n, config.block_m)
    size = -(-len(x) // multiple) * multiple
    knobs = {"config": config, "blocks": blocks, "interpret": interpret}
    found, unproved = _searched(x, walk(size, config), k=k, size=size, **knobs)
    rows = np.flatnonzero(unproved)
    if rows.size:
        # Of few lengths, that programs be few; a row that is there twice does no harm.
        rows = np.resize(rows, -(-rows.size // 256) * 256)
        again = kernels.nearest_neighbors(x[rows], x, k=k, implementation="traced")
        found = jax.tree.map(lambda old, new: old.at[rows].set(new), found, again)
    return found, kernels.Proof(unproved)


@functools.partial(
    jax.jit, static_argnames=("k", "size", "config", "blocks", "interpret")
)
def _searched(
    x, walk, *, k, size, config, **knobs
) -> tuple[kernels.Neighbors, Bool[Array, " n"]]:
    n, d = x.shape
    rows = pairs.at_scale(x, None, "dot")
    # Powers of two take nothing from bfloat16 rows, whose product needs no rounding:
    # the norm is divided out of the scores, and not out of the rows.
    norms, exponent = jnp.frexp(numerics.row_norms(rows.values))
    values = pairs.times_power_of_two(rows.values, -exponent[:, None])
    valid = rows.valid & (norms > 0)
    inverse = jnp.where(valid, 1 / norms, 0.0)
    rounded = values.astype(jnp.bfloat16)
    # Compilers may drop a conversion there and back; they may not drop this.
    back = lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
    residual = numerics.row_norms(values - back) * inverse
    values = rounded if x.dtype == jnp.bfloat16 else values

    def padded(part, columns=0):
        padding = [(0, size - n)] + [(0, columns)] * (part.ndim - 1)
        return jnp.pad(part, padding)

    per_key = padded(inverse), padded(jnp.where(valid, OFFSET, 0.0))
    columns = jnp.stack([part.reshape(-1, config.tile_n) for part in per_key], axis=1)
    maxima, thirds = group_maxima(
        padded(rounded, -d % config.tile_k), columns, walk, config=config, **knobs
    )
    width = k + max(16, k // 8)  # candidates
    maxima = jnp.pad(maxima, ((0, 0), (0, max(0, width + 1 - maxima.shape[1]))))

    def block(xs):
        maxima, third, mine, own = xs
        kept, at = lax.top_k(maxima, width + 1, **topk._FREE_TIES)
        members = config.tile_n // GROUPS
        member = lax.bitcast_convert_type(kept, jnp.int32) & (members - 1)
        tile, group = at // (KEPT * GROUPS), at % GROUPS
        ids = tile * config.tile_n + member * GROUPS + group
        ids = jnp.where(kept > NOBODY, ids, n)[:, :width]
        near = jnp.minimum(ids, n - 1)
        # A sum, not a product: XLA need not store the rows that it gathers.
        theirs = values[near].astype(jnp.float32)
        scores = jnp.sum(mine[:, None].astype(jnp.float32) * theirs, axis=-1)
        scores = jnp.where(ids < n, scores * own[:, None] * inverse[near], -jnp.inf)
        cost, ids = lax.sort((-scores, ids), dimension=1, num_keys=2)
        left_out = jnp.maximum(kept[:, width], third)
        everyone = left_out <= NOBODY
        last = -cost[:, k - 1] - (left_out - OFFSET) * own
        return -cost[:, :k], ids[:, :k], jnp.where(everyone, jnp.inf, last)

    parts = maxima, thirds.max(axis=0), padded(values), padded(inverse)
    blocks = [part.reshape(-1, config.rows, *part.shape[1:]) for part in parts]
    found = lax.map(block, tuple(blocks))
    scores, ids, margin = (part.reshape(size, *part.shape[2:])[:n] for part in found)
    unproved = valid & ~(margin > _bound(residual, d))
    empty = (ids == n) | ~valid[:, None]
    scores, ids = jnp.where(empty, jnp.nan, scores), jnp.where(empty, -1, ids)
    return kernels.Neighbors(scores, ids), unproved


def _bound(residual: Float[Array, " n"], d: int) -> Float[Array, " n"]:
    """How far a filtered cosine of each row may lie from the pair score, for any key.

    Rounding by Cauchy-Schwarz, as in `kernels.prefilter`. Tensor cores add at least in
    single precision but may truncate, which errs twice as far as rounding; the pair
    score is one float32 sum more. A column replaces bits of a score plus offset, below
    4 and divided by a norm of at least a half.
    """
    most = residual.max(initial=0.0)
    sums = (3 * d + 16) * pairs.UNIT_ROUNDOFF * jnp.square(1 + most)
    bits = 1.1 * 2.0**-16
    return 1.01 * (most + (1 + most) * residual + sums) + bits + d * 2.0**-125


def check_device() -> int:
    """How many multiprocessors the GPU has.

    Raises:
      ImportError: this is no GPU with `wgmma`.
    """
    device = jax.devices()[0]
    if not getattr(device, "compute_capability", "").startswith("9."):
        raise ImportError(f"`wgmma` needs a Hopper GPU; this is {device.device_kind}")
    return device.core_count
