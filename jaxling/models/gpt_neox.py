"""GPT-NeoX and Pythia: attention and MLP side by side, a part of each head rotated.

Black et al., 2022, https://arxiv.org/abs/2204.06745; Biderman et al., 2023,
https://arxiv.org/abs/2304.01373.
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
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": 0.25,
}
ALIASES = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}


def spec(config: dict[str, Any]) -> Language:
    heads, bias = config["num_attention_heads"], config["attention_bias"]
    stack = layers.Spec(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=heads,
        kv_heads=heads,
        head_size=llama.head_size(config),
        mlp_width=config["intermediate_size"],
        activation=config["hidden_act"],
        gated=False,
        norm="layer",
        norm_eps=config["layer_norm_eps"],
        parallel=config["use_parallel_residual"],
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        ropes=(llama.rope(config),),
    )
    return llama.language(config, stack)


def rules(spec: Language) -> Rules:
    name, path = "(gpt_neox.)layers.{layer}.", "decoder.blocks."
    table: dict[str, Rule | Ignore] = {
        "(gpt_neox.)embed_in.weight": same("embedding"),
        "embed_out.weight": Ignore("tied: it is the embedding")
        if spec.tied
        else same("unembedding"),
        name + "attention.bias": Ignore("the causal mask"),
        name + "attention.masked_bias": Ignore("the causal mask"),
        name + "attention.rotary_emb.inv_freq": Ignore("recomputed"),
        name + "attention.query_key_value.weight": heads_of_three(path + "attention"),
        name + "attention.dense.weight": linear_of_heads(path + "attention.out.kernel"),
    }
    if spec.stack.qkv_bias:
        rule = biases_of_three(path + "attention")
        table[name + "attention.query_key_value.bias"] = rule
        table[name + "attention.dense.bias"] = same(path + "attention.out.bias")
    for part, own in (("dense_h_to_4h", "up"), ("dense_4h_to_h", "down")):
        table[f"{name}mlp.{part}.weight"] = linear(f"{path}mlp.{own}.kernel")
        table[f"{name}mlp.{part}.bias"] = same(f"{path}mlp.{own}.bias")
    for leaf, own in (("weight", "scale"), ("bias", "bias")):
        rule = same(f"{path}attention_norm.{own}")
        table[f"{name}input_layernorm.{leaf}"] = rule
        rule = same(f"{path}mlp_norm.{own}")
        table[f"{name}post_attention_layernorm.{leaf}"] = rule
        rule = same(f"decoder.final_norm.{own}")
        table[f"(gpt_neox.)final_layer_norm.{leaf}"] = rule
    return table


FAMILY = Family(
    Decoder, ATTRIBUTES, {}, spec, rules, ignored=("is_decoder",), aliases=ALIASES
)
