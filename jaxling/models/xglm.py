"""XGLM: sinusoidal positions. Lin et al., 2021, https://arxiv.org/abs/2112.10668."""

import math
from typing import Any

from . import layers
from .config import Family
from .decoder import Decoder, Language
from .rules import Ignore, Rule, Rules, linear, linear_of_heads, same, vector

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
    width, heads = config["d_model"], config["attention_heads"]
    if width % heads:
        raise ValueError(f"d_model {width} is not a multiple of {heads} heads")
    stack = layers.Spec(
        layers=config["num_layers"],
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        mlp_width=config["ffn_dim"],
        activation=config["activation_function"],
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
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
    name, path = "(model.)layers.{layer}.", "decoder.blocks."
    table: dict[str, Rule | Ignore] = {
        "(model.)embed_tokens.weight": same("embedding"),
        "(model.)embed_positions.weights": Ignore("recomputed"),
        "lm_head.weight": Ignore("tied: it is the embedding")
        if spec.tied
        else same("unembedding"),
        name + "self_attn.out_proj.weight": linear_of_heads(
            path + "attention.out.kernel"
        ),
        name + "self_attn.out_proj.bias": same(path + "attention.out.bias"),
    }
    for part in ("query", "key", "value"):
        proj, own = f"{name}self_attn.{part[0]}_proj.", f"{path}attention.{part}."
        table[proj + "weight"] = linear(own + "kernel")
        table[proj + "bias"] = vector(own + "bias")
    for part, own in (("fc1", "up"), ("fc2", "down")):
        table[f"{name}{part}.weight"] = linear(f"{path}mlp.{own}.kernel")
        table[f"{name}{part}.bias"] = same(f"{path}mlp.{own}.bias")
    for leaf, own in (("weight", "scale"), ("bias", "bias")):
        rule = same(f"{path}attention_norm.{own}")
        table[f"{name}self_attn_layer_norm.{leaf}"] = rule
        table[f"{name}final_layer_norm.{leaf}"] = same(f"{path}mlp_norm.{own}")
        table[f"(model.)layer_norm.{leaf}"] = same(f"decoder.final_norm.{own}")
    return table


FAMILY = Family(Decoder, ATTRIBUTES, FIXED, spec, rules, aliases=ALIASES)
