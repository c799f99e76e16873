"""An encoder and a decoder that attends to it: translation, and T5's text to text."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.typing import ArrayLike

from . import attention, blocks, layers, model, positions
from .cache import Tap, Taps, untapped
from .decoder import Progress


class Pair(NamedTuple):
    """Two stacks over one vocabulary."""

    encoder: layers.Spec
    decoder: layers.Spec
    vocabulary: int
    length: int | None  # positions of either stack; None: no limit
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    positions: str | None = None  # "learned" or "sinusoidal"; None: in the attention
    position_offset: int = 0  # rows of the position table before position 0
    tied: bool = True  # the unembedding is the embedding
    unembed_bias: bool = False
    output_scale: float = 1.0  # between the decoder's final norm and the unembedding
    start_token: int | None = None  # what a generation begins with


class EncoderDecoder(model.Model):
    """An encoder-decoder.

    `model(tokens, attention_mask, decoder_tokens=..., decoder_attention_mask=...)`
    gives the logits of the decoder, `[batch, decoder position, vocab]`. Activations of
    the stacks are called `encoder....` and `decoder....`.

    `final_norm` and `unembed` are those of the decoder; `embed` enters either stack.
    """

    def __init__(self, spec: Pair, config_json: str, *, rngs: nnx.Rngs):
        self.spec, self.config_json = spec, config_json
        rows, std = spec.vocabulary, spec.decoder.init_std
        shape = (rows, spec.decoder.width)

        def entrance(stack: layers.Spec) -> layers.Entrance:
            return layers.Entrance(
                stack,
                spec.positions,
                rows=(spec.length or 0) + spec.position_offset,
                offset=spec.position_offset,
                norm=spec.embedding_norm,
                rngs=rngs,
            )

        self.embedding = layers.normal(rngs, shape, std)
        self.encoder_entrance = entrance(spec.encoder)
        self.decoder_entrance = entrance(spec.decoder)
        self.encoder = blocks.Stack(spec.encoder, rngs)
        self.decoder = blocks.Stack(spec.decoder, rngs)
        self.unembedding = None if spec.tied else layers.normal(rngs, shape, std)
        self.bias = nnx.Param(jnp.zeros(rows)) if spec.unembed_bias else None

    def embed(
        self,
        tokens: Array,
        positions_of_tokens: Array | None = None,
        tap: Tap = untapped,
        stack: str = "decoder",
    ) -> Array:
        """What enters the first block of a stack, `[batch, position, d]`."""
        where = positions_of_tokens
        where = jnp.arange(tokens.shape[1])[None] if where is None else where
        x = self.embedding[...][tokens]
        x = tap("hook_embed", x * jnp.asarray(self.spec.embedding_scale, x.dtype))
        encoding = stack == "encoder"
        entrance = self.encoder_entrance if encoding else self.decoder_entrance
        return entrance(x, where, tap)

    def final_norm(self, hidden: Array) -> Array:
        """From the decoder's stream to what the unembedding is multiplied with."""
        x = self.decoder.finish(hidden)
        return x * jnp.asarray(self.spec.output_scale, x.dtype)

    def check(
        self,
        tokens: Array,
        attention_mask: Array,
        decoder_tokens: Array | None = None,
        decoder_attention_mask: Array | None = None,
    ) -> None:
        if decoder_tokens is None:
            raise ValueError("`decoder_tokens` must be given to an encoder-decoder.")
        for name, ids in (("tokens", tokens), ("decoder_tokens", decoder_tokens)):
            ids = model.as_tokens(ids, name)
            model.check_length(ids.shape[1], self.spec.length, name)
            model.check_ids(ids, self.spec.vocabulary, name)
        if len(decoder_tokens) != len(tokens):
            raise ValueError(
                f"`decoder_tokens` must have as many rows as the tokens, {len(tokens)};"
                f" got {len(decoder_tokens)}."
            )
        model.as_mask(decoder_attention_mask, decoder_tokens, "decoder_attention_mask")

    def forward(
        self,
        tokens: Array,
        attention_mask: Array,
        *,
        taps: Taps,
        decoder_tokens: Array,
        decoder_attention_mask: Array | None = None,
    ) -> Array:
        encoded = self.encode(tokens, attention_mask, taps)
        memory = self.decoder.memory(encoded)
        mask = model.as_mask(
            decoder_attention_mask, decoder_tokens, "decoder_attention_mask"
        )
        where = positions.positions_of(mask)
        x = self.embed(decoder_tokens, where, _prefixed(taps, "decoder."))
        sight = self.decoder.sight(mask, where, where)
        x, _ = self.decoder(
            x,
            sight,
            where,
            taps,
            prefix="decoder.",
            memory=memory,
            memory_sight=_sight_of(attention_mask),
        )
        x = taps("decoder.ln_final.hook_normalized", self.final_norm(x))
        return self.unembed(x)

    def encode(
        self, tokens: Array, attention_mask: Array, taps: Taps | None = None
    ) -> Array:
        """The encoder's output after its final norm, `[batch, position, d]`."""
        taps = Taps() if taps is None else taps
        where = positions.positions_of(attention_mask)
        x = self.embed(tokens, where, _prefixed(taps, "encoder."), "encoder")
        sight = self.encoder.sight(attention_mask, where, where)
        x, _ = self.encoder(x, sight, where, taps, prefix="encoder.")
        return taps("encoder.ln_final.hook_normalized", self.encoder.finish(x))

    def prompt(self, tokens: Array, decoder_tokens: ArrayLike | None) -> Array:
        """What `generate` continues."""
        if decoder_tokens is not None:
            return model.as_tokens(decoder_tokens, "decoder_tokens")
        if self.spec.start_token is None:
            raise ValueError(
                "`decoder_tokens` must be given: the config has no"
                " decoder_start_token_id (many models begin with a language's token)."
            )
        return jnp.full((len(tokens), 1), self.spec.start_token, jnp.int32)

    def check_generation(
        self, tokens: Array, attention_mask: Array, prompt: Array, new: int
    ) -> None:
        """Raises ValueError where `generate` would leave the configured positions."""
        self.check(tokens, attention_mask, decoder_tokens=prompt)
        model.check_length(prompt.shape[1] + new, self.spec.length, "prompt and output")

    def prefill(
        self, tokens: Array, attention_mask: Array, prompt: Array, new: int
    ) -> tuple[Array, "Translating"]:
        """Logits `[batch, vocab]` after the prompt, with room for `new` more tokens."""
        memory = self.decoder.memory(self.encode(tokens, attention_mask))
        spec, (batch, length) = self.spec.decoder, prompt.shape
        mask = jnp.ones((batch, length + new), bool)
        shape = (spec.layers, batch, length + new, spec.kv_heads, spec.head_size)
        empty = jnp.zeros(shape, self.embedding[...].dtype)
        where = positions.positions_of(mask)
        progress = Progress((empty, empty), mask, where, jnp.int32(0))
        return self.advance(prompt, Translating(progress, memory, attention_mask))

    def advance(
        self, tokens: Array, state: "Translating"
    ) -> tuple[Array, "Translating"]:
        """Logits after the last of some more tokens of each sequence."""
        (past, mask, where, start), memory, memory_mask = state
        mine = lax.dynamic_slice_in_dim(where, start, tokens.shape[1], axis=1)
        x = self.embed(tokens, mine)
        x, grown = self.decoder(
            x,
            self.decoder.sight(mask, mine, where, start=start),
            mine,
            Taps(),
            past=past,
            start=start,
            memory=memory,
            memory_sight=_sight_of(memory_mask),
        )
        assert grown is not None, "a stack that is given a past returns one"
        progress = Progress(grown, mask, where, start + tokens.shape[1])
        logits = self.unembed(self.final_norm(x[:, -1]))
        return logits, Translating(progress, memory, memory_mask)


class Translating(NamedTuple):
    """A generation under way, and what it attends to."""

    progress: Progress
    memory: tuple[Array, Array]  # [layer, batch, position, head, size]
    memory_mask: Array  # [batch, position]


def _sight_of(mask: Array) -> attention.Sight:
    """Every query sees every key of the other stack that is no padding."""
    everywhere = jnp.zeros((1, 1, mask.shape[1]), jnp.int32)
    return attention.Sight(mask[:, None, None, :], everywhere)


def _prefixed(taps: Taps, prefix: str) -> Tap:
    return lambda name, value: taps(prefix + name, value)
