"""Every layer's prediction over the whole vocabulary, without the layers' logits.

Rows are (layer, position); keys are the unembedding. One sweep over vocabulary tiles
serves all layers of a block of positions, so the final layer's logits are in the same
tile as every other layer's and KL needs no second product. A tile is `[tile, rows]`,
rows last: every reduction over the vocabulary then runs along contiguous rows.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float

# Stands for "not a token" in a tile. Finite, so that 0 * MASKED is 0 and not NaN.
_MASKED = -1e30
_GROUP = 32


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
    tile: int = 4096,
    block: int | None = None,
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
        negative id is no target.
      groups: `[g, vocab]` weights, 0 or 1 for sets of tokens.
      tile: tokens per step.
      block: positions per step; by default as many as keep a tile of logits at 8 MiB.

    Returns:
      A `Projection`. Shapes have `t` also where `targets` has one axis (`t = 1`).

    Raises:
      ValueError: shapes that do not fit, `k` beyond the vocabulary or a tile, a
        non-positive `tile` or `block`.
    """
    hidden, unembed = jnp.asarray(hidden), jnp.asarray(unembed)
    if hidden.ndim != 3 or unembed.ndim != 2 or 0 in unembed.shape:
        raise ValueError(
            "`hidden` must be [layer, n, d] and `unembed` [vocab, d];"
            f" got {hidden.shape} and {unembed.shape}."
        )
    layers, n, _ = hidden.shape
    vocab = unembed.shape[0]
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
        targets = jnp.asarray(targets)
        if not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(f"`targets` must be token ids; got {targets.dtype}.")
        targets = targets[:, None] if targets.ndim == 1 else targets
        if targets.ndim != 2 or targets.shape[0] != n:
            raise ValueError(f"`targets` must be [{n}] or [{n}, t]; got another shape.")
    if groups is not None:
        groups = jnp.asarray(groups, jnp.float32)
        if groups.ndim != 2 or groups.shape[1] != vocab:
            raise ValueError(f"`groups` must be [g, {vocab}]; got {groups.shape}.")
    block = block or max(1, 2**21 // (tile * max(layers, 1)))
    if not isinstance(transform, Partial):
        transform = Partial(transform or _same)
    return _project(
        *(hidden, unembed, transform, bias, targets, groups),
        softcap=softcap,
        k=k,
        entropy=entropy,
        divergence=divergence,
        tile=tile,
        block=min(block, max(n, 1)),
    )


def _same(hidden: Array) -> Array:
    return hidden


@functools.partial(
    jax.jit,
    static_argnames=("softcap", "k", "entropy", "divergence", "tile", "block"),
)
def _project(
    hidden, unembed, transform, bias, targets, groups, *, block, **options
) -> Projection:
    """Pads the positions to whole blocks and projects block after block."""
    layers, n, d = hidden.shape
    padding = -n % block
    blocks = (n + padding) // block
    rows = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    rows = rows.reshape(layers, blocks, block, d).swapaxes(0, 1)
    if targets is not None:
        targets = jnp.pad(targets, ((0, padding), (0, 0)), constant_values=-1)
        targets = targets.reshape(blocks, block, -1)

    def one(inputs):
        rows, targets = inputs
        return _project_block(
            transform(rows), unembed, bias, targets, groups, **options
        )

    found = lax.map(one, (rows, targets))

    def gather(x):  # [blocks, layer, block, ...] -> [layer, n, ...]
        x = x.swapaxes(0, 1)
        return x.reshape(layers, blocks * block, *x.shape[3:])[:, :n]

    return jax.tree.map(gather, found)


def _project_block(
    hidden, unembed, bias, targets, groups, *, softcap, k, entropy, divergence, tile
) -> Projection:
    layers, block, d = hidden.shape
    vocab = unembed.shape[0]
    rows = hidden.reshape(layers * block, d).astype(unembed.dtype)

    def logits_of(keys, bias) -> Float[Array, "tile layer block"]:
        logits = jnp.einsum(
            "vd,rd->vr",
            keys,
            rows,
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST,
        )
        if bias is not None:
            logits = logits + bias[:, None]
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        return logits.reshape(-1, layers, block)

    target_logits = None
    if targets is not None:
        target_logits = _target_logits(logits_of, unembed, bias, targets, tile)

    def step(carry, i):
        # The last tile is moved back to end with the vocabulary; what it repeats is
        # masked. Padding would copy the whole unembedding.
        start = jnp.minimum(i * tile, vocab - tile)
        ids = start + jnp.arange(tile)
        keys = lax.dynamic_slice_in_dim(unembed, start, tile)
        shift = None if bias is None else lax.dynamic_slice_in_dim(bias, start, tile)
        logits = logits_of(keys, shift)
        logits = jnp.where((ids >= i * tile)[:, None, None], logits, _MASKED)
        members = None
        if groups is not None:
            members = lax.dynamic_slice_in_dim(groups, start, tile, axis=1)
        new = _moments(carry, logits, members, entropy, divergence)
        if k:
            new["top"] = _merge_top(carry["top"], logits, start, k)
        if targets is not None:
            new["above"] = carry["above"] + _count_above(
                logits, target_logits, targets, ids
            )
        return new, None

    zeros = jnp.zeros((layers, block), jnp.float32)
    carry = {"max": zeros + _MASKED, "sum": zeros}
    if entropy:
        carry["weighted"] = zeros
    if divergence:
        carry["cross"] = zeros
    if groups is not None:
        carry["mass"] = jnp.zeros((groups.shape[0], layers, block), jnp.float32)
    if k:
        empty = jnp.full((layers, block, k), _MASKED, jnp.float32)
        carry["top"] = empty, jnp.zeros((layers, block, k), jnp.int32)
    if targets is not None:
        carry["above"] = jnp.zeros((layers, block, targets.shape[1]), jnp.int32)
    steps = -(-vocab // tile)
    # Checkpointed: the backward pass recomputes a tile instead of keeping all.
    last, _ = lax.scan(jax.checkpoint(step), carry, jnp.arange(steps))
    return _finish(last, target_logits, targets)


def _moments(carry, logits, members, entropy, divergence):
    """The running maximum and the sums that are relative to it."""
    top = jnp.maximum(carry["max"], logits.max(0))
    shrink = jnp.exp(carry["max"] - top)
    weight = lax.optimization_barrier(jnp.exp(logits - top))  # read thrice, made once
    new = {"max": top, "sum": carry["sum"] * shrink + weight.sum(0)}
    if entropy:
        weighted = jnp.sum(weight * logits, 0)
        new["weighted"] = carry["weighted"] * shrink + weighted
    if divergence:
        cross = jnp.sum(weight[:, -1:] * logits, 0)
        new["cross"] = carry["cross"] * shrink[-1] + cross
    if members is not None:
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


def _target_logits(logits_of, unembed, bias, targets, tile):
    """The targets' logits `[layer, block, t]`, rounded as the sweep will round them.

    A product of another shape may sum in another order, and a token that equals the
    target would then rank above or below it by chance. So the targets' rows are
    multiplied as whole tiles, of which one entry per target is kept.
    """
    block, t = targets.shape
    flat = jnp.maximum(targets.reshape(-1), 0)
    padding = -flat.size % tile
    padded = jnp.pad(flat, (0, padding)).reshape(-1, tile)

    def one(ids):
        shift = None if bias is None else bias[ids]
        return logits_of(unembed[ids], shift)

    logits = lax.map(one, padded)  # [tiles, tile, layer, block]
    logits = logits.reshape(-1, *logits.shape[2:])[: block * t]
    logits = logits.reshape(block, t, -1, block)
    own = jnp.arange(block)
    return jnp.moveaxis(logits[own, :, :, own], 2, 0)  # [layer, block, t]


def _count_above(logits, target_logits, targets, ids):
    counts = []
    for j in range(targets.shape[1]):
        others = ids[:, None, None] != targets[:, j]
        above = (logits > target_logits[..., j]) & others
        counts.append(jnp.sum(above, 0, dtype=jnp.int32))
    return jnp.stack(counts, -1)


def _finish(last, target_logits, targets) -> Projection:
    log_sum_exp = last["max"] + jnp.log(last["sum"])
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
        agrees = top_tokens[..., 0] == top_tokens[-1, :, 0]
    if targets is not None:
        wanted = targets >= 0
        log_probs = target_logits - log_sum_exp[..., None]
        log_probs = jnp.where(wanted, log_probs, jnp.nan)
        ranks = jnp.where(wanted, last["above"], -1)
    return Projection(
        *(log_sum_exp, entropy, divergence, top_tokens, top_log_probs, agrees),
        *(log_probs, ranks, mass),
    )
