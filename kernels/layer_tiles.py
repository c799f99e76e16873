"""What a tile of the vocabulary tells about every layer of some positions.

The reduction behind `projection`: of one block of positions a carry goes from tile to
tile, and becomes a `Projection` when the vocabulary ends. A tile is `[tile, rows]`,
rows last, a row being a layer at a position: every reduction over the vocabulary then
runs along contiguous rows.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

GROUP = 32  # tokens that share a maximum when the best are looked for
# Stands for "not a token" in a tile. Finite, so that 0 * MASKED is 0 and not NaN.
_MASKED = -1e30


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


class Options(NamedTuple):
    softcap: float | None
    k: int
    entropy: bool
    divergence: bool
    tile: int
    block: int


class Tile(NamedTuple):
    """Some consecutive rows of the unembedding, and what belongs to them."""

    keys: Array  # [tile, d]
    bias: Array | None  # [tile]
    groups: Array | None  # [g, tile]
    ids: Array  # [tile]
    fresh: Array | None  # [tile] bool: not in the tile before; None: all of them


class Block(NamedTuple):
    """Some positions: what is multiplied, and what is asked about them."""

    rows: Array  # [layer * block, d] in the dtype of the unembedding
    targets: Array | None  # [block, t]
    target_logits: Array | None  # [layer, block, t]


@functools.partial(jax.jit, static_argnames="options")
def prepared(hidden, unembed, transform, bias, targets, options, wanted=None) -> Block:
    """`wanted` `[block, t, d]` are the targets' rows where `unembed` lacks some."""
    rows = transform(hidden)
    rows = rows.reshape(-1, rows.shape[-1]).astype(unembed.dtype)
    if targets is None:
        return Block(rows, None, None)
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
    return Block(rows, targets, jnp.moveaxis(logits, 2, 0))


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
def tile_of(unembed, bias, groups, i, size, masked, first=0, vocab=None) -> Tile:
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
    return Tile(cut(unembed, start), *others, ids, fresh)


@functools.partial(jax.jit, static_argnames=("options", "layers"))
def initial(block: Block, options, layers, groups) -> dict:
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
def advanced(carry: dict, block: Block, tile: Tile, options) -> dict:
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
    size = GROUP if tile % GROUP == 0 and tile // GROUP > k else 1
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


def joined(a: dict, b: dict) -> dict:
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
def finished(last: dict, block: Block, options) -> Projection:
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
