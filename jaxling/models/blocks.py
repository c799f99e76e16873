"""A block, and the stack of blocks as one scan over the layers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from . import positions
from .attention import Attention, Past, Sight, relative_bias, relative_table
from .cache import Tap, Taps
from .layers import Mlp, Norm, Spec


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
        self.attention, self.mlp = Attention(spec, rngs), Mlp(spec, rngs)
        if spec.cross:
            self.cross = Attention(spec, rngs)
        for part in ("attention", *(["cross"] if spec.cross else []), "mlp"):
            own = spec.norm_placement in ("pre", "post", "both")
            after = spec.norm_placement in ("output", "both")
            setattr(self, part + "_norm", Norm(spec, stack) if own else None)
            setattr(self, part + "_output_norm", Norm(spec, stack) if after else None)
        kind = spec.relative
        self.relative = (
            relative_table(spec, kind, stack, rngs)
            if kind is not None and kind.per_layer
            else None
        )

    def __call__(
        self,
        x: Array,
        tap: Tap,
        sight: Sight,
        across: Sight | None,
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
            assert layer.memory is not None and across is not None
            return self.cross(y, layer.memory, across, within)[0]

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


class Stack(nnx.Module):
    """The blocks, scanned, and the norm after the last."""

    def __init__(self, spec: Spec, rngs: nnx.Rngs):
        self.spec = spec
        for rope in spec.ropes:  # ValueError for heads that it cannot rotate
            positions.rope_frequencies(rope, spec.head_size)
        self.blocks = Block(spec, rngs)
        self.final_norm = Norm(spec) if spec.final_norm else None
        kind = spec.relative
        self.relative = (
            relative_table(spec, kind, (), rngs)
            if kind is not None and not kind.per_layer
            else None
        )

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
        bias: Array | None = None
        if self.spec.alibi:
            slopes = jnp.asarray(positions.alibi_slopes(self.spec.heads))
            bias = slopes[:, None, None] * -distance[:, None].astype(jnp.float32)
        if self.relative is not None:
            bias = relative_bias(self.spec, self.relative[...], distance)
        return Sight(allowed[:, None], distance, bias)

    def finish(self, x: Array) -> Array:
        """The stream after the final norm, where there is one."""
        return x if self.final_norm is None else self.final_norm(x)

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
