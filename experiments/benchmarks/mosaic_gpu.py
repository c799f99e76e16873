"""All pairs on a Hopper GPU: group maxima taken where the product's tiles are made.

A contestant of `experiments.benchmarks.gpu`, and no more than that yet: it moves to
`kernels/mosaic_gpu.py` behind `implementation="mosaic_gpu"` when the record shows that
it wins, else it is deleted.

Of each row of a tile of scores, 256 columns wide, the kernel leaves three numbers per
group of 32 columns: the two largest scores, with their columns in the lowest bits, and
the third. The k best of a row are among the largest two of all groups, unless a third
is as good: so the top few of those numbers are the candidates, and the rest is bounded.
XLA selects, scores the candidates pair by pair in float32, and proves each row; the few
rows without a proof go to `kernels.nearest_neighbors`.

The symmetric walk visits no tile below the diagonal: a tile above it is read by rows
and, once it went through shared memory, by columns, whose groups are 32 rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from jaxling import kernels
from jaxling.kernels import numerics, pairs, topk

from . import mosaic_product
from .mosaic_product import DEFAULT, TuningConfig

GROUPS = 8  # of a tile: as many columns as one block of the accumulator's layout
KEPT = 2  # scores of a group whose columns are known
# Added to every score, so that none is near zero: the bits of a number that is not
# normal may be flushed, and with them the column. What is left below `NOBODY` is
# padding or an invalid key.
OFFSET, NOBODY = 1.25, 0.125

# The tile that is turned round takes the room of one fetch.
DEFAULT_SYMMETRIC = TuningConfig(steps=3)
# Of the symmetric walk, which exists for these sizes alone: groups of a warpgroup's
# rows, warpgroups' rows in a tile of keys, and the columns that are turned at a time.
_BY_COLUMNS, _PARTS, _TURNED = 2, 4, 128
_TRANSFORMS = plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)
_THREAD_PER_COLUMN = plgpu.Layout.TILED(
    Tiling(((1, 128), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)


def group_maxima(
    x: Float[Array, "n d"],
    columns: Float[Array, "tiles 2 tile_n"],
    walk: Int[Array, "steps 2"],
    *,
    config: TuningConfig,
    symmetric: bool = False,
    blocks: int = 132,
    interpret: Any = False,
) -> tuple[Float[Array, "n maxima"], Float[Array, "thirds n"]]:
    """The largest scores of each row's groups, without the scores ever being held.

    The score of row i and key j is `x_i . x_j * columns[0, j] + columns[1, j]`, summed
    in float32, for all tiles that the `walk` names.

    Args:
      x: bfloat16; n a multiple of the tiles' sides, d of `tile_k`.
      columns: float32, scale and offset of the keys, tile by tile.
      walk: int32, tiles in order: number of the row tile, number of the key tile.
      symmetric: tiles above the diagonal serve their columns as well, whose part of
        the results is laid out as `members` and `thirds_of` say.
      blocks: of the grid; the GPU's multiprocessors.
      interpret: `plgpu.InterpretGPUParams`, to run it without such a GPU.

    Returns:
      Float32. For each row and tile of keys `KEPT * GROUPS` scores: the largest of each
      group, then the second of each, whose lowest bits say which member it is; and the
      largest third score of all groups of the tile.
    """
    n = x.shape[0]
    tiles = n // config.tile_n
    if symmetric and (config.tile_m, config.tile_n) != (64, 256):
        raise ValueError(f"The symmetric walk has tiles of 64 x 256; got {config}.")
    return mosaic_product.call(
        functools.partial(_kernel, config=config, symmetric=symmetric),
        (walk, x, columns),
        (
            jax.ShapeDtypeStruct((n, tiles * KEPT * GROUPS), jnp.float32),
            jax.ShapeDtypeStruct((tiles * (_PARTS if symmetric else 1), n), "float32"),
        ),
        blocks=blocks,
        interpret=interpret,
    )


def _kernel(walk, x, columns, maxima, thirds, *, config: TuningConfig, symmetric):
    tile_m, tile_n = config.tile_m, config.tile_n
    sides = mosaic_product.WARPGROUPS
    scratch = {
        "keys": plgpu.SMEM((sides, 2, tile_n), jnp.float32),
        "kept": plgpu.SMEM((sides, tile_m, KEPT * GROUPS), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=1 + symmetric, num_barriers=sides),
    }
    if symmetric:
        shape = sides, tile_m, _TURNED
        scratch["turned"] = plgpu.SMEM(shape, jnp.float32, transforms=_TRANSFORMS)
        scratch["own"] = plgpu.SMEM((sides, 2, tile_m), jnp.float32)

    def epilogue(tile, *, keys, kept, arrived, turned=None, own=None):
        column, mine = tile.column, tile.mine
        arrival, part = arrived.at[mine], tile.row * sides + mine
        plgpu.copy_gmem_to_smem(columns.at[column], keys.at[mine], arrival)
        if symmetric:
            rows = columns.at[part // _PARTS, :, pl.ds(part % _PARTS * tile_m, tile_m)]
            plgpu.copy_gmem_to_smem(rows, own.at[mine], arrival)
        tile.multiply()
        plgpu.barrier_wait(arrival)
        scores = tile.scores[...]
        # All bits but a member's, as the compiler cannot know: where it can, it takes
        # two instructions for what one does with a register.
        others = (tile.row >> 31) | -(tile_n // GROUPS)
        first, second, third = _by_rows(scores, keys.at[mine], others)
        # The previous tile's results must have left before these come.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        kept[mine, :, :GROUPS] = first
        kept[mine, :, GROUPS:] = second
        per_row = [own[mine, i] for i in range(2)] if symmetric else []
        plgpu.commit_smem()  # after which what arrived may be replaced, too
        at = pl.ds(column * KEPT * GROUPS, KEPT * GROUPS)
        plgpu.copy_smem_to_gmem(kept.at[mine], maxima.at[tile.span, at])
        line = column * _PARTS if symmetric else column
        mosaic_product.store(thirds.at[line, tile.span], jnp.max(third, axis=1))
        if symmetric:

            @pl.when(column > part // _PARTS)
            def _():
                best = _by_columns(scores, per_row, turned.at[mine], others)
                for i, (first, second, third) in enumerate(best):
                    span = pl.ds(column * tile_n + i * _TURNED, _TURNED)
                    for j, largest in enumerate((first, second)):
                        at = pl.ds((part * KEPT + j) * _BY_COLUMNS, _BY_COLUMNS)
                        mosaic_product.store(
                            maxima.at[span, at].transpose((1, 0)), largest
                        )
                    mosaic_product.store(thirds.at[part, span], jnp.max(third, axis=0))

    mosaic_product.visit_tiles(walk, x, x, epilogue, config=config, scratch=scratch)


def _by_rows(scores, keys, others):
    """The three largest of each row's groups, `[tile_m, GROUPS]`; columns in the bits.

    Member j of group g is column `j * GROUPS + g`: taken so, a thread holds all members
    and nothing travels between threads.
    """
    best = (jnp.zeros((scores.shape[0], GROUPS), jnp.float32),) * 3
    for j in range(scores.shape[1] // GROUPS):
        at = slice(j * GROUPS, (j + 1) * GROUPS)
        scale, offset = (
            lax.broadcast_in_dim(keys[i, at], best[0].shape, (1,)) for i in range(2)
        )
        best = _inserted(best, scores[:, at] * scale + offset, j, others)
    return best


def _inserted(best, scores, member, others):
    """The three largest of `best` and of `scores`, which are those of a `member`.

    Its number takes the place of those bits that are not of the `others`.
    """
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    score = lax.bitcast_convert_type((bits & others) | member, jnp.float32)
    first, second, third = best
    first, below = jnp.maximum(first, score), jnp.minimum(first, score)
    second, below = jnp.maximum(second, below), jnp.minimum(second, below)
    return first, second, jnp.maximum(third, below)


def _by_columns(scores, per_row, turned, others):
    """The same of each column, whose groups are the even and the odd rows.

    A warpgroup's scores are spread over its threads by rows, so they go through shared
    memory, some columns at a time; after which a thread has a column.
    """
    rows, width = scores.shape
    scale, offset = (
        lax.broadcast_in_dim(part, (rows, _TURNED), (0,)) for part in per_row
    )
    for start in range(0, width, _TURNED):
        turned[...] = scores[:, start : start + _TURNED] * scale + offset
        best = (jnp.zeros((_BY_COLUMNS, _TURNED), jnp.float32),) * 3
        for i in range(0, rows, 8):
            lines = plgpu.layout_cast(turned[i : i + 8], _THREAD_PER_COLUMN)
            for j in range(0, 8, _BY_COLUMNS):
                line = lines[j : j + _BY_COLUMNS]
                best = _inserted(best, line, (i + j) // _BY_COLUMNS, others)
        yield best


def members(
    kept: Float[Array, "r c"],
    at: Int[Array, "r c"],
    rows: Int[Array, " r"],
    *,
    config: TuningConfig,
    symmetric: bool,
) -> Int[Array, "r c"]:
    """Which keys the numbers are that `rows` have `at` those places of their maxima."""
    count = config.tile_n // GROUPS
    member = lax.bitcast_convert_type(kept, jnp.int32) & (count - 1)
    tile, place = jnp.divmod(at, KEPT * GROUPS)
    key = member * GROUPS + place % GROUPS
    if symmetric:
        part, group = place // (KEPT * _BY_COLUMNS), place % _BY_COLUMNS
        turned = part * config.tile_m + member * _BY_COLUMNS + group
        below = tile < (rows // config.tile_n)[:, None]
        key = jnp.where(below, turned, key)
    return tile * config.tile_n + key


def thirds_of(
    thirds: Float[Array, "thirds n"], *, config: TuningConfig, symmetric: bool
) -> Float[Array, " n"]:
    """The largest of each row; of a tile that was read by rows the first is alone."""
    if symmetric:
        line = jnp.arange(len(thirds))[:, None]
        below = line // _PARTS < jnp.arange(thirds.shape[1]) // config.tile_n
        thirds = jnp.where(below | (line % _PARTS == 0), thirds, 0.0)
    return thirds.max(axis=0)


def all_pairs_neighbors(
    x: Float[Array, "n d"],
    *,
    k: int,
    symmetric: bool = False,
    config: TuningConfig | None = None,
    blocks: int = 132,
    interpret: Any = False,
) -> tuple[kernels.Neighbors, kernels.Proof]:
    """As `kernels.all_pairs_neighbors(x, k=k, include_self=True, with_proof=True)`.

    Cosine only. Every score is a float32 sum over one pair of rows.
    """
    config = config or (DEFAULT_SYMMETRIC if symmetric else DEFAULT)
    multiple = max(config.rows, config.tile_n, config.block_m)
    size = -(-len(x) // multiple) * multiple
    steps = mosaic_product.walk(size, size, config, symmetric=symmetric)
    knobs = {"config": config, "blocks": blocks, "interpret": interpret}
    found, unproved = _searched(x, steps, k=k, size=size, symmetric=symmetric, **knobs)
    rows = np.flatnonzero(unproved)
    if rows.size:
        # Of few lengths, that programs be few; a row that is there twice does no harm.
        rows = np.resize(rows, -(-rows.size // 256) * 256)
        again = kernels.nearest_neighbors(x[rows], x, k=k, implementation="traced")
        found = jax.tree.map(lambda old, new: old.at[rows].set(new), found, again)
    return found, kernels.Proof(unproved)


@functools.partial(
    jax.jit, static_argnames=("k", "size", "symmetric", "config", "blocks", "interpret")
)
def _searched(
    x, walk, *, k, size, symmetric, config, **knobs
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

    def spread(part):
        # Neighbouring ids are near-duplicates, three of which prove nothing where they
        # share a group: here each goes to another tile.
        part = jnp.pad(part, [(0, size - n)] + [(0, 0)] * (part.ndim - 1))
        return _turned_round(part, config.tile_n)

    per_key = spread(inverse), spread(jnp.where(valid, OFFSET, 0.0))
    columns = jnp.stack([part.reshape(-1, config.tile_n) for part in per_key], axis=1)
    maxima, thirds = group_maxima(
        *(jnp.pad(spread(rounded), ((0, 0), (0, -d % config.tile_k))), columns, walk),
        **dict(config=config, symmetric=symmetric, **knobs),
    )
    width = k + max(16, k // 8)  # candidates
    maxima = jnp.pad(maxima, ((0, 0), (0, max(0, width + 1 - maxima.shape[1]))))

    def block(xs):
        maxima, third, mine, own, place = xs
        kept, at = lax.top_k(maxima, width + 1, **topk._FREE_TIES)
        tile, of_tile = jnp.divmod(
            members(kept, at, place, config=config, symmetric=symmetric), config.tile_n
        )
        ids = of_tile * (size // config.tile_n) + tile
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

    third = thirds_of(thirds, config=config, symmetric=symmetric)
    parts = maxima, third, spread(values), spread(inverse), jnp.arange(size)
    blocks = [part.reshape(-1, config.rows, *part.shape[1:]) for part in parts]
    found = lax.map(block, tuple(blocks))
    scores, ids, margin = (
        _turned_round(part.reshape(size, *part.shape[2:]), size // config.tile_n)[:n]
        for part in found
    )
    unproved = valid & ~(margin > _bound(residual, d))
    empty = (ids == n) | ~valid[:, None]
    scores, ids = jnp.where(empty, jnp.nan, scores), jnp.where(empty, -1, ids)
    return kernels.Neighbors(scores, ids), unproved


def _turned_round(rows: Array, parts: int) -> Array:
    """The first row of each of so many parts, then the second of each, and so on."""
    turned = rows.reshape(parts, -1, *rows.shape[1:]).swapaxes(0, 1)
    return turned.reshape(rows.shape)


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
