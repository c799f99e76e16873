"""A matrix product on a Hopper GPU whose tiles are reduced where they are made.

Two warpgroups multiply bfloat16 rows with `wgmma`, a third one fetches. What becomes of
a tile of scores is up to the kernel that asks for it: `mosaic_gpu` keeps the largest,
`mosaic_lens` sums of exponentials.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

WARPGROUPS = 2  # that multiply


class TuningConfig(NamedTuple):
    """Sizes of tiles, all of them powers of two but `steps`.

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
        return self.tile_m * WARPGROUPS


DEFAULT = TuningConfig()


class Tile(NamedTuple):
    """What one warpgroup has of a tile.

    Attributes:
      row: number of the row tile.
      column: number of the key tile.
      mine: number of the warpgroup; it has the rows of `span`.
      scores: reference to `[tile_m, tile_n]` sums in float32, once they are made.
      multiply: makes them. What is copied before arrives meanwhile.
    """

    row: Any
    column: Any
    mine: Any
    scores: Any
    multiply: Callable[[], None]

    @property
    def span(self) -> Any:
        """Which rows of all."""
        rows = self.scores.shape[0]
        return pl.ds((self.row * WARPGROUPS + self.mine) * rows, rows)


def visit_tiles(
    walk: Any,
    rows: Any,
    keys: Any,
    epilogue: Callable[..., None],
    *,
    config: TuningConfig,
    scratch: dict[str, Any],
) -> None:
    """`epilogue(tile, **scratch)` for tiles of `rows @ keys.T`, inside a kernel.

    Args:
      walk: reference to int32 `[steps, 2]`: number of the row tile, of the key tile.
      rows: reference to bfloat16 `[n, d]`.
      keys: reference to bfloat16 `[m, d]`.
      epilogue: runs in both warpgroups.
      scratch: memory that outlives a tile; both warpgroups have the same.
    """
    tile_m, tile_n, tile_k = config.tile_m, config.tile_n, config.tile_k
    itemsize = rows.dtype.itemsize
    swizzle = plgpu.find_swizzle(8 * tile_k * itemsize)
    transforms = (
        plgpu.TilingTransform((8, swizzle // itemsize)),
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
            grid=(rows.shape[1] // tile_k,),
            in_specs=operands,
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=WARPGROUPS,
            max_concurrent_steps=config.steps,
            compute_context=context,
        )

    def nothing(*_):
        return None

    # Buffers outlive a tile: the next one's operands arrive during the epilogue.
    @functools.partial(
        pl.run_scoped,
        operands=pipeline(nothing, nothing).get_allocations(rows, keys),
        scratch=scratch,
        collective_axes="warpgroup",
    )
    def _(operands, scratch):
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
                    own = row, column, mine, scores, lambda: run(scores)
                    epilogue(Tile(*own), **scratch)

            pipeline(multiply, context)(
                rows.at[pl.ds(row * config.block_m, config.block_m)],
                keys.at[pl.ds(column * tile_n, tile_n)],
                allocations=operands,
            )

        plgpu.wait_smem_to_gmem(0)


def store(ref: Any, value: Any) -> None:
    """Into device memory, also where threads do not write whole sectors of it."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:  # before jax 0.12 that is so anyway
        ref[...] = value


def call(
    kernel: Callable[..., None],
    arrays: tuple[Array, ...],
    out_type: Any,
    *,
    blocks: int,
    interpret: Any,
    approximate: bool = False,
) -> Any:
    """`kernel` on so many blocks of three warpgroups; its results.

    With `approximate` an exponential is one instruction (2 units in the last place).
    """
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=approximate,
        ),
        interpret=interpret,
    )(*arrays)


@functools.lru_cache(maxsize=8)
def walk(
    n: int, m: int, config: TuningConfig, *, symmetric: bool = False
) -> Int[Array, "steps 2"]:
    """All tiles of `n` rows and `m` keys, a band of rows after the other.

    With `symmetric` only those that reach the diagonal or lie above it.
    """
    sides = n // config.block_m, m // config.tile_n
    row, column = (side.ravel() for side in np.indices(sides, np.int32))
    order = np.lexsort((row, column, row // config.band))
    steps = np.stack([row, column], axis=1)[order]
    if symmetric:
        below = steps[:, 1] < steps[:, 0] * config.block_m // config.tile_n
        steps = steps[~below]
    return jnp.asarray(steps)


def check_device() -> int:
    """How many multiprocessors the GPU has.

    Raises:
      ImportError: this is no GPU with `wgmma`.
    """
    device = jax.devices()[0]
    if not getattr(device, "compute_capability", "").startswith("9."):
        raise ImportError(f"`wgmma` needs a Hopper GPU; this is {device.device_kind}")
    return device.core_count
