"""Keys that stay on the host, in memory or in a mapped file, and visit the device.

Two blocks are there at a time: while one is searched, the next one is on its way.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from . import mesh as meshes


def visit(
    keys: Any,
    block: int,
    step: Callable[[Any, jax.Array, int], Any],
    state: Any,
    put: Callable[[np.ndarray], jax.Array] = jax.device_put,
) -> Any:
    """The state after `step(state, keys[first : first + block], first)` for all blocks.

    `put` brings a block to the device, or to several. Waits for each step: a queue of
    steps would be a queue of blocks on the device.
    """
    for first, present in _blocks(meshes.on_host(keys), block, put):
        state = jax.block_until_ready(step(state, present, first))
        del present
    return state


def _blocks(
    keys: Any, block: int, put: Callable[[np.ndarray], jax.Array]
) -> Iterator[tuple[int, jax.Array]]:
    starts = range(0, len(keys), block)
    coming = (put(np.asarray(keys[a : a + block])) for a in starts)
    ahead = next(coming, None)
    for first in starts:
        # The one before is dropped here, before another one is put.
        present, ahead = ahead, None
        ahead = next(coming, None)
        assert present is not None, "one for each start"
        yield first, present
        del present


def check_block(block: int, *sides: Any) -> None:
    """Raises ValueError where blocks cannot be: inside a trace, or of no rows."""
    if not isinstance(block, int | np.integer) or block < 1:
        raise ValueError(f"`block` must be a number of rows, at least 1; got {block}.")
    if any(isinstance(side, jax.core.Tracer) for side in sides):
        raise ValueError("`block` is for arrays of the host, not for traced ones.")
