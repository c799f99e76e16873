"""XGLM: sinusoidal positions. Lin et al., 2021, https://arxiv.org/abs/2112.10668."""

import math
from typing import Any

from . import layers, mbart
from .config import Family
from .decoder import Decoder, Language
from .rules import Ignore, Rules, norm, same, unembedding

ATTRIBUTES = {
    "vocab_size": 256008,
    "max_position_embeddings": 2048,
    "d_model": 1024,
    "ffn_dim": 4096,
    "num_layers": 24,
    "attention_heads": 16,
    "activation_function": "gelu",
    "scale_embedding": True,
    "tie_word_embeddings": True,
}
FIXED = {
    "add_cross_attention": (False,),
    # The row of positions that is zero; rows are offset by 2, so these are never used.
    "pad_token_id": (None, 0, 1),
}
ALIASES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "attention_heads",
}


def spec(config: dict[str, Any]) -> Language:
    width = config["d_model"]
    stack = layers.plain(
        layers=config["num_layers"],
        width=width,
        heads=config["attention_heads"],
        mlp_width=config["ffn_dim"],
        activation=config["activation_function"],
        eps=1e-5,
    )
    return Language(
        stack=stack,
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        embedding_scale=math.sqrt(width) if config["scale_embedding"] else 1.0,
        positions="sinusoidal",
        position_offset=2,
        tied=config["tie_word_embeddings"],
    )


def rules(spec: Language) -> Rules:
    return {
        "(model.)embed_tokens.weight": same("embedding"),
        "(model.)embed_positions.weights": Ignore("recomputed"),
        **unembedding("lm_head.weight", spec.tied),
        **mbart.block_rules("(model.)layers.{layer}.", "decoder.blocks.", cross=False),
        **norm("(model.)layer_norm", "decoder.final_norm"),
    }


FAMILY = Family(Decoder, ATTRIBUTES, FIXED, spec, rules, aliases=ALIASES)
