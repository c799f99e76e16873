"""Attention: what queries can see, grouped heads, keys and values of the past."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from . import positions
from .cache import ATTENDED, Tap
from .layers import Linear, Norm, Relative, Spec, normal, product, softcap


class Sight(NamedTuple):
    """What the queries of a run can see; made once, outside the layers.

    `mask` `[batch or 1, 1, query, key]` is True where a key may be attended to, as far
    as padding, documents and order decide; `distance` `[batch or 1, query, key]` is
    query position - key position; `bias` is `[batch or 1, head, query, key]`.
    """

    mask: Array
    distance: Array
    bias: Array | None = None


class Past(NamedTuple):
    """Keys and values of one layer, `[batch, slot, head, size]`; next slot: `start`."""

    keys: Array
    values: Array
    start: Array | int = 0


class Attention(nnx.Module):
    """Multi-head attention, grouped where there are fewer key than query heads."""

    def __init__(self, spec: Spec, rngs: nnx.Rngs):
        self.spec = spec
        stack, q = (spec.layers,), (spec.heads, spec.head_size)
        kv, width = (spec.kv_heads, spec.head_size), (spec.width,)
        linear = functools.partial(Linear, stack, std=spec.init_std, rngs=rngs)
        self.query = linear(width, q, bias=spec.qkv_bias)
        self.key = linear(width, kv, bias=spec.qkv_bias)
        self.value = linear(width, kv, bias=spec.qkv_bias)
        self.out = linear(q, width, bias=spec.out_bias)
        first = 0 if spec.qk_norm == "all" else 1
        self.query_norm = Norm(spec, stack, q[first:]) if spec.qk_norm else None
        self.key_norm = Norm(spec, stack, kv[first:]) if spec.qk_norm else None

    def keys_and_values(self, x: Array) -> tuple[Array, Array]:
        """Keys and values `[batch, position, head, size]`, not normed, not rotated."""
        return self._clip(self.key(x)), self._clip(self.value(x))

    def __call__(
        self,
        x: Array,
        keys_and_values: tuple[Array, Array],
        sight: Sight,
        tap: Tap,
        *,
        rope: tuple[Array, Array] | None = None,
        past: Past | None = None,
    ) -> tuple[Array, Past | None]:
        q, (k, v) = self._clip(self.query(x)), keys_and_values
        q, k, v = tap("hook_q", q), tap("hook_k", k), tap("hook_v", v)
        q = q if self.query_norm is None else self.query_norm(q)
        k = k if self.key_norm is None else self.key_norm(k)
        if rope is not None:
            q = tap("hook_rot_q", positions.rotate(q, *rope))
            k = tap("hook_rot_k", positions.rotate(k, *rope))
        if past is not None:
            at = (0, past.start, 0, 0)
            k = lax.dynamic_update_slice(past.keys, k.astype(past.keys.dtype), at)
            v = lax.dynamic_update_slice(past.values, v.astype(past.values.dtype), at)
            past = Past(k, v, past.start)
        z = tap("hook_z", self._attend(q, k, v, sight, tap))
        return self.out(z), past

    def _attend(self, q: Array, k: Array, v: Array, sight: Sight, tap: Tap) -> Array:
        spec, (batch, length, heads, size) = self.spec, q.shape
        kv_heads = k.shape[2]
        scale = size**-0.5 if spec.scale is None else spec.scale
        # Heads before positions, the heads of a group one after the other: products of
        # plain matrices, which XLA on a CPU runs twice as fast as strided ones.
        q = (q * scale).reshape(batch, length, kv_heads, -1, size)
        q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        scores = product("bgrd,bgkd->bgrk", q, k, preferred_element_type=jnp.float32)
        grouped, scores = scores.shape, scores.reshape(batch, heads, length, -1)
        scores = softcap(scores, spec.attention_softcap)
        if sight.bias is not None:
            scores = scores + sight.bias
        # Finite, so that a row that sees nothing (padding) stays free of NaN.
        scores = jnp.where(sight.mask, scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        pattern = weights / total
        tapped = tap("hook_pattern", pattern)
        if tapped is pattern:
            # Nobody changed it: dividing after the product touches fewer numbers, and
            # where nobody kept it either, the pattern is never computed.
            tapped = weights
        else:
            total = jnp.ones_like(total)
        z = product(
            "bgrk,bgkd->bgrd",
            tapped.astype(v.dtype).reshape(grouped),
            v,
            preferred_element_type=jnp.float32,
        )
        z = z.reshape(batch, heads, length, size) / total
        return checkpoint_name(z.astype(v.dtype), ATTENDED).transpose(0, 2, 1, 3)

    def _clip(self, x: Array) -> Array:
        limit = self.spec.clip_qkv
        return x if limit is None else jnp.clip(x, -limit, limit)


def relative_table(
    spec: Spec, kind: Relative, stack: tuple[int, ...], rngs: nnx.Rngs
) -> nnx.Param:
    """A parameter `[*stack, bucket, head]`."""
    return normal(rngs, (*stack, kind.buckets, spec.heads), spec.init_std)


def relative_bias(spec: Spec, table: Array, distance: Array) -> Array:
    """The bias `[batch or 1, head, query, key]` from `[bucket, head]`."""
    kind = spec.relative
    assert kind is not None, "there is a table only where there is a kind"
    bucket = positions.relative_buckets(
        -distance, kind.buckets, kind.max_distance, causal=spec.causal
    )
    return jnp.moveaxis(table[bucket].astype(jnp.float32), -1, 1)
