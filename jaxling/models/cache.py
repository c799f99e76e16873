"""Activations by name: which are kept, and which are changed on the way.

The names are TransformerLens's. A point inside a block is called
`blocks.{l}.hook_resid_post` at layer `l`, and `resid_post` is the stack of its values
over all layers. The stacks of an encoder-decoder put `encoder.` or `decoder.` before
both.

    hook_embed                 token embeddings, scaled, before positions are added
    hook_pos_embed             what learned or sinusoidal positions add
    hook_token_type_embed      what the first or second text adds (BERT)
    blocks.{l}.hook_resid_pre  the residual stream that enters block l
    blocks.{l}.hook_resid_mid  after attention (absent where a block is parallel)
    blocks.{l}.hook_resid_post the output of block l; the last one is before the final
                               norm. A post-norm encoder (BERT) has its norms inside the
                               stream: its resid_mid and resid_post are normalised, and
                               its last resid_post is what the head reads.
    blocks.{l}.hook_attn_out, hook_cross_attn_out, hook_mlp_out
                               what the part adds to the stream (after a norm on the
                               part's output, where the family has one)
    blocks.{l}.attn.hook_q, hook_k, hook_v, hook_z   [batch, position, head, size];
                               queries and keys as their products leave them, before
                               norms of their own (Qwen 3, OLMo 2, Gemma 3) and rotation
    blocks.{l}.attn.hook_rot_q, hook_rot_k   those that are multiplied, after both;
                               absent in families without rotation
    blocks.{l}.attn.hook_pattern, cross_attn.hook_pattern   [batch, head, query, key]
    blocks.{l}.mlp.hook_post   the input of the MLP's last product
    ln_final.hook_normalized   after the final norm; of an encoder with a head for
                               masked tokens, after that head's product, activation
                               and norm
"""

import fnmatch
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Tap = Callable[[str, Array], Array]
NamesFilter = str | tuple[str, ...] | Callable[[str], bool]

DEFAULT_NAMES = ("*hook_embed", "*resid_post")


def untapped(name: str, value: Array) -> Array:
    """The tap that neither keeps nor changes anything."""
    del name
    return value


@jax.tree_util.register_pytree_node_class
class Cache(Mapping[str, Array]):
    """What a run kept. `cache["blocks.3.hook_resid_post"]` is `[batch, position, d]`,
    `cache["resid_post"]` is `[layer, batch, position, d]`; both read the same array.

    Iterates over the full names. A tree of arrays: it can leave a jitted function.
    """

    def __init__(
        self,
        arrays: dict[str, Array],
        layers: dict[str, tuple[int, ...]],
        depths: dict[str, int],
    ):
        self._arrays = arrays  # by full name, or by stack name where layers are stacked
        self._layers = layers  # the kept layers of each stack
        self._depths = depths  # how many layers each stack's model has

    def __getitem__(self, name: str | tuple[str, int]) -> Array:
        if isinstance(name, tuple):
            stack, layer = name
            if stack in self._layers:
                layer = range(self._depths[stack])[layer]
        elif name in self._arrays and name not in self._layers:
            return self._arrays[name]
        elif name in self._layers:
            kept = self._layers[name]
            if len(kept) != self._depths[name]:
                raise KeyError(
                    f"{name} was kept at layers {kept} only, of {self._depths[name]};"
                    " ask for one of them, or keep them all."
                )
            return self._arrays[name]
        else:
            stack, layer = _stack_and_layer(name)
        if stack not in self._layers or layer not in self._layers[stack]:
            raise KeyError(f"{name} was not kept; kept: {', '.join(self) or 'nothing'}")
        return self._arrays[stack][self._layers[stack].index(layer)]

    def __contains__(self, name: object) -> bool:
        return name in set(self) or (name in self._layers and self._whole(name))

    def __iter__(self) -> Iterator[str]:
        for name in self._arrays:
            for layer in self._layers.get(name, ()):
                yield _full_name(name, layer)
            if name not in self._layers:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _whole(self, stack: Any) -> bool:
        return len(self._layers[stack]) == self._depths[stack]

    def tree_flatten(self) -> tuple[tuple[Array, ...], Hashable]:
        names = tuple(self._arrays)
        static = (names, tuple(self._layers.items()), tuple(self._depths.items()))
        return tuple(self._arrays.values()), static

    @classmethod
    def tree_unflatten(cls, static: Any, arrays: tuple[Array, ...]) -> "Cache":
        names, layers, depths = static
        return cls(dict(zip(names, arrays)), dict(layers), dict(depths))


def _stack_name(prefix: str, point: str) -> str:
    return prefix + point.replace("hook_", "")


def _full_name(stack: str, layer: int) -> str:
    prefix = ""
    for known in ("encoder.", "decoder."):
        if stack.startswith(known):
            prefix, stack = known, stack.removeprefix(known)
    part, _, last = stack.rpartition(".")
    return f"{prefix}blocks.{layer}.{part + '.' if part else ''}hook_{last}"


def _stack_and_layer(name: str) -> tuple[str, int]:
    prefix, found, rest = name.partition("blocks.")
    layer, _, point = rest.partition(".")
    if not found or not layer.isdigit():
        return name, -1
    return _stack_name(prefix, point), int(layer)


class Taps:
    """Applies the hooks and keeps the chosen values of one run, while it is traced.

    A name in `hooks` or `names` may be a full name, a stack's name (all layers), or
    a pattern with `*`; `names` may also be a predicate of full names.
    """

    def __init__(
        self, names: NamesFilter = (), hooks: Mapping[str, Callable] | None = None
    ):
        self._names = (names,) if isinstance(names, str) else names
        self._hooks = dict(hooks or {})
        self._used: set[str] = set()
        self._seen: list[str] = []
        self._arrays: dict[str, Array] = {}
        self._layers: dict[str, tuple[int, ...]] = {}
        self._depths: dict[str, int] = {}

    def __call__(self, name: str, value: Array) -> Array:
        """The tap of a point outside the blocks."""
        self._seen.append(name)
        for pattern, hook in self._hooks.items():
            if self._matches(pattern, name, name):
                value = _apply(hook, name, value)
        if self._kept(name, name):
            self._arrays[name] = value
        return value

    def scan(
        self,
        block: Callable[[Tap, Array, Any], tuple[Array, Any]],
        x: Array,
        xs: Any,
        *,
        layers: int,
        prefix: str = "",
    ) -> tuple[Array, Any]:
        """`lax.scan` of `block(tap, x, xs of a layer) -> (x, ys)` over the layers.

        A point kept at some layers only takes memory for those layers only.
        """
        if not self._names and not self._hooks:
            plain = _frugal(lambda x, xs: block(untapped, x, xs))
            return lax.scan(plain, x, xs, length=layers)
        shapes: dict[str, jax.ShapeDtypeStruct] = {}

        def measure(point: str, value: Array) -> Array:
            shapes[point] = jax.ShapeDtypeStruct(value.shape, value.dtype)
            return value

        first = jax.tree.map(lambda a: a[0], xs)
        jax.eval_shape(lambda x, xs: block(measure, x, xs), x, first)
        hooks, kept, buffers, slots, keeps = {}, {}, {}, {}, {}
        for point, shape in shapes.items():
            stack = _stack_name(prefix, point)
            names = [f"{prefix}blocks.{layer}.{point}" for layer in range(layers)]
            self._seen += names
            hooks[point] = [
                (hook, [i for i in range(layers) if self._matches(p, names[i], stack)])
                for p, hook in self._hooks.items()
            ]
            chosen = tuple(i for i in range(layers) if self._kept(names[i], stack))
            if chosen:
                kept[point] = chosen
                buffers[point] = jnp.zeros((len(chosen), *shape.shape), shape.dtype)
                keeps[point] = jnp.array([i in chosen for i in range(layers)])
                slots[point] = jnp.cumsum(keeps[point]) - 1

        def step(carry, scanned):
            x, buffers = carry
            xs, layer, slots, keeps = scanned
            buffers = dict(buffers)

            def tap(point: str, value: Array) -> Array:
                for hook, at in hooks[point]:
                    if at:
                        value = _apply_at(hook, layer, at, layers, point, value)
                if point in buffers:
                    slot = jnp.maximum(slots[point], 0)
                    old = lax.dynamic_index_in_dim(buffers[point], slot, 0, False)
                    new = jnp.where(keeps[point], value, old)
                    buffers[point] = lax.dynamic_update_index_in_dim(
                        buffers[point], new, slot, 0
                    )
                return value

            x, ys = block(tap, x, xs)
            return (x, buffers), ys

        scanned = (xs, jnp.arange(layers), slots, keeps)
        (x, buffers), ys = lax.scan(_frugal(step), (x, buffers), scanned, length=layers)
        for point, buffer in buffers.items():
            stack = _stack_name(prefix, point)
            self._arrays[stack] = buffer
            self._layers[stack] = kept[point]
            self._depths[stack] = layers
        return x, ys

    def finish(self) -> Cache:
        """What was kept.

        Raises:
          ValueError: a name, or the predicate, matched no point of the model.
        """
        asked = set(self._hooks)
        if not callable(self._names):
            asked |= set(self._names)
        elif not self._arrays:
            asked.add("what the predicate chooses")
        missed = sorted(asked - self._used)
        if missed:
            known = dict.fromkeys(
                ".".join("*" if part.isdigit() else part for part in name.split("."))
                for name in self._seen
            )
            raise ValueError(
                f"No activation of this model is called {', '.join(missed)}; it has"
                f" {', '.join(known)}."
            )
        return Cache(self._arrays, self._layers, self._depths)

    def _matches(self, pattern: str, name: str, stack: str) -> bool:
        if pattern in (name, stack) or fnmatch.fnmatchcase(name, pattern):
            self._used.add(pattern)
            return True
        return False

    def _kept(self, name: str, stack: str) -> bool:
        if callable(self._names):
            return bool(self._names(name))
        # Not `any`: every pattern that matches has to be marked as used.
        return sum(self._matches(pattern, name, stack) for pattern in self._names) > 0


ATTENDED = "attended"  # what attention gives, by this name in `_frugal`


def _frugal(step: Callable) -> Callable:
    """A step whose backward pass keeps products with parameters, and `ATTENDED`.

    The rest (norms, activations, attention's scores) is computed anew: on a CPU that
    takes less time than to write and read it, and a fraction of the memory. A forward
    pass is the same program as without.
    """
    policies = jax.checkpoint_policies
    kept = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,
        policies.save_only_these_names(ATTENDED),
    )
    return jax.checkpoint(step, policy=kept, prevent_cse=False)


def _apply(hook: Callable, name: str, value: Array) -> Array:
    changed = jnp.asarray(hook(value))
    if changed.shape != value.shape:
        raise ValueError(
            f"The hook at {name} must return the shape it was given, {value.shape};"
            f" it returned {changed.shape}."
        )
    return changed.astype(value.dtype)


def _apply_at(
    hook: Callable, layer: Array, at: list[int], layers: int, name: str, value: Array
) -> Array:
    if len(at) == layers:
        return _apply(hook, name, value)
    here = jnp.any(layer == jnp.array(at))
    return lax.cond(here, lambda v: _apply(hook, name, v), lambda v: v, value)
