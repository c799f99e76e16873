"""The parts of a transformer, and the stack of its blocks as one scan.

A family is a `Spec`: what its blocks have and where. Parameters of the blocks carry a
leading layer axis, `[layer, ...]`; a kernel is `[in, out]`, with `[head, size]` for the
side that attention splits. Products run in the dtype of the parameters; norms, softmax
and rotations' angles are computed in float32.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from . import positions
from .cache import Tap, Taps
from .positions import Rope


class Relative(NamedTuple):
    """Learned bias by distance (T5); `per_layer` where every block learns its own."""

    buckets: int
    max_distance: int
    per_layer: bool = False


class Spec(NamedTuple):
    """A stack of blocks. Sizes first; then each switch with its commonest setting."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    activation: str = "silu"
    gated: bool = True
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to the stored scale (Gemma: 1)
    norm_affine: bool = True
    # "pre": x + f(n(x)); "post": n(x + f(x)); "output": x + n(f(x)); "both" (Gemma 2).
    norm_placement: str = "pre"
    final_norm: bool = True
    parallel: bool = False  # attention and MLP read the same stream (NeoX)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None  # "head": over a head's size; "all": over all heads
    clip_qkv: float | None = None
    scale: float | None = None  # of attention scores; 1 / sqrt(head_size) where None
    attention_softcap: float | None = None
    causal: bool = True
    cross: bool = False  # attends to another stack's output too
    ropes: tuple[Rope, ...] = ()
    rope_of_layer: tuple[int, ...] = ()  # index into `ropes`; all zero where empty
    windows: tuple[int, ...] = ()  # keys a query of layer l can see; 0: all of them
    alibi: bool = False
    relative: Relative | None = None
    init_std: float = 0.02


_TANH_GELU = lambda x: jax.nn.gelu(x, approximate=True)  # noqa: E731
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def product(equation: str, x: Array, kernel: Array, **options: Any) -> Array:
    """An einsum; float32 operands are multiplied in float32, never in TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, kernel, precision=precision, **options)


def softcap(x: Array, cap: float | None) -> Array:
    """`cap * tanh(x / cap)`, or `x` where there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Norm(nnx.Module):
    """Layer norm or root-mean-square norm over the last axis, computed in float32."""

    def __init__(
        self,
        spec: Spec,
        stack: tuple[int, ...] = (),
        shape: tuple[int, ...] | None = None,
    ):
        shape = (*stack, *(shape or (spec.width,)))
        self.kind, self.eps, self.offset = spec.norm, spec.norm_eps, spec.norm_offset
        affine, centred = spec.norm_affine, spec.norm == "layer"
        self.scale = nnx.Param(jnp.full(shape, 1 - self.offset)) if affine else None
        self.bias = nnx.Param(jnp.zeros(shape)) if affine and centred else None

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        if self.scale is not None and self.scale.ndim == 2:  # heads and sizes together
            y = y.reshape(*y.shape[:-2], -1)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        y = y.reshape(x.shape)
        if self.scale is not None:
            y = y * (self.scale[...].astype(jnp.float32) + self.offset)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Linear(nnx.Module):
    """`x @ kernel + bias` over the last `inputs` axes of x."""

    def __init__(
        self,
        stack: tuple[int, ...],
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        bias: bool,
        std: float,
        rngs: nnx.Rngs,
    ):
        self.inputs = len(inputs)
        self.kernel = normal(rngs, (*stack, *inputs, *outputs), std)
        self.bias = nnx.Param(jnp.zeros((*stack, *outputs))) if bias else None

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...]
        ins, outs = "hd"[: self.inputs], "kn"[: kernel.ndim - self.inputs]
        y = product(f"...{ins},{ins}{outs}->...{outs}", x, kernel)
        return y if self.bias is None else y + self.bias[...]


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
        """Keys and values of `x`, `[batch, position, head, size]`, not yet rotated."""
        k, v = self._clip(self.key(x)), self._clip(self.value(x))
        return (k if self.key_norm is None else self.key_norm(k)), v

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
        q = self._clip(self.query(x))
        q = q if self.query_norm is None else self.query_norm(q)
        k, v = keys_and_values
        if rope is not None:
            q, k = positions.rotate(q, *rope), positions.rotate(k, *rope)
        q, k, v = tap("hook_q", q), tap("hook_k", k), tap("hook_v", v)
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
        return z.astype(v.dtype).transpose(0, 2, 1, 3)

    def _clip(self, x: Array) -> Array:
        limit = self.spec.clip_qkv
        return x if limit is None else jnp.clip(x, -limit, limit)


class Mlp(nnx.Module):
    """Two products around an activation; where gated, `act(gate(x)) * up(x)`."""

    def __init__(self, spec: Spec, rngs: nnx.Rngs):
        if spec.activation not in ACTIVATIONS:
            raise ValueError(f"activation {spec.activation!r} is not handled")
        self.activation = spec.activation
        stack, d, n = (spec.layers,), (spec.width,), (spec.mlp_width,)
        bias, std = spec.mlp_bias, spec.init_std
        linear = functools.partial(Linear, stack, bias=bias, std=std, rngs=rngs)
        self.gate = linear(d, n) if spec.gated else None
        self.up, self.down = linear(d, n), linear(n, d)

    def __call__(self, x: Array, tap: Tap) -> Array:
        activation = ACTIVATIONS[self.activation]
        if self.gate is None:
            hidden = activation(self.up(x))
        else:
            hidden = activation(self.gate(x)) * self.up(x)
        return self.down(tap("mlp.hook_post", hidden))


class LayerInputs(NamedTuple):
    """What differs from layer to layer besides parameters; scanned with them."""

    window: Array | None = None
    rope: Array | None = None
    past: tuple[Array, Array] | None = None
    memory: tuple[Array, Array] | None = None  # keys and values of the other stack


class Block(nnx.Module):
    """Attention, attention to another stack where there is one, and an MLP."""

    def __init__(self, spec: Spec, rngs: nnx.Rngs):
        self.spec = spec
        stack = (spec.layers,)
        parts = ["attention", *(["cross"] if spec.cross else []), "mlp"]
        for part in parts:
            make = Mlp if part == "mlp" else Attention
            setattr(self, part, make(spec, rngs))
            own = spec.norm_placement in ("pre", "post", "both")
            after = spec.norm_placement in ("output", "both")
            setattr(self, part + "_norm", Norm(spec, stack) if own else None)
            setattr(self, part + "_output_norm", Norm(spec, stack) if after else None)
        own = spec.relative is not None and spec.relative.per_layer
        self.relative = relative_table(spec, stack, rngs) if own else None

    def __call__(
        self,
        x: Array,
        tap: Tap,
        sight: Sight,
        memory_sight: Sight | None,
        ropes: tuple[Array, Array] | None,
        start: Array | int,
        layer: LayerInputs,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        spec = self.spec
        if layer.window is not None:
            near = (sight.distance < layer.window) | (layer.window == 0)
            sight = sight._replace(mask=sight.mask & near[:, None])
        if self.relative is not None:
            bias = relative_bias(spec, self.relative[...], sight.distance)
            sight = sight._replace(bias=bias)
        rope = None
        if ropes is not None:
            index = 0 if layer.rope is None else layer.rope
            rope = (ropes[0][index], ropes[1][index])
        past = None if layer.past is None else Past(*layer.past, start)

        def attend(y: Array) -> Array:
            nonlocal past
            kv = self.attention.keys_and_values(y)
            within = lambda name, value: tap(f"attn.{name}", value)  # noqa: E731
            y, past = self.attention(y, kv, sight, within, rope=rope, past=past)
            return y

        def attend_across(y: Array) -> Array:
            within = lambda name, value: tap(f"cross_attn.{name}", value)  # noqa: E731
            return self.cross(y, layer.memory, memory_sight, within)[0]

        x = tap("hook_resid_pre", x)
        stream = x
        if spec.parallel:
            attended = tap("hook_attn_out", self._branch("attention", attend, x))
            x = stream + attended
        else:
            x = self._add("attention", attend, x, tap, "hook_attn_out")
            if spec.cross:
                x = self._add("cross", attend_across, x, tap, "hook_cross_attn_out")
            x = stream = tap("hook_resid_mid", x)
        mlp = lambda y: self.mlp(y, tap)  # noqa: E731
        if spec.parallel:
            x = x + tap("hook_mlp_out", self._branch("mlp", mlp, stream))
        else:
            x = self._add("mlp", mlp, x, tap, "hook_mlp_out")
        return tap("hook_resid_post", x), None if past is None else past[:2]

    def _branch(self, part: str, f: Callable[[Array], Array], x: Array) -> Array:
        own, after = getattr(self, f"{part}_norm"), getattr(self, f"{part}_output_norm")
        y = f(x if own is None or self.spec.norm_placement == "post" else own(x))
        return y if after is None else after(y)

    def _add(
        self, part: str, f: Callable[[Array], Array], x: Array, tap: Tap, name: str
    ) -> Array:
        x = x + tap(name, self._branch(part, f, x))
        post = self.spec.norm_placement == "post"
        return getattr(self, f"{part}_norm")(x) if post else x


def relative_table(spec: Spec, stack: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
    return normal(rngs, (*stack, spec.relative.buckets, spec.heads), spec.init_std)


def relative_bias(spec: Spec, table: Array, distance: Array) -> Array:
    """The bias `[batch or 1, head, query, key]` from `[bucket, head]`."""
    bucket = positions.relative_buckets(
        -distance,
        spec.relative.buckets,
        spec.relative.max_distance,
        causal=spec.causal,
    )
    return jnp.moveaxis(table[bucket].astype(jnp.float32), -1, 1)


class Stack(nnx.Module):
    """The blocks, scanned, and the norm after the last."""

    def __init__(self, spec: Spec, rngs: nnx.Rngs):
        self.spec = spec
        self.blocks = Block(spec, rngs)
        self.final_norm = Norm(spec) if spec.final_norm else None
        shared = spec.relative is not None and not spec.relative.per_layer
        self.relative = relative_table(spec, (), rngs) if shared else None

    def sight(
        self,
        mask: Array,
        query_positions: Array,
        key_positions: Array,
        *,
        segments: Array | None = None,
        start: Array | int = 0,
    ) -> Sight:
        """What queries in slots `start`... can see of the keys in slots 0...

        Args:
          mask: True at keys that are no padding, `[batch, key]`.
          query_positions, key_positions: `[batch, query]`, `[batch, key]`.
          segments: document of each token, `[batch, key]`; queries are the keys then.
        """
        queries, keys = query_positions.shape[1], key_positions.shape[1]
        allowed = mask[:, None, :]
        if self.spec.causal:
            slot = start + jnp.arange(queries)
            allowed = allowed & (slot[:, None] >= jnp.arange(keys))[None]
        if segments is not None:
            allowed = allowed & (segments[:, :, None] == segments[:, None, :])
        distance = query_positions[:, :, None] - key_positions[:, None, :]
        bias = None
        if self.spec.alibi:
            slopes = positions.alibi_slopes(self.spec.heads)[:, None, None]
            bias = slopes * -distance[:, None].astype(jnp.float32)
        if self.relative is not None:
            bias = relative_bias(self.spec, self.relative[...], distance)
        return Sight(allowed[:, None], distance, bias)

    def memory(self, encoded: Array) -> tuple[Array, Array]:
        """Keys and values `[layer, batch, position, head, size]` of another stack."""
        graph, parameters = nnx.split(self.blocks.cross)

        def one(_: None, layer: Any) -> tuple[None, tuple[Array, Array]]:
            return None, nnx.merge(graph, layer).keys_and_values(encoded)

        return lax.scan(one, None, parameters)[1]

    def __call__(
        self,
        x: Array,
        sight: Sight,
        query_positions: Array,
        taps: Taps,
        *,
        prefix: str = "",
        past: tuple[Array, Array] | None = None,
        start: Array | int = 0,
        memory: tuple[Array, Array] | None = None,
        memory_sight: Sight | None = None,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """The stream after the last block, before the final norm; and the new `past`.

        `past` and `memory` are keys and values `[layer, batch, slot, head, size]`.
        """
        spec = self.spec
        ropes = None
        if spec.ropes:
            ropes = positions.rope_tables(spec.ropes, spec.head_size, query_positions)
        inputs = LayerInputs(
            window=jnp.array(spec.windows) if any(spec.windows) else None,
            rope=jnp.array(spec.rope_of_layer) if any(spec.rope_of_layer) else None,
            past=past,
            memory=memory,
        )
        graph, parameters = nnx.split(self.blocks)

        def block(tap: Tap, x: Array, layer: Any) -> tuple[Array, Any]:
            own, inputs = layer
            module = nnx.merge(graph, own)
            return module(x, tap, sight, memory_sight, ropes, start, inputs)

        return taps.scan(
            block, x, (parameters, inputs), layers=spec.layers, prefix=prefix
        )


def positions_of(mask: Array, segments: Array | None = None) -> Array:
    """Place of each real token among the real ones (of its document), int32."""
    mask = mask.astype(jnp.int32)
    count = jnp.cumsum(mask, axis=1) - 1
    if segments is not None:
        new = jnp.pad(segments[:, 1:] != segments[:, :-1], [(0, 0), (1, 0)])
        begin = jnp.where(new, count, 0)
        count = count - lax.cummax(begin, axis=1)
    return jnp.maximum(count, 0)
