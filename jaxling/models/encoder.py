"""A bidirectional encoder, with the head of a masked language model or without."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from . import blocks, layers, model, positions
from .cache import Taps, untapped


class Masked(NamedTuple):
    """A stack with its embeddings, and the head that fills in masked tokens."""

    stack: layers.Spec
    vocabulary: int
    length: int  # positions the model is configured for
    position_offset: int = 0  # rows of the position table before position 0
    token_types: int = 0  # rows of the table that tells first and second text apart
    embedding_norm: bool = True
    head: bool = True
    head_activation: str = "gelu"
    tied: bool = True  # the unembedding is the embedding


class Head(nnx.Module):
    """Of a masked language model, all but the words: product, activation, norm."""

    def __init__(self, spec: Masked, rngs: nnx.Rngs):
        if spec.head_activation not in layers.ACTIVATIONS:
            raise ValueError(f"activation {spec.head_activation!r} is not handled")
        self.activation = spec.head_activation
        width, std = (spec.stack.width,), spec.stack.init_std
        self.dense = layers.Linear((), width, width, bias=True, std=std, rngs=rngs)
        self.norm = layers.Norm(spec.stack)

    def __call__(self, x: Array) -> Array:
        return self.norm(layers.ACTIVATIONS[self.activation](self.dense(x)))


class Encoder(model.Model):
    """An encoder. Its logits are those of the masked-language-model head; where the
    checkpoint has none, calls return the last hidden state instead, float32.

    `model(tokens, attention_mask, token_type_ids=..., segment_ids=...)`: the types are
    all 0 where not given; `segment_ids` keeps packed documents apart.

    `resid_post` of a post-norm encoder (BERT, RoBERTa) is the stream *after* the norm
    that ends the block, so it is what transformers calls a hidden state; of a pre-norm
    one (XLM-RoBERTa-XL) it is the running sum. `final_norm` is all that lies between
    it and the product with the unembedding: the final norm of a pre-norm encoder, then
    the head's product, activation and norm.
    """

    def __init__(self, spec: Masked, config_json: str, *, rngs: nnx.Rngs):
        self.spec, self.config_json = spec, config_json
        stack = spec.stack

        def table(rows: int) -> nnx.Param:
            return layers.normal(rngs, (rows, stack.width), stack.init_std)

        self.embedding = table(spec.vocabulary)
        self.type_embedding = table(spec.token_types) if spec.token_types else None
        self.entrance = layers.Entrance(
            stack,
            "learned",
            rows=spec.length + spec.position_offset,
            offset=spec.position_offset,
            norm=spec.embedding_norm,
            rngs=rngs,
        )
        self.encoder = blocks.Stack(stack, rngs)
        self.head = Head(spec, rngs) if spec.head else None
        own = spec.head and not spec.tied
        self.unembedding = table(spec.vocabulary) if own else None
        self.bias = nnx.Param(jnp.zeros(spec.vocabulary)) if spec.head else None

    def embed(
        self,
        tokens: Array,
        positions_of_tokens: Array | None = None,
        tap=untapped,
        token_type_ids: Array | None = None,
    ) -> Array:
        """What enters the first block, `[batch, position, d]`."""
        where = positions_of_tokens
        where = jnp.arange(tokens.shape[1])[None] if where is None else where
        x = tap("hook_embed", self.embedding[...][tokens])
        if self.type_embedding is not None:
            types = jnp.zeros_like(tokens) if token_type_ids is None else token_type_ids
            x = x + tap("hook_token_type_embed", self.type_embedding[...][types])
        return self.entrance(x, where, tap)

    def final_norm(self, hidden: Array) -> Array:
        """From the residual stream to what the unembedding is multiplied with."""
        x = self.encoder.finish(hidden)
        return x if self.head is None else self.head(x)

    @property
    def unembed_matrix(self) -> Array:
        """`[vocab, d]`.

        Raises:
          ValueError: the checkpoint has no head.
        """
        if self.head is None:
            raise ValueError("This encoder was saved without a head: it has no logits.")
        return super().unembed_matrix

    def check(
        self,
        tokens: Array,
        attention_mask: Array,
        token_type_ids: Array | None = None,
        segment_ids: Array | None = None,
    ) -> None:
        model.check_length(tokens.shape[1], self.spec.length, "tokens")
        model.check_ids(tokens, self.spec.vocabulary, "tokens")
        given = {"token_type_ids": token_type_ids, "segment_ids": segment_ids}
        for name, ids in given.items():
            if ids is not None:
                model.check_shape(ids, tokens, name)
                model.check_integers(ids, name)
        if token_type_ids is not None:
            model.check_ids(token_type_ids, self.spec.token_types, "token_type_ids")

    def prompt(self, tokens: Array, decoder_tokens: Array | None) -> Array:
        """Raises ValueError: `generate` has nothing to continue."""
        raise ValueError("An encoder does not generate text.")

    def forward(
        self,
        tokens: Array,
        attention_mask: Array,
        *,
        taps: Taps,
        token_type_ids: Array | None = None,
        segment_ids: Array | None = None,
    ) -> Array:
        where = positions.positions_of(attention_mask, segment_ids)
        x = self.embed(tokens, where, taps, token_type_ids)
        sight = self.encoder.sight(attention_mask, where, where, segments=segment_ids)
        x, _ = self.encoder(x, sight, where, taps)
        x = taps("ln_final.hook_normalized", self.final_norm(x))
        return self.unembed(x) if self.spec.head else x.astype(jnp.float32)
