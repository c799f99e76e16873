"""The demo models before training: their shape, and what their first weights know."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxling import models

from . import documents, embedding, text

LAYERS, HEAD_SIZE = 4, 32
WIDTHS = {"demo": 192, "demo-small": 96}
ROPE_BASE = 10000.0
FARTHEST = 6  # tokens that a head looks back at first
# Sizes of the first weights, chosen on development words among a few that were tried.
_COPY = 0.15
_LOOK_BACK = 14.0
_RANDOM_ATTENTION = 0.3
_PAIRS = 4  # of rotary coordinates; the slower ones hardly tell neighbours apart


def config(vocabulary: int, width: int) -> dict:
    """The `config.json` of a demo model of this width."""
    heads = width // HEAD_SIZE
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": width * 8 // 3,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "max_position_embeddings": documents.LONGEST,
        "rms_norm_eps": 1e-5,
        "rope_theta": ROPE_BASE,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }


def initial_model(
    tokenizer, verses: text.Verses, width: int, seed: int
) -> models.Model:
    """A Llama whose embedding holds verse statistics and whose heads look back.

    Each head attends at first to the token a set distance of 1 to 6 back and hands on
    a share of it (values and output are one rotation and its inverse), as heads of
    trained models often do; MLPs begin at zero. So the first predictions are those of
    the statistics alone, and "copy the meaning that stands three tokens back", most of
    what a word prompt asks for, need not be found by chance. After Trockman & Kolter,
    "Mimetic Initialization of Self-Attention Layers", https://arxiv.org/abs/2305.09828.
    """
    rng = np.random.default_rng(seed)
    new = models.build(config(tokenizer.get_vocab_size(), width), jax.random.key(seed))
    table = embedding.initial_embedding(tokenizer, verses, width, rng)
    llama: Any = new  # it has every part that is named here
    llama.embedding[...] = jnp.asarray(table)
    stack = llama.decoder
    stack.final_norm.scale[...] = jnp.asarray(embedding.output_gain(width))
    attention, mlp = stack.blocks.attention, stack.blocks.mlp

    def fill(parameter, values):
        shape = parameter[...].shape
        parameter[...] = jnp.asarray(values, jnp.float32).reshape(shape)

    def normal(parameter, scale: float):
        return scale * width**-0.5 * rng.standard_normal(parameter[...].shape)

    turns = np.linalg.qr(rng.standard_normal((LAYERS, width, width)))[0]
    fill(attention.value.kernel, turns)
    fill(attention.out.kernel, _COPY * turns.transpose(0, 2, 1))
    query = normal(attention.query.kernel, _RANDOM_ATTENTION)
    key = normal(attention.key.kernel, _RANDOM_ATTENTION)
    layer, head, pair = np.ogrid[:LAYERS, : width // HEAD_SIZE, :_PAIRS]
    back = 1 + (layer + head) % FARTHEST
    turn = back * ROPE_BASE ** (-2.0 * pair / HEAD_SIZE)
    size = _LOOK_BACK * width**-0.5
    # The last column of the embedding, log frequency, is above zero for every token:
    # through it a query and a key of one direction each meet at distance `back`.
    query[:, -1, :, :_PAIRS] += size * np.cos(turn)
    query[:, -1, :, HEAD_SIZE // 2 :][..., :_PAIRS] -= size * np.sin(turn)
    key[:, -1, :, :_PAIRS] += size
    fill(attention.query.kernel, query)
    fill(attention.key.kernel, key)
    fill(mlp.gate.kernel, normal(mlp.gate.kernel, 1.0))
    fill(mlp.up.kernel, normal(mlp.up.kernel, 1.0))
    fill(mlp.down.kernel, np.zeros(mlp.down.kernel[...].shape))
    return new
