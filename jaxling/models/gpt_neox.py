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
    Rules,
    Table,
    biases_of_three,
    dense,
    heads_of_three,
    linear_of_heads,
    norm,
    same,
    unembedding,
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
    bias = config["attention_bias"]
    stack = layers.plain(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        activation=config["hidden_act"],
        eps=config["layer_norm_eps"],
    )._replace(
        parallel=config["use_parallel_residual"],
        qkv_bias=bias,
        out_bias=bias,
        ropes=(llama.rope(config, partial=True),),
    )
    return llama.language(config, stack)


def rules(spec: Language) -> Rules:
    name = "(gpt_neox.)layers.{layer}."
    attention = name + "attention."
    return {
        "(gpt_neox.)embed_in.weight": same("embedding"),
        attention + "bias": Ignore("the causal mask"),
        attention + "masked_bias": Ignore("the causal mask"),
        attention + "rotary_emb.inv_freq": Ignore("recomputed"),
        **unembedding("embed_out.weight", spec.tied),
        **block_rules(name, attention, bias=spec.stack.qkv_bias),
        **norm("(gpt_neox.)final_layer_norm", "decoder.final_norm"),
    }


def block_rules(name: str, attention: str, *, bias: bool = True) -> Table:
    """Of a block, named as Megatron named it; `bias` is that of the attention."""
    path = "decoder.blocks."
    three, out = attention + "query_key_value.", path + "attention.out"
    table = dense(attention + "dense", out, linear_of_heads)
    table[three + "weight"] = heads_of_three(path + "attention")
    table[three + "bias"] = biases_of_three(path + "attention")
    if not bias:
        del table[three + "bias"], table[attention + "dense.bias"]
    return {
        **table,
        **dense(name + "mlp.dense_h_to_4h", path + "mlp.up"),
        **dense(name + "mlp.dense_4h_to_h", path + "mlp.down"),
        **norm(name + "input_layernorm", path + "attention_norm"),
        **norm(name + "post_attention_layernorm", path + "mlp_norm"),
    }


FAMILY = Family(
    Decoder, ATTRIBUTES, {}, spec, rules, ignored=("is_decoder",), aliases=ALIASES
)
