"""The largest scores of each row's groups, taken where the product's tiles are made.

Of each row of a tile of scores, 256 columns wide, the kernel leaves three numbers per
group of 32 columns: the two largest scores, with their columns in the lowest bits, and
the third. `mosaic_gpu` searches with them.

The symmetric walk visits no tile below the diagonal: a tile above it is read by rows
and, once it went through shared memory, by columns, whose groups are 32 rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from . import mosaic_product
from .mosaic_product import TuningConfig

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
    """The largest scores of each row's groups; the scores are not held.

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
                for i, (four, third) in enumerate(best):
                    span = pl.ds(column * tile_n + i * _TURNED, _TURNED)
                    at = pl.ds(part * KEPT * _BY_COLUMNS, KEPT * _BY_COLUMNS)
                    mosaic_product.store(maxima.at[span, at], four)
                    mosaic_product.store(thirds.at[part, span], third)

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
        # A column's numbers side by side, so that its thread writes them at once.
        shape = _TURNED, KEPT * _BY_COLUMNS
        place = lax.broadcasted_iota(jnp.int32, shape, 1)
        group = lax.broadcasted_iota(jnp.int32, best[0].shape, 0)
        four = jnp.zeros(shape, jnp.float32)
        for at in range(shape[1]):
            kept, own = divmod(at, _BY_COLUMNS)
            number = jnp.max(jnp.where(group == own, best[kept], 0.0), axis=0)
            number = lax.broadcast_in_dim(number, shape, (0,))
            four = jnp.where(place == at, number, four)
        four = plgpu.layout_cast(four, plgpu.Layout.TCGEN05_TMEM_NATIVE(shape[1]))
        yield four, jnp.max(best[2], axis=0)


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
