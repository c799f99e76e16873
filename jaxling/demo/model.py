"""The demo models before training: their shape, and what their first weights know."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxling import models

from . import embedding, text

LAYERS, HEAD_SIZE = 4, 32
WIDTHS = {"demo": 192, "demo-small": 96}
_COPY = 0.03


def config(vocabulary: int, width: int, longest: int) -> dict:
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
        "max_position_embeddings": longest,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }


def initial_model(
    tokenizer, verses: text.Verses, width: int, longest: int, seed: int
) -> models.Model:
    """A Llama whose embedding holds verse statistics and whose blocks copy a little.

    The MLPs begin at zero and attention hands on a small share of the mean of what it
    sees (values and output are one rotation and its inverse), so the first predictions
    are those of the statistics alone and every weight has a gradient.
    """
    rng = np.random.default_rng(seed)
    new = models.build(
        config(tokenizer.get_vocab_size(), width, longest), jax.random.key(seed)
    )
    table = embedding.initial_embedding(tokenizer, verses, width, rng)
    new.embedding[...] = jnp.asarray(table)
    blocks = new.decoder.blocks
    blocks.mlp.down.kernel[...] = jnp.zeros_like(blocks.mlp.down.kernel[...])
    turns = np.stack(
        [np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in range(LAYERS)]
    ).astype(np.float32)
    value, out = blocks.attention.value.kernel, blocks.attention.out.kernel
    value[...] = jnp.asarray(turns).reshape(value[...].shape)
    back = turns.transpose(0, 2, 1)
    out[...] = _COPY * jnp.asarray(back).reshape(out[...].shape)
    for name in ("query", "key"):
        kernel = getattr(blocks.attention, name).kernel
        drawn = rng.standard_normal(kernel[...].shape) * width**-0.5
        kernel[...] = jnp.asarray(drawn, jnp.float32)
    for name in ("gate", "up"):
        kernel = getattr(blocks.mlp, name).kernel
        drawn = rng.standard_normal(kernel[...].shape) * width**-0.5
        kernel[...] = jnp.asarray(drawn, jnp.float32)
    new.decoder.final_norm.scale[...] = jnp.asarray(embedding.output_gain(width))
    return new
