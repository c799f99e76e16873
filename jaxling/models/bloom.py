"""BLOOM: distance is a penalty in the attention (ALiBi), embeddings are normed.

BigScience, 2022, https://arxiv.org/abs/2211.05100. Any length is allowed.
"""

from typing import Any

from . import layers, llama
from .config import Family
from .decoder import Decoder, Language
from .rules import (
    Ignore,
    Rule,
    Rules,
    biases_of_three,
    heads_of_three,
    linear,
    linear_of_heads,
    same,
)

ATTRIBUTES = {
    "vocab_size": 250880,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
FIXED = {"apply_residual_connection_post_layernorm": (False,)}
ALIASES = {
    "n_embed": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
# Fusions and tensor parallelism of the training, and a length that binds nothing.
IGNORED = (
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "n_inner",
    "offset_alibi",
    "pretraining_tp",
    "seq_length",
    "skip_bias_add",
    "skip_bias_add_qkv",
    "slow_but_exact",
)


def spec(config: dict[str, Any]) -> Language:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    stack = layers.Spec(
        layers=config["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=heads,
        head_size=llama.head_size(config),
        mlp_width=4 * width,
        activation="gelu_new",
        gated=False,
        norm="layer",
        norm_eps=config["layer_norm_epsilon"],
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        alibi=True,
    )
    return Language(
        stack=stack,
        vocabulary=config["vocab_size"],
        length=None,
        embedding_norm=True,
        tied=config["tie_word_embeddings"],
    )


def rules(spec: Language) -> Rules:
    name, path = "(transformer.)h.{layer}.", "decoder.blocks."
    three, out = name + "self_attention.query_key_value.", path + "attention.out."
    table: dict[str, Rule | Ignore] = {
        "(transformer.)word_embeddings.weight": same("embedding"),
        "lm_head.weight": Ignore("tied: it is the embedding")
        if spec.tied
        else same("unembedding"),
        three + "weight": heads_of_three(path + "attention"),
        three + "bias": biases_of_three(path + "attention"),
        name + "self_attention.dense.weight": linear_of_heads(out + "kernel"),
        name + "self_attention.dense.bias": same(out + "bias"),
    }
    for part, own in (("dense_h_to_4h", "up"), ("dense_4h_to_h", "down")):
        table[f"{name}mlp.{part}.weight"] = linear(f"{path}mlp.{own}.kernel")
        table[f"{name}mlp.{part}.bias"] = same(f"{path}mlp.{own}.bias")
    for leaf, own in (("weight", "scale"), ("bias", "bias")):
        rule = same(f"embedding_norm.{own}")
        table[f"(transformer.)word_embeddings_layernorm.{leaf}"] = rule
        rule = same(f"{path}attention_norm.{own}")
        table[f"{name}input_layernorm.{leaf}"] = rule
        rule = same(f"{path}mlp_norm.{own}")
        table[f"{name}post_attention_layernorm.{leaf}"] = rule
        table[f"(transformer.)ln_f.{leaf}"] = same(f"decoder.final_norm.{own}")
    return table


FAMILY = Family(Decoder, ATTRIBUTES, FIXED, spec, rules, IGNORED, ALIASES)
