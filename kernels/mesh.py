"""Rows shared out over the devices of a mesh, and blocks that go round them in a ring.

The devices stand in the order of the mesh, whatever its axes. Each holds an equal part
of the rows; the last parts are filled up. Several processes (`jax.distributed`) call
the same function with the same arguments: arrays of the host, of which each reads its
devices' parts alone, or arrays that are on the mesh already.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Int

AXIS = "rows"
EVERYWHERE = PartitionSpec()
ROWS = PartitionSpec(AXIS)


def line(mesh: Mesh) -> Mesh:
    """The devices of `mesh` along one axis, `AXIS`.

    Raises:
      ValueError: `mesh` is not a mesh of devices.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"`mesh` must be a jax.sharding.Mesh; got {type(mesh)}.")
    return Mesh(mesh.devices.reshape(-1), (AXIS,))


def entered(mesh: Mesh, *arrays: Any) -> contextlib.AbstractContextManager:
    """A context in which `mesh` is the current one, as `shard_map` demands."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays)):
        return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    return jax.set_mesh(mesh)


def share(
    x: Any, mesh: Mesh, *, axis: int = 0, multiple: int = 1, fill: int | float = 0
) -> Array:
    """`x` in equal parts along `axis`, the last ones filled up with `fill`.

    The length of a part is a multiple of `multiple`. Of a memory map only the parts of
    this process's devices are read.
    """
    part = -(-x.shape[axis] // (mesh.size * multiple)) * multiple
    length = part * mesh.size
    lacking = length - x.shape[axis]
    spec: list[str | None] = [None] * x.ndim
    spec[axis] = AXIS
    sharding = NamedSharding(mesh, PartitionSpec(*spec))

    def filled(x: Any) -> Array:
        width = [(0, lacking if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, width, constant_values=fill)

    if isinstance(x, jax.core.Tracer) or _is_on(x, mesh):
        return jax.jit(filled, out_shardings=sharding)(x)
    if isinstance(x, jax.Array) and jax.process_count() == 1:
        return jax.device_put(filled(x), sharding)
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "every device has a part"
        found = np.asarray(x[index], dtype)
        size = [len(range(*one.indices(n))) for one, n in zip(index, shape)]
        whole = np.full(size, fill, dtype)
        whole[tuple(map(slice, found.shape))] = found
        return whole

    shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, sharding, read)


def deal(parts: Sequence[Any], mesh: Mesh) -> Array:
    """`[device, ...]`: one of `parts`, all of one shape and dtype, for each device.

    Only those for this process's devices are made arrays.
    """
    process = jax.process_index()
    mine = {
        i: np.asarray(part)
        for i, (part, device) in enumerate(zip(parts, mesh.devices))
        if device.process_index == process
    }

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "every device has a part"
        return mine[index[0].start or 0][None]

    shape = next(iter(mine.values())).shape
    return jax.make_array_from_callback(
        (mesh.size, *shape), NamedSharding(mesh, ROWS), read
    )


def array(x: ArrayLike) -> Array | np.ndarray:
    """`x` as it is where it is an array: a memory map stays one."""
    return x if isinstance(x, jax.Array | np.ndarray) else jnp.asarray(x)


def on_host(x: Any) -> Any:
    """`x` on this host; what is no jax array (a memory map, say) stays as it is."""
    if not isinstance(x, jax.Array):
        return x if hasattr(x, "dtype") else np.asarray(x)
    if not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


def copy(tree: Any, mesh: Mesh) -> Any:
    """The arrays of `tree`, whole on every device."""
    sharding = NamedSharding(mesh, EVERYWHERE)

    def one(x: Any) -> Array:
        if isinstance(x, jax.core.Tracer) or _is_on(x, mesh):
            return jax.jit(lambda x: x, out_shardings=sharding)(x)
        x = np.asarray(x)
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        return jax.make_array_from_callback(
            x.shape, sharding, lambda index: np.asarray(x[index], dtype)
        )

    return jax.tree.map(one, tree)


def _is_on(x: Any, mesh: Mesh) -> bool:
    return isinstance(x, jax.Array) and x.sharding.device_set == set(mesh.devices.flat)


def on_each(
    function: Callable,
    mesh: Mesh,
    inputs: Any,
    outputs: Any = ROWS,
    check_vma: bool = True,
) -> Callable:
    """`function` of every device's parts; `inputs` and `outputs` say how they lie.

    `check_vma` may be False where devices have nothing to say to each other.
    """
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=inputs,
        out_specs=outputs,
        check_vma=check_vma,
    )


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Inside a program: results whole on every device, so that all processes have them.

    jax refuses uneven parts, and results are small beside what they were made from.
    """
    whole = NamedSharding(mesh, EVERYWHERE)
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, whole), tree)


def here() -> Int[Array, ""]:
    """The number of this device, inside `on_each`."""
    return lax.axis_index(AXIS)


def passed(tree: Any, size: int, steps: int = 1) -> Any:
    """What the device `steps` further has: everything goes round towards device 0."""
    to = [(device, (device - steps) % size) for device in range(size)]
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, to), tree)


def varying(tree: Any) -> Any:
    """`tree` as something that may differ between devices, which loops insist on."""
    me = here()
    return jax.tree.map(lambda x: jnp.where(me < 0, x, x), tree)


def ring(
    visit: Callable[[Any, Any, Int[Array, ""]], Any],
    carry: Any,
    block: Any,
    size: int,
    passed: Callable[[Any, int], Any] = passed,
) -> Any:
    """`carry` after every device's block has been here: `visit(carry, block, origin)`.

    The next block is on its way while the present one is visited, as neither needs
    the other: compilers with asynchronous collectives run both at once.
    """

    def step(s, state):
        carry, block = state
        coming = passed(block, size)
        return visit(carry, block, (here() + s) % size), coming

    carry, block = lax.fori_loop(0, size - 1, step, (varying(carry), block))
    return visit(carry, block, (here() + size - 1) % size)
