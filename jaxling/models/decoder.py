"""A causal language model: embeddings, one stack, unembedding."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike

from . import blocks, layers, model, positions
from .cache import Tap, Taps, untapped


class Language(NamedTuple):
    """A stack with its vocabulary at both ends."""

    stack: layers.Spec
    vocabulary: int
    length: int | None  # positions the model is configured for; None: no limit
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    positions: str | None = None  # "learned" or "sinusoidal"; None: in the attention
    position_offset: int = 0  # rows of the position table before position 0
    tied: bool = False  # the unembedding is the embedding
    head: bool = True  # there is an unembedding; where not, `tied` is True
    unembed_bias: bool = False
    logit_softcap: float | None = None


class Decoder(model.Model):
    """A decoder-only language model. Where the checkpoint has no unembedding, and its
    config says so (an embedder, a classifier), calls return the last hidden state after
    the final norm instead of logits, float32.

    `embed`, `final_norm` and `unembed` are its ends as separate functions;
    `unembed_matrix` is `[vocab, d]`. `model(tokens, attention_mask, segment_ids=...)`
    keeps packed documents apart: a token sees its own segment only, and positions
    start anew in each.
    """

    def __init__(self, spec: Language, config_json: str, *, rngs: nnx.Rngs):
        self.spec, self.config_json = spec, config_json
        stack, rows = spec.stack, spec.vocabulary
        shape, std = (rows, stack.width), stack.init_std
        self.embedding = layers.normal(rngs, shape, std)
        self.entrance = layers.Entrance(
            stack,
            spec.positions,
            rows=(spec.length or 0) + spec.position_offset,
            offset=spec.position_offset,
            norm=spec.embedding_norm,
            rngs=rngs,
        )
        self.decoder = blocks.Stack(stack, rngs)
        self.unembedding = None if spec.tied else layers.normal(rngs, shape, std)
        self.bias = nnx.Param(jnp.zeros(rows)) if spec.unembed_bias else None

    def embed(
        self,
        tokens: Array,
        positions_of_tokens: Array | None = None,
        tap: Tap = untapped,
    ) -> Array:
        """What enters the first block, `[batch, position, d]`."""
        where = positions_of_tokens
        where = jnp.arange(tokens.shape[1])[None] if where is None else where
        x = self.embedding[...][tokens]
        # The scale in the dtype of the table: transformers rounds it the same way.
        x = tap("hook_embed", x * jnp.asarray(self.spec.embedding_scale, x.dtype))
        return self.entrance(x, where, tap)

    def final_norm(self, hidden: Array) -> Array:
        """From the residual stream to what the unembedding is multiplied with."""
        return self.decoder.finish(hidden)

    @property
    def unembed_matrix(self) -> Array:
        """`[vocab, d]`.

        Raises:
          ValueError: the checkpoint has no unembedding.
        """
        if not self.spec.head:
            raise ValueError("This decoder was saved without a head: it has no logits.")
        return super().unembed_matrix

    def check(
        self, tokens: Array, attention_mask: Array, segment_ids: Array | None = None
    ) -> None:
        model.check_length(tokens.shape[1], self.spec.length, "tokens")
        model.check_ids(tokens, self.spec.vocabulary, "tokens")
        if segment_ids is not None:
            model.check_shape(segment_ids, tokens, "segment_ids")
            model.check_integers(segment_ids, "segment_ids")

    def forward(
        self,
        tokens: Array,
        attention_mask: Array,
        *,
        taps: Taps,
        segment_ids: Array | None = None,
    ) -> Array:
        where = positions.positions_of(attention_mask, segment_ids)
        x = self.embed(tokens, where, taps)
        sight = self.decoder.sight(attention_mask, where, where, segments=segment_ids)
        x, _ = self.decoder(x, sight, where, taps)
        x = taps("ln_final.hook_normalized", self.final_norm(x))
        return self.unembed(x) if self.spec.head else x.astype(jnp.float32)

    def prompt(self, tokens: Array, decoder_tokens: ArrayLike | None) -> Array:
        """What `generate` continues."""
        if decoder_tokens is not None:
            raise ValueError("`decoder_tokens` are for encoder-decoders only.")
        return tokens

    def check_generation(
        self, tokens: Array, attention_mask: Array, prompt: Array, new: int
    ) -> None:
        """Raises ValueError where `generate` would leave the configured positions, or
        has no logits."""
        if not self.spec.head:
            raise ValueError("A decoder without a head does not generate text.")
        self.check(tokens, attention_mask)
        model.check_length(prompt.shape[1] + new, self.spec.length, "prompt and output")

    def prefill(
        self, tokens: Array, attention_mask: Array, prompt: Array, new: int
    ) -> tuple[Array, "Progress"]:
        """Logits `[batch, vocab]` after the prompt, with room for `new` more tokens."""
        spec, (batch, length) = self.spec.stack, tokens.shape
        mask = jnp.pad(attention_mask, [(0, 0), (0, new)], constant_values=True)
        shape = (spec.layers, batch, length + new, spec.kv_heads, spec.head_size)
        empty = jnp.zeros(shape, self.embedding[...].dtype)
        state = Progress(
            (empty, empty), mask, positions.positions_of(mask), jnp.int32(0)
        )
        last = jnp.max(jnp.arange(length) * attention_mask, axis=1)
        return self._continue(tokens, state, last)

    def advance(self, tokens: Array, state: "Progress") -> tuple[Array, "Progress"]:
        """Logits after one more token of each sequence, `[batch, 1]`."""
        return self._continue(tokens, state, jnp.zeros(len(tokens), jnp.int32))

    def extend(self, tokens: Array, state: "Progress") -> tuple[Array, "Progress"]:
        """What `unembed` takes at each of some more tokens, `[batch, position, d]`."""
        past, mask, where, start = state
        mine = lax.dynamic_slice_in_dim(where, start, tokens.shape[1], axis=1)
        x = self.embed(tokens, mine)
        sight = self.decoder.sight(mask, mine, where, start=start)
        x, grown = self.decoder(x, sight, mine, Taps(), past=past, start=start)
        assert grown is not None, "a stack that is given a past returns one"
        start = start + tokens.shape[1]
        return self.final_norm(x), Progress(grown, mask, where, start)

    def _continue(
        self, tokens: Array, state: "Progress", last: Array
    ) -> tuple[Array, "Progress"]:
        x, state = self.extend(tokens, state)
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return self.unembed(x), state


class Progress(NamedTuple):
    """A generation under way: slots `0...start` of the keys and values are filled."""

    past: tuple[Array, Array]  # [layer, batch, slot, head, size]
    mask: Array  # slots that are no padding, [batch, slot]
    where: Array  # their positions
    start: Array
