"""The parts of a transformer: what a family may have, norms, products, MLPs.

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
from .cache import Tap
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


def plain(
    *, layers: int, width: int, heads: int, mlp_width: int, activation: str, eps: float
) -> Spec:
    """The commonest stack before Llama: layer norms, biases everywhere, no gate.

    Raises:
      ValueError: the width is not a multiple of the heads.
    """
    return Spec(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=head_size(width, heads),
        mlp_width=mlp_width,
        activation=activation,
        gated=False,
        norm="layer",
        norm_eps=eps,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def head_size(width: int, heads: int) -> int:
    """The width divided by the heads; ValueError where that leaves a rest."""
    if width % heads:
        raise ValueError(f"a width of {width} is not a multiple of {heads} heads")
    return width // heads


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


class Entrance(nnx.Module):
    """What a stack adds to the embeddings of its tokens: positions, then a norm.

    `kind` is "learned" or "sinusoidal", or None where positions are in the attention;
    `rows` is the size of a learned table, whose position 0 is row `offset`.
    """

    def __init__(
        self,
        spec: Spec,
        kind: str | None,
        *,
        rows: int,
        offset: int,
        norm: bool,
        rngs: nnx.Rngs,
    ):
        self.kind, self.offset = kind, offset
        shape = (rows, spec.width)
        self.position_embedding = (
            normal(rngs, shape, spec.init_std) if kind == "learned" else None
        )
        self.norm = Norm(spec) if norm else None

    def __call__(self, x: Array, where: Array, tap: Tap) -> Array:
        """`where` `[batch or 1, position]` are the positions of `x`."""
        if self.kind is not None:
            where = where + self.offset
            if self.position_embedding is not None:
                added = self.position_embedding[...][where]
            else:
                added = positions.sinusoids(where, x.shape[-1]).astype(x.dtype)
            x = x + tap("hook_pos_embed", jnp.broadcast_to(added, x.shape))
        return x if self.norm is None else self.norm(x)
