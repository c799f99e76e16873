"""Every layer's prediction over the whole vocabulary, without the layers' logits.

Rows are (layer, position); keys are the unembedding. One sweep over vocabulary tiles
serves all layers of a block of positions, so the final layer's logits are in the same
tile as every other layer's and KL needs no second product. Here are the walks over the
vocabulary; what is made of a tile is in `layer_tiles`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array

from . import layer_tiles
from . import mesh as meshes
from .layer_tiles import Projection

_TILE = 1 << 20  # logits in a tile: 4 MiB


def project_layers(
    hidden: ArrayLike,
    unembed: ArrayLike,
    *,
    transform: Callable[[Array], Array] | None = None,
    bias: ArrayLike | None = None,
    softcap: float | None = None,
    k: int = 0,
    entropy: bool = False,
    divergence: bool = False,
    targets: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    tile: int = 2048,
    block: int | None = None,
    mesh: Mesh | None = None,
) -> Projection:
    """Reads every layer through the unembedding (the logit lens and its kin).

        logits[l, i] = softcap(transform(hidden)[l, i] @ unembed.T + bias)

    followed by the reductions asked for. Nothing of size layers x positions x
    vocabulary exists: memory is a few tiles of `[tile, layer * block]` float32.
    Products take inputs in the dtype of `unembed` and accumulate in float32; float32
    inputs are multiplied in float32. nostalgebraist, "interpreting GPT: the logit
    lens", 2020; Belrose et al., 2023, https://arxiv.org/abs/2303.08112.

    Differentiable in `hidden`, in what `transform` holds and in `bias`: log-sum-exp,
    entropy, KL, target and top log-probabilities, group mass. The backward pass makes
    each tile anew instead of keeping it.

    Concrete arrays are walked through by a loop of the host, traced ones by one
    program; they agree to float32 rounding. A row of logits that is not a number has
    token -1, rank -1 and NaN everywhere else.

    Args:
      hidden: `[layer, n, d]`; the last layer is the final one.
      unembed: `[vocab, d]`.
      transform: applied to `[layer, block, d]` before the product: final norm, head,
        translators. `jax.tree_util.Partial(function, parameters)` keeps one compiled
        program while the parameters change.
      bias: `[vocab]`.
      softcap: logits become `softcap * tanh(logits / softcap)`.
      k: how many top tokens; 0 for none.
      entropy: the entropy of each layer's prediction.
      divergence: KL of the final layer's prediction from each layer's.
      targets: `[n]` or `[n, t]` token ids whose rank and log-probability are wanted; a
        negative id is no target, nor is a traced one beyond the vocabulary.
      groups: `[g, vocab]` weights, 0 or 1 for sets of tokens.
      tile: tokens per step.
      block: positions per step; by default as many as keep a tile of logits at 4 MiB.
      mesh: shares positions and unembedding out over these devices, whatever their
        number; blocks of the vocabulary go round them, and every device ends with the
        whole result. With several processes each passes the same arrays.

    Returns:
      A `Projection`. Shapes have `t` also where `targets` has one axis (`t = 1`).

    Raises:
      ValueError: shapes that do not fit, an unembedding of integers, `k` beyond the
        vocabulary or a tile, a target beyond the vocabulary, a non-positive `tile` or
        `block`.
    """
    if mesh is None:
        hidden, unembed = jnp.asarray(hidden), jnp.asarray(unembed)
    else:
        hidden, unembed = meshes.array(hidden), meshes.array(unembed)
    if hidden.ndim != 3 or unembed.ndim != 2 or 0 in unembed.shape:
        raise ValueError(
            "`hidden` must be [layer, n, d] and `unembed` [vocab, d];"
            f" got {hidden.shape} and {unembed.shape}."
        )
    if not jnp.issubdtype(unembed.dtype, jnp.floating):
        raise ValueError(
            f"`unembed` must be floating, as products take its dtype; got"
            f" {unembed.dtype}."
        )
    layers, n, width = hidden.shape
    vocab = unembed.shape[0]
    if transform is None and unembed.shape[1] != width:
        raise ValueError(
            f"`unembed` must have {width} columns, as `hidden` has; got"
            f" {unembed.shape[1]}."
        )
    if tile < 1 or (block is not None and block < 1):
        raise ValueError(f"`tile` and `block` must be positive; got {tile}, {block}.")
    tile = min(tile, vocab)
    if not 0 <= k <= tile:
        raise ValueError(f"`k` must be in [0, {tile}], the tokens of a tile; got {k}.")
    if bias is not None:
        bias = jnp.asarray(bias, jnp.float32)
        if bias.shape != (vocab,):
            raise ValueError(f"`bias` must be [{vocab}]; got {bias.shape}.")
    if targets is not None:
        given, targets = targets, jnp.asarray(targets)
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(f"`targets` must be token ids; got {targets.dtype}.")
        targets = targets[:, None] if targets.ndim == 1 else targets
        if targets.ndim != 2 or targets.shape[0] != n:
            raise ValueError(
                f"`targets` must be [{n}] or [{n}, t]; got {np.shape(given)}."
            )
        if isinstance(targets, jax.core.Tracer):
            targets = jnp.where(targets < vocab, targets, -1)
        elif np.any(targets >= vocab):
            raise ValueError(
                f"`targets` must be below {vocab}, the vocabulary; got {targets.max()}."
            )
    if groups is not None:
        groups = jnp.asarray(groups, jnp.float32)
        if groups.ndim != 2 or groups.shape[1] != vocab:
            raise ValueError(f"`groups` must be [g, {vocab}]; got {groups.shape}.")
    if not isinstance(transform, Partial):
        transform = Partial(transform or _same)
    arrays = hidden, unembed, transform, bias, targets, groups
    if mesh is not None and n:
        return _over_mesh(
            *arrays,
            layer_tiles.Options(softcap, k, entropy, divergence, tile, block or 0),
            meshes.line(mesh),
        )
    block = _block_size(block, tile, layers, n)
    options = layer_tiles.Options(softcap, k, entropy, divergence, tile, block)
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arrays))
    project = _traced if traced or n == 0 else _streamed
    return project(*arrays, options)


def _block_size(given: int | None, tile: int, layers: int, n: int) -> int:
    """Positions per step: as many blocks as needed, of one size, to multiply little
    padding."""
    most = min(given or max(1, _TILE // (tile * max(layers, 1))), max(n, 1))
    return -(-n // max(1, -(-n // most))) or 1


def _same(hidden: Array) -> Array:
    return hidden


def _streamed(hidden, unembed, transform, bias, targets, groups, options):
    """A loop of the host over tiles, which serves every block of positions in turn.

    On a CPU this is faster than the same loop inside one program, and each tile of
    the unembedding is read once.
    """
    size, vocab = options.block, unembed.shape[0]
    prepare, start, advance, finish = (
        functools.partial(f, options=options)
        for f in (
            layer_tiles.prepared,
            layer_tiles.initial,
            layer_tiles.advanced,
            layer_tiles.finished,
        )
    )
    blocks = [
        prepare(_cut(hidden, i, size, 1, 0), unembed, transform, bias, asked)
        for i in range(0, hidden.shape[1], size)
        for asked in [None if targets is None else _cut(targets, i, size, 0, -1)]
    ]
    carries = [start(block, layers=len(hidden), groups=groups) for block in blocks]
    count = -(-vocab // options.tile)
    for i in range(count):
        # A masked tile is written to memory once more, so only one that must be.
        masked = i == count - 1 and vocab % options.tile > 0
        tile = layer_tiles.tile_of(
            unembed, bias, groups, i, size=options.tile, masked=masked
        )
        carries = [advance(*pair, tile) for pair in zip(carries, blocks)]
        # Without waiting, tiles would queue up in memory.
        jax.block_until_ready(carries[-1])
    parts = [finish(*pair) for pair in zip(carries, blocks)]
    return jax.tree.map(
        lambda *x: jnp.concatenate(x, axis=1)[:, : hidden.shape[1]], *parts
    )


def _cut(x: Array, start: int, size: int, axis: int, filler: int) -> Array:
    """`size` entries from `start` on, `filler` where there are no more."""
    part = lax.slice_in_dim(x, start, min(start + size, x.shape[axis]), axis=axis)
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - part.shape[axis])
    return jnp.pad(part, widths, constant_values=filler) if widths[axis][1] else part


@functools.partial(jax.jit, static_argnames="options")
def _traced(hidden, unembed, transform, bias, targets, groups, options):
    """The same as one program: differentiable, and for use inside other programs."""
    layers, n, d = hidden.shape
    size, vocab = options.block, unembed.shape[0]
    count = -(-n // size)
    rows = jnp.pad(hidden, ((0, 0), (0, count * size - n), (0, 0)))
    rows = rows.reshape(layers, count, size, d).swapaxes(0, 1)
    if targets is not None:
        width = ((0, count * size - n), (0, 0))
        targets = jnp.pad(targets, width, constant_values=-1)
        targets = targets.reshape(count, size, -1)

    def one(inputs):
        block = layer_tiles.prepared(
            inputs[0], unembed, transform, bias, inputs[1], options
        )

        # Checkpointed: the backward pass recomputes a tile instead of keeping all.
        @jax.checkpoint
        def step(carry, i):
            tile = layer_tiles.tile_of(
                *(unembed, bias, groups, i),
                **dict(size=options.tile, masked=vocab % options.tile > 0),
            )
            return layer_tiles.advanced(carry, block, tile, options), None

        carry = layer_tiles.initial(block, options, layers, groups)
        steps = jnp.arange(-(-vocab // options.tile))
        return layer_tiles.finished(lax.scan(step, carry, steps)[0], block, options)

    def gather(x):  # [blocks, layer, block, ...] -> [layer, n, ...]
        x = x.swapaxes(0, 1)
        return x.reshape(layers, count * size, *x.shape[3:])[:, :n]

    return jax.tree.map(gather, lax.map(one, (rows, targets)))


def _over_mesh(hidden, unembed, transform, bias, targets, groups, options, mesh):
    """Positions and unembedding shared out; see `_ringed`."""
    (layers, n, _), vocab = hidden.shape, unembed.shape[0]
    part = -(-n // mesh.size)
    # A product of few rows may be compiled as something else wherever it stands, and
    # ranks need the targets' logits rounded as the others.
    least = min(options.tile, layer_tiles.GROUP)
    tile = min(options.tile, -(-vocab // (mesh.size * least)) * least)
    block = _block_size(options.block or None, tile, layers, part)
    with meshes.entered(mesh, hidden, unembed, transform, bias, targets, groups):
        if targets is not None:
            targets = meshes.share(targets, mesh, fill=-1, multiple=block)
        return _ringed(
            meshes.share(hidden, mesh, axis=1, multiple=block),
            meshes.share(unembed, mesh, multiple=least),
            *meshes.copy((transform, bias), mesh),
            targets,
            meshes.copy(groups, mesh),
            options=options._replace(tile=tile, block=block),
            mesh=mesh,
            n=n,
            vocab=vocab,
        )


@functools.partial(jax.jit, static_argnames=("options", "mesh", "n", "vocab"))
def _ringed(
    hidden, unembed, transform, bias, targets, groups, *, options, mesh, n, vocab
):
    """As `_traced` on each device's positions, while the unembedding goes round.

    The logits of each visiting block are reduced by themselves and then joined to
    what is known, as blocks come in another order on every device.
    """
    layers, size = hidden.shape[0], options.block
    positions = meshes.PartitionSpec(None, meshes.AXIS)
    wanted = None
    if targets is not None:
        wanted = unembed[jnp.clip(targets, 0, vocab - 1)]
        sharding = NamedSharding(mesh, meshes.ROWS)
        wanted = lax.with_sharding_constraint(wanted, sharding)
    if bias is not None:
        bias = jnp.pad(bias, (0, unembed.shape[0] - vocab))
    if groups is not None:
        groups = jnp.pad(groups, ((0, 0), (0, unembed.shape[0] - vocab)))

    def share(hidden, unembed, transform, bias, groups, targets, wanted):
        count, part = hidden.shape[1] // size, unembed.shape[0]
        masked = part % options.tile > 0 or part * mesh.size > vocab

        def blocks(x):  # [positions, ...] -> [block, position, ...]
            return x.reshape(count, size, *x.shape[1:])

        def prepare(inputs):
            hidden, targets, wanted = inputs
            given = hidden, unembed, transform, bias, targets, options, wanted
            return layer_tiles.prepared(*given)

        rows = hidden.reshape(layers, count, size, -1).swapaxes(0, 1)
        prepared = lax.map(prepare, (rows, *jax.tree.map(blocks, (targets, wanted))))

        def start(block):
            return meshes.varying(layer_tiles.initial(block, options, layers, groups))

        def visit(carries, keys, origin):
            def one(inputs):
                carry, block = inputs

                @jax.checkpoint
                def step(carry, i):
                    tile = layer_tiles.tile_of(
                        *(keys, bias, groups, i),
                        size=options.tile,
                        masked=masked,
                        first=origin * part,
                        vocab=vocab,
                    )
                    return layer_tiles.advanced(carry, block, tile, options), None

                tiles = jnp.arange(-(-part // options.tile))
                return layer_tiles.joined(carry, lax.scan(step, start(block), tiles)[0])

            return lax.map(one, (carries, prepared))

        carries = lax.map(start, prepared)
        carries = meshes.ring(visit, carries, unembed, mesh.size)
        found = lax.map(
            lambda x: layer_tiles.finished(*x, options), (carries, prepared)
        )
        # [block, layer, position, ...] -> [layer, positions, ...]
        return jax.tree.map(
            lambda x: x.swapaxes(0, 1).reshape(layers, count * size, *x.shape[3:]),
            found,
        )

    everywhere, rows = meshes.EVERYWHERE, meshes.ROWS
    inputs = (positions, rows, everywhere, everywhere, everywhere, rows, rows)
    found = meshes.on_each(share, mesh, inputs, positions)(
        *(hidden, unembed, transform, bias, groups, targets, wanted)
    )
    return meshes.everywhere(jax.tree.map(lambda x: x[:, :n], found), mesh)
