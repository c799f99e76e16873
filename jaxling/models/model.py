"""What every model can do: run, run and keep, run and change; under one jit."""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from .cache import DEFAULT_NAMES, Cache, NamesFilter, Taps
from .layers import product, softcap


class Model(nnx.Module):
    """A model of any family; the families' classes say what `forward` takes.

    Arguments common to all calls: `tokens` are ids `[batch, position]`,
    `attention_mask` (same shape; all ones where not given) is zero at padding, which
    may stand on either side; it counts in the length that is checked. `dtype` is the
    dtype to compute in; that of the parameters where not given, so that float32
    parameters can be trained with bfloat16 products. Calls are compiled once for each
    exact shape (pad to a few lengths), and can be traced by jit, grad and vmap.

    Shapes, dtypes and lengths are checked in every call, values (ids out of range, rows
    of the mask without a token) where they are concrete: inside jit or vmap, what is
    traced cannot be looked at; such an id is clamped, and such a row means nothing.
    """

    spec: Any  # the family's; hashable
    config_json: str  # the checkpoint's config.json; a string, so that it is hashable

    embedding: nnx.Param  # [vocab, d]
    unembedding: nnx.Param | None  # of the same shape; None where tied
    bias: nnx.Param | None  # of the logits, [vocab]

    # What enters the first block, of tokens; and what the unembedding is multiplied
    # with, of the stream after the last.
    embed: Callable[..., Array]
    final_norm: Callable[[Array], Array]

    # The computation, traced: (tokens, attention_mask, *, taps, and what a family
    # adds) -> logits, with every named point passed to `taps`.
    forward: Callable[..., Array]
    # Raises ValueError for inputs that the model cannot take.
    check: Callable[..., None]
    # What `generate` needs; an encoder's `prompt` raises ValueError.
    prompt: Callable[..., Array]
    check_generation: Callable[..., None]
    prefill: Callable[..., tuple[Array, Any]]
    advance: Callable[..., tuple[Array, Any]]

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's `config.json`."""
        return json.loads(self.config_json)

    def unembed(self, x: Array) -> Array:
        """Logits of `x` (after `final_norm`), float32 `[..., vocab]`."""
        logits = product(
            "...d,vd->...v",
            x,
            self.unembed_matrix.astype(x.dtype),
            preferred_element_type=jnp.float32,
        )
        if self.bias is not None:
            logits = logits + self.bias[...].astype(jnp.float32)
        return softcap(logits, self.logit_softcap)

    @property
    def unembed_matrix(self) -> Array:
        """`[vocab, d]`."""
        own = self.unembedding
        return (self.embedding if own is None else own)[...]

    @property
    def unembed_bias(self) -> Array | None:
        """`[vocab]`, or None."""
        return None if self.bias is None else self.bias[...]

    @property
    def logit_softcap(self) -> float | None:
        """The cap of `cap * tanh(logits / cap)`, or None."""
        return getattr(self.spec, "logit_softcap", None)

    def __call__(
        self,
        tokens: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        dtype: DTypeLike | None = None,
        **inputs: Any,
    ) -> Array:
        """Logits, float32 `[batch, position, vocab]`.

        Raises:
          ValueError: inputs of a wrong shape, dtype or length; ids out of range; a mask
            with other values than 0 and 1, or with a row of zeros.
        """
        return self._run(tokens, attention_mask, (), {}, dtype, inputs)[0]

    def run_with_cache(
        self,
        tokens: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        names_filter: NamesFilter | Sequence[str] | None = None,
        hooks: Mapping[str, Callable[[Array], Array]] | None = None,
        dtype: DTypeLike | None = None,
        **inputs: Any,
    ) -> tuple[Array, Cache]:
        """Logits and the activations whose names `names_filter` chooses.

        Args:
          names_filter: names, patterns with `*`, or a predicate of a full name (the
            names are those of `jaxling.models.cache`). Only what is chosen is kept.
            None keeps the embeddings and the outputs of all blocks (`resid_post`),
            but no attention pattern: those grow with the square of the length.
          hooks: as in `run_with_hooks`.

        Raises:
          ValueError: a name or a predicate that matches nothing.
        """
        if names_filter is None:
            names_filter = DEFAULT_NAMES
        elif callable(names_filter):
            names_filter = _fresh(names_filter)
        elif not isinstance(names_filter, str):
            names_filter = tuple(names_filter)
        return self._run(
            tokens, attention_mask, names_filter, hooks or {}, dtype, inputs
        )

    def run_with_hooks(
        self,
        tokens: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *,
        hooks: Mapping[str, Callable[[Array], Array]],
        dtype: DTypeLike | None = None,
        **inputs: Any,
    ) -> Array:
        """Logits, with functions applied to activations on the way.

        `hooks` maps a name (or a stack's name, or a pattern: every layer it matches)
        to a function of the activation that returns its replacement, same shape; they
        are applied in the order given. A function that is a `jax.tree_util.Partial`
        passes its arrays as arguments: a new steering vector then compiles nothing.

        A function is traced when it is first used with a shape, and what it read from
        outside (a variable of its closure, a global, an attribute) stays as it was
        then: what changes belongs in a Partial. A method of an object is traced, and
        all is compiled, anew in every call.

        Raises:
          ValueError: a name that matches nothing, or a changed shape.
        """
        return self._run(tokens, attention_mask, (), hooks, dtype, inputs)[0]

    def _run(self, tokens, attention_mask, names, hooks, dtype, inputs):
        tokens = as_tokens(tokens, "tokens")
        mask = as_mask(attention_mask, tokens, "attention_mask")
        inputs = {k: as_array(v, k) for k, v in inputs.items() if v is not None}
        self.check(tokens, mask, **inputs)
        hooks = {
            name: hook
            if isinstance(hook, jax.tree_util.Partial)
            else jax.tree_util.Partial(_fresh(hook))
            for name, hook in hooks.items()
        }
        dtype = None if dtype is None else as_dtype(dtype)
        graph, parameters = nnx.split(self)
        return _forward(
            graph, parameters, tokens, mask, hooks, inputs, names=names, dtype=dtype
        )


def _fresh(function: Callable) -> Callable:
    """Methods of one object are equal, also after it has changed: jit would take what
    it compiled before."""
    return (lambda x: function(x)) if inspect.ismethod(function) else function


@functools.partial(jax.jit, static_argnums=0, static_argnames=("names", "dtype"))
def _forward(graph, parameters, tokens, mask, hooks, inputs, *, names, dtype):
    if dtype is not None:
        parameters = jax.tree.map(lambda a: a.astype(dtype), parameters)
    model = nnx.merge(graph, parameters)
    taps = Taps(names, hooks)
    logits = model.forward(tokens, mask, taps=taps, **inputs)
    return logits, taps.finish()


def as_dtype(dtype: DTypeLike) -> jnp.dtype:
    """A dtype of parameters; ValueError where it is not one of floats."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(
            '`dtype` must be one of floats, such as "float32" or "bfloat16"; got'
            f" {dtype!r:.80}."
        )
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise ValueError(
            f'`dtype` {found} takes jax.config.update("jax_enable_x64", True) first.'
        )
    return found


def as_tokens(tokens: ArrayLike, name: str) -> Array:
    """Ids as int32 `[batch, position]`; one sequence of ids is refused, not guessed."""
    shape = np.shape(tokens)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"`{name}` must be [batch, position], at least one of each; got shape"
            f" {shape}."
        )
    tokens = as_array(tokens, name)
    check_integers(tokens, name)
    return tokens.astype(jnp.int32)


def check_integers(values: Array, name: str) -> None:
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise ValueError(f"`{name}` must be integers; got {values.dtype}.")


def as_array(values: ArrayLike, name: str) -> Array:
    """An array of JAX's; integers that int32 would wrap are refused where concrete."""
    if not isinstance(values, jax.core.Tracer):
        values = values if isinstance(values, jax.Array) else np.asarray(values)
        if values.dtype in (np.int64, np.uint32, np.uint64) and values.size:
            with jax.ensure_compile_time_eval():
                low, high = int(values.min()), int(values.max())
            if low < -(2**31) or high >= 2**31:
                wrong = low if low < -(2**31) else high
                raise ValueError(f"`{name}` must fit int32; got {wrong}.")
    return jnp.asarray(values)


def as_mask(mask: ArrayLike | None, tokens: Array, name: str) -> Array:
    """True at real tokens, `[batch, position]`; all True where no mask is given.

    Where the mask is concrete, a row without a real token is an error, and so are other
    values than 0 and 1: a mask that is added to scores says the contrary with its 0.
    """
    if mask is None:
        return jnp.ones(tokens.shape, bool)
    check_shape(mask, tokens, name)
    if not isinstance(mask, jax.core.Tracer):
        values = np.asarray(mask)
        if (odd := values[(values != 0) & (values != 1)]).size:
            raise ValueError(
                f"`{name}` must be 1 at real positions and 0 at padding; got {odd[0]}."
            )
        seen = (values != 0).any(axis=1)
        if not seen.all():
            raise ValueError(
                f"`{name}` must have a real position in every row; row"
                f" {int(seen.argmin())} has none."
            )
    return jnp.asarray(mask) != 0


def check_shape(values: ArrayLike, tokens: Array, name: str) -> None:
    """ValueError for what says something of every token and is not of their shape."""
    if np.shape(values) != tokens.shape:
        raise ValueError(
            f"`{name}` must have the shape of the tokens, {tokens.shape}; got"
            f" {np.shape(values)}."
        )


def check_ids(tokens: Array, vocabulary: int, name: str) -> None:
    """Ids out of range would be clamped silently; checked where they are concrete."""
    if isinstance(tokens, jax.core.Tracer) or tokens.size == 0:
        return
    with jax.ensure_compile_time_eval():  # also where a jitted function holds them
        low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"`{name}` must be in [0, {vocabulary}); got {low if low < 0 else high}."
        )


def check_length(length: int, limit: int | None, name: str) -> None:
    if limit is not None and length > limit:
        raise ValueError(
            f"`{name}` has {length} positions; this model is configured for {limit}."
        )
