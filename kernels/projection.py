"""Every layer's prediction over the whole vocabulary, without the layers' logits.

Rows are (layer, position); keys are the unembedding. One sweep over vocabulary tiles
serves all layers of a block of positions, so the final layer's logits are in the same
tile as every other layer's and KL needs no second product. A tile is `[tile, rows]`,
rows last: every reduction over the vocabulary then runs along contiguous rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import mesh as meshes

# Stands for "not a token" in a tile. Finite, so that 0 * MASKED is 0 and not NaN.
_MASKED = -1e30
_GROUP = 32
_TILE = 1 << 20  # logits in a tile: 4 MiB


class Projection(NamedTuple):
    """What each layer says at each position; None where it was not asked for.

    Logarithms are natural. Log-probabilities are those of the softmax over the whole
    vocabulary.
    """

    log_sum_exp: Array
    """`[layer, n]`: log of the softmax's normaliser."""
    entropy: Array | None
    """`[layer, n]`, in nats."""
    kl_to_final: Array | None
    """`[layer, n]`: KL(final layer || layer), in nats."""
    top_tokens: Array | None
    """`[layer, n, k]` int32, best first; equal logits go to the lower id."""
    top_log_probs: Array | None
    """`[layer, n, k]`."""
    agrees: Array | None
    """`[layer, n]` bool: the top token is the final layer's top token."""
    target_log_probs: Array | None
    """`[layer, n, t]`; NaN where the target is negative."""
    target_ranks: Array | None
    """`[layer, n, t]` int32: tokens with a strictly larger logit; -1 for no target."""
    group_mass: Array | None
    """`[layer, n, g]`: probability that the layer gives to each group of tokens."""


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
            _Options(softcap, k, entropy, divergence, tile, block or 0),
            meshes.line(mesh),
        )
    block = _block_size(block, tile, layers, n)
    options = _Options(softcap, k, entropy, divergence, tile, block)
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


class _Options(NamedTuple):
    softcap: float | None
    k: int
    entropy: bool
    divergence: bool
    tile: int
    block: int


class _Tile(NamedTuple):
    """Some consecutive rows of the unembedding, and what belongs to them."""

    keys: Array  # [tile, d]
    bias: Array | None  # [tile]
    groups: Array | None  # [g, tile]
    ids: Array  # [tile]
    fresh: Array | None  # [tile] bool: not in the tile before; None: all of them


class _Block(NamedTuple):
    """Some positions: what is multiplied, and what is asked about them."""

    rows: Array  # [layer * block, d] in the dtype of the unembedding
    targets: Array | None  # [block, t]
    target_logits: Array | None  # [layer, block, t]


def _streamed(hidden, unembed, transform, bias, targets, groups, options):
    """A loop of the host over tiles, which serves every block of positions in turn.

    On a CPU this is faster than the same loop inside one program, and each tile of
    the unembedding is read once.
    """
    size, vocab = options.block, unembed.shape[0]
    prepare, start, advance, finish = (
        functools.partial(f, options=options)
        for f in (_prepared, _initial, _advanced, _finished)
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
        tile = _tile_of(unembed, bias, groups, i, size=options.tile, masked=masked)
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
        block = _prepared(inputs[0], unembed, transform, bias, inputs[1], options)

        # Checkpointed: the backward pass recomputes a tile instead of keeping all.
        @jax.checkpoint
        def step(carry, i):
            tile = _tile_of(
                *(unembed, bias, groups, i),
                **dict(size=options.tile, masked=vocab % options.tile > 0),
            )
            return _advanced(carry, block, tile, options), None

        carry = _initial(block, options, layers, groups)
        steps = jnp.arange(-(-vocab // options.tile))
        return _finished(lax.scan(step, carry, steps)[0], block, options)

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
    least = min(options.tile, _GROUP)
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
            return _prepared(*given)

        rows = hidden.reshape(layers, count, size, -1).swapaxes(0, 1)
        prepared = lax.map(prepare, (rows, *jax.tree.map(blocks, (targets, wanted))))

        def start(block):
            return meshes.varying(_initial(block, options, layers, groups))

        def visit(carries, keys, origin):
            def one(inputs):
                carry, block = inputs

                @jax.checkpoint
                def step(carry, i):
                    tile = _tile_of(
                        *(keys, bias, groups, i),
                        size=options.tile,
                        masked=masked,
                        first=origin * part,
                        vocab=vocab,
                    )
                    return _advanced(carry, block, tile, options), None

                tiles = jnp.arange(-(-part // options.tile))
                return _joined(carry, lax.scan(step, start(block), tiles)[0])

            return lax.map(one, (carries, prepared))

        carries = lax.map(start, prepared)
        carries = meshes.ring(visit, carries, unembed, mesh.size)
        found = lax.map(lambda x: _finished(*x, options), (carries, prepared))
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


def _joined(a: dict, b: dict) -> dict:
    """The carry of two disjoint parts of the vocabulary."""
    top = jnp.maximum(a["max"], b["max"])
    new: dict[str, Any] = {"max": top}
    shrinks = [jnp.exp(carry["max"] - top) for carry in (a, b)]
    for name in ("sum", "weighted", "mass"):
        if name in a:
            new[name] = a[name] * shrinks[0] + b[name] * shrinks[1]
    if "cross" in a:
        new["cross"] = a["cross"] * shrinks[0][-1] + b["cross"] * shrinks[1][-1]
    if "above" in a:
        new["above"] = a["above"] + b["above"]
    if "top" in a:
        k = a["top"][0].shape[-1]
        scores, ids = (jnp.concatenate(pair, -1) for pair in zip(a["top"], b["top"]))
        cost, ids, scores = lax.sort((-scores, ids, scores), num_keys=2)
        new["top"] = scores[..., :k], ids[..., :k]
    return new


@functools.partial(jax.jit, static_argnames="options")
def _prepared(
    hidden, unembed, transform, bias, targets, options, wanted=None
) -> _Block:
    """`wanted` `[block, t, d]` are the targets' rows where `unembed` lacks some."""
    rows = transform(hidden)
    rows = rows.reshape(-1, rows.shape[-1]).astype(unembed.dtype)
    if targets is None:
        return _Block(rows, None, None)
    # The targets' logits, rounded as the sweep will round them: a product of another
    # shape may sum in another order, and a token that equals the target would then
    # rank above or below it by chance. So the targets' rows are multiplied as whole
    # tiles, of which one entry per target is kept.
    block, t = targets.shape
    layers = len(hidden)
    flat = jnp.maximum(targets.reshape(-1), 0)
    place = jnp.arange(flat.size)
    padded = [
        jnp.pad(x, (0, -flat.size % options.tile)).reshape(-1, options.tile)
        for x in (flat, place)
    ]

    def one(inputs):
        ids, place = inputs
        shift = None if bias is None else jnp.take(bias, ids, mode="clip")
        if wanted is None:
            keys = jnp.take(unembed, ids, axis=0, mode="clip")
        else:
            keys = wanted.reshape(flat.size, -1)[place]
        return _logits(rows, keys, shift, options.softcap)

    logits = lax.map(one, padded).reshape(-1, layers, block)[: block * t]
    own = jnp.arange(block)
    logits = logits.reshape(block, t, layers, block)[own, :, :, own]
    return _Block(rows, targets, jnp.moveaxis(logits, 2, 0))


def _logits(rows, keys, bias, softcap) -> Float[Array, "tile rows"]:
    exact = keys.dtype not in (jnp.bfloat16, jnp.float16)
    logits = jnp.einsum(
        "vd,rd->vr",
        keys,
        rows,
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST if exact else None,
    )
    if bias is not None:
        logits = logits + bias[:, None]
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


@functools.partial(jax.jit, static_argnames=("size", "masked", "vocab"))
def _tile_of(unembed, bias, groups, i, size, masked, first=0, vocab=None) -> _Tile:
    """Tile `i` of `unembed`, whose first row is token `first` of `vocab`."""
    # The last tile is moved back to end with the vocabulary; what it repeats is not
    # fresh. Padding would copy the whole unembedding.
    start = jnp.minimum(i * size, unembed.shape[0] - size)
    ids = first + start + jnp.arange(size)
    fresh = ids >= first + i * size if masked else None
    if masked and vocab is not None:
        fresh &= ids < vocab

    def cut(x, start, axis=0):
        return None if x is None else lax.dynamic_slice_in_dim(x, start, size, axis)

    others = cut(bias, first + start), cut(groups, first + start, 1)
    return _Tile(cut(unembed, start), *others, ids, fresh)


@functools.partial(jax.jit, static_argnames=("options", "layers"))
def _initial(block: _Block, options, layers, groups) -> dict:
    zeros = jnp.zeros((layers, len(block.rows) // layers), jnp.float32)
    carry: dict[str, Any] = {"max": zeros + _MASKED, "sum": zeros}
    if options.entropy:
        carry["weighted"] = zeros
    if options.divergence:
        carry["cross"] = zeros
    if groups is not None:
        carry["mass"] = jnp.zeros((groups.shape[0], *zeros.shape), jnp.float32)
    if options.k:
        shape = (*zeros.shape, options.k)
        carry["top"] = jnp.full(shape, _MASKED), jnp.zeros(shape, jnp.int32)
    if block.targets is not None:
        shape = (*zeros.shape, block.targets.shape[1])
        carry["above"] = jnp.zeros(shape, jnp.int32)
    return carry


@functools.partial(jax.jit, static_argnames="options")
def _advanced(carry: dict, block: _Block, tile: _Tile, options) -> dict:
    """The carry after one more tile."""
    logits = _logits(block.rows, tile.keys, tile.bias, options.softcap)
    logits = logits.reshape(-1, *carry["max"].shape)
    if tile.fresh is not None:
        logits = jnp.where(tile.fresh[:, None, None], logits, _MASKED)
    new = _moments(carry, logits, tile.groups, options.entropy, options.divergence)
    if options.k:
        new["top"] = _merge_top(carry["top"], logits, tile.ids[0], options.k)
    if block.targets is not None:
        new["above"] = carry["above"] + _count_above(
            logits, block.target_logits, block.targets, tile.ids[0]
        )
    return new


def _moments(carry, logits, members, entropy, divergence):
    """The running maximum and the sums that are relative to it."""
    top = jnp.maximum(carry["max"], logits.max(0))
    shrink = jnp.exp(carry["max"] - top)
    # Each sum makes its exponentials on the fly: behind the barrier the compiler does
    # not see that they are the same, and would write them to memory otherwise.
    again, final = lax.optimization_barrier((top, top[-1:]))
    new = {"max": top}
    new["sum"] = carry["sum"] * shrink + jnp.exp(logits - top).sum(0)
    if entropy:
        weighted = jnp.sum(jnp.exp(logits - again) * logits, 0)
        new["weighted"] = carry["weighted"] * shrink + weighted
    if divergence:
        weight = lax.optimization_barrier(jnp.exp(logits[:, -1:] - final))
        cross = jnp.sum(weight * logits, 0)
        new["cross"] = carry["cross"] * shrink[-1] + cross
    if members is not None:
        weight = jnp.exp(logits - top)
        mass = jnp.tensordot(members, weight, 1, precision=lax.Precision.HIGHEST)
        new["mass"] = carry["mass"] * shrink + mass
    return new


def _merge_top(best, logits, start, k):
    """The k best of what was best so far and of this tile; ties to the lower id.

    The k best lie in the k groups of neighbouring tokens with the largest maxima: a
    group that is passed over leaves k others that each hold a token at least as good
    and, among equals, with a lower id. So only those groups' members are sorted.
    """
    tile = logits.shape[0]
    size = _GROUP if tile % _GROUP == 0 and tile // _GROUP > k else 1
    if size == 1:
        members = jnp.moveaxis(logits, 0, -1)
        ids = jnp.broadcast_to(start + jnp.arange(tile), members.shape)
    else:
        grouped = logits.reshape(tile // size, size, *logits.shape[1:])
        maxima = jnp.moveaxis(grouped.max(1), 0, -1)  # [layer, block, groups]
        chosen = jnp.sort(lax.top_k(maxima, k)[1])
        members = jnp.take_along_axis(
            grouped, jnp.moveaxis(chosen, -1, 0)[:, None], axis=0
        )
        members = jnp.moveaxis(members, (0, 1), (-2, -1)).reshape(*chosen.shape[:2], -1)
        ids = start + chosen[..., None] * size + jnp.arange(size)
        ids = ids.reshape(members.shape)
    scores = jnp.concatenate([best[0], members], -1)
    ids = jnp.concatenate([best[1], ids.astype(jnp.int32)], -1)
    scores, place = lax.top_k(scores, k)
    return scores, jnp.take_along_axis(ids, place, -1)


def _count_above(logits, target_logits, targets, start):
    """Tokens of the tile, other than the target, with a larger logit than it has."""
    place = targets - start
    inside = (place >= 0) & (place < len(logits))
    place = jnp.clip(place, 0, len(logits) - 1)
    counts = []
    for j in range(targets.shape[1]):
        level = target_logits[..., j]
        own = jnp.take_along_axis(logits, place[None, None, :, j], axis=0)[0]
        # Counted in float32, whose reduction needs no pass of its own; exact, as a
        # tile has far fewer than 2^24 tokens.
        above = jnp.sum((logits > level).astype(jnp.float32), 0)
        counts.append(above - ((own > level) & inside[:, j]))
    return jnp.stack(counts, -1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="options")
def _finished(last: dict, block: _Block, options) -> Projection:
    log_sum_exp = last["max"] + jnp.log(last["sum"])
    known = ~jnp.isnan(log_sum_exp)
    entropy = divergence = mass = None
    top_tokens = top_log_probs = agrees = log_probs = ranks = None
    if "weighted" in last:
        entropy = log_sum_exp - last["weighted"] / last["sum"]
    if "cross" in last:
        # KL = sum p_f (f - lse_f) - sum p_f (l - lse_l); the final row is exactly 0.
        expected = last["cross"] / last["sum"][-1]
        gap = log_sum_exp - expected
        divergence = jnp.maximum(gap - gap[-1], 0.0)
    if "mass" in last:
        mass = jnp.moveaxis(last["mass"] / last["sum"], 0, -1)
    if "top" in last:
        scores, top_tokens = last["top"]
        top_log_probs = scores - log_sum_exp[..., None]
        # A row that is not a number says nothing.
        top_tokens = jnp.where(known[..., None], top_tokens, -1)
        agrees = (top_tokens[..., 0] == top_tokens[-1, :, 0]) & known
    if block.targets is not None:
        wanted = (block.targets >= 0) & known[..., None]
        log_probs = block.target_logits - log_sum_exp[..., None]
        log_probs = jnp.where(wanted, log_probs, jnp.nan)
        ranks = jnp.where(wanted, last["above"], -1)
    return Projection(
        *(log_sum_exp, entropy, divergence, top_tokens, top_log_probs, agrees),
        *(log_probs, ranks, mass),
    )
