"""Text from a model: greedy, or sampled, with the keys and values of the past kept."""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike

from . import model as models


def generate(
    model: models.Model,
    tokens: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: Array | None = None,
    eos_token: int | Sequence[int] | None = None,
    decoder_tokens: ArrayLike | None = None,
) -> Array:
    """Continues every sequence of a batch by up to `max_new_tokens` tokens.

    Args:
      tokens: ids `[batch, position]`, padded on either side where `attention_mask` is
        zero. An encoder-decoder encodes them.
      temperature: 0 takes the likeliest token (ties: the lowest id); above, tokens are
        drawn from softmax(logits / temperature), which needs `key`.
      top_p: draws from the fewest likeliest tokens whose probability reaches it.
      eos_token: one id or several. A sequence that has produced one is filled up with
        it, of several with the first; when all have, the run ends.
      decoder_tokens: what an encoder-decoder continues, `[batch, position]` without
        padding; its config's decoder_start_token_id where not given.

    Returns:
      The ids given (`decoder_tokens` of an encoder-decoder) followed by
      `max_new_tokens` new ones, int32. Behind a prompt that is padded on the right, the
      new ones follow the padding.

    Raises:
      ValueError: more positions than the model is configured for, a prompt or a row of
        the mask without a token, a knob or an end token out of range.
    """
    new = operator.index(max_new_tokens)
    if new < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1; got {new}.")
    if not temperature >= 0:
        raise ValueError(f"`temperature` must not be negative; got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be in (0, 1]; got {top_p}.")
    if temperature > 0 and key is None:
        raise ValueError("`temperature` above 0 draws tokens and needs a `key`.")
    tokens = models.as_tokens(tokens, "tokens")
    mask = models.as_mask(attention_mask, tokens, "attention_mask")
    prompt = model.prompt(tokens, decoder_tokens)
    model.check_generation(tokens, mask, prompt, new)
    graph, parameters = nnx.split(model)
    produced = _generate(
        graph,
        parameters,
        tokens,
        mask,
        prompt,
        jax.random.key(0) if key is None else key,
        jnp.float32(temperature),
        jnp.float32(top_p),
        _ends(eos_token, model.spec.vocabulary),
        new=new,
        drawn=temperature > 0,
    )
    return jnp.concatenate([prompt, produced], axis=1)


def _ends(eos_token: int | Sequence[int] | None, vocabulary: int) -> Array:
    """The end tokens, int32 `[n]`; -1, which no token is, where there is none."""
    if eos_token is None:
        return jnp.full(1, -1, jnp.int32)
    ends = models.as_array(np.atleast_1d(eos_token), "eos_token")
    if ends.ndim != 1 or not ends.size or not jnp.issubdtype(ends.dtype, jnp.integer):
        raise ValueError(f"`eos_token` must be ids; got {eos_token!r:.80}.")
    models.check_ids(ends, vocabulary, "eos_token")
    return ends.astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("new", "drawn"))
def _generate(
    graph,
    parameters,
    tokens,
    mask,
    prompt,
    key,
    temperature,
    top_p,
    ends,
    *,
    new,
    drawn,
):
    model = nnx.merge(graph, parameters)

    def choose(logits: Array, step: Array | int) -> Array:
        if not drawn:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = nucleus(logits / temperature, top_p)
        drawn_from = jax.random.fold_in(key, step)
        return jax.random.categorical(drawn_from, logits).astype(jnp.int32)

    def put(produced, done, step, logits):
        token = jnp.where(done, ends[0], choose(logits, step))
        produced = lax.dynamic_update_slice(produced, token[:, None], (0, step))
        return produced, done | jnp.isin(token, ends)

    logits, state = model.prefill(tokens, mask, prompt, new)
    produced = jnp.full((len(prompt), new), ends[0])
    produced, done = put(produced, jnp.zeros(len(prompt), bool), 0, logits)

    def going(carry):
        step, _, done, _ = carry
        return (step < new) & ~done.all()

    def advance(carry):
        step, produced, done, state = carry
        last = lax.dynamic_slice_in_dim(produced, step - 1, 1, axis=1)
        logits, state = model.advance(last, state)
        produced, done = put(produced, done, step, logits)
        return step + 1, produced, done, state

    carry = (jnp.int32(1), produced, done, state)
    return lax.while_loop(going, advance, carry)[1]


def nucleus(logits: Array, top_p: Array | float) -> Array:
    """Logits with -inf outside the fewest likeliest tokens that reach `top_p`.

    Holtzman et al., 2020, https://arxiv.org/abs/1904.09751. The likeliest always stays.
    """
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    share = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    stays = jnp.take_along_axis(before < top_p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(stays, logits, -jnp.inf)
