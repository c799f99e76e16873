"""Llama 1 to 3.2: the decoder that most families vary.

Touvron et al., 2023, https://arxiv.org/abs/2302.13971; rope scaling of Llama 3.1,
https://arxiv.org/abs/2407.21783.
"""

from typing import Any

from . import layers, positions
from .config import Family
from .decoder import Decoder, Language
from .rules import (
    Ignore,
    Rules,
    Table,
    linear,
    linear_of_heads,
    same,
    unembedding,
    vector,
)

ATTRIBUTES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    "attention_bias": False,
    "mlp_bias": False,
}


def attributes(*absent: str, **others: Any) -> dict[str, Any]:
    """A relative's: Llama's without those it does not have, and with others."""
    own = {name: value for name, value in ATTRIBUTES.items() if name not in absent}
    return own | others


def head_size(config: dict[str, Any]) -> int:
    """Of the config, or the width divided by the heads."""
    found = config.get("head_dim")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    return found or layers.head_size(width, heads)


def rope(
    config: dict[str, Any], theta: float = 10000.0, *, partial: bool = False
) -> positions.Rope:
    """Old and new spellings: rope_theta and rope_scaling, or rope_parameters.

    Only with `partial` may a part of each head be rotated: of the others, transformers
    ignores it in some kinds of rope and fails in the rest.
    """
    own = config.get("rope_theta")
    found = positions.read_rope(
        config.get("rope_parameters") or config.get("rope_scaling") or {},
        theta=theta if own is None else own,
        fraction=config.get("partial_rotary_factor") or 1.0,
        length=config["max_position_embeddings"],
    )
    if found.fraction != 1 and not partial:
        raise ValueError(f"partial_rotary_factor {found.fraction} is not handled")
    return found


def stack(config: dict[str, Any]) -> layers.Spec:
    """What Llama's own and its relatives' configs say in the same words."""
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"] or heads
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads"
            f" {kv_heads}"
        )
    return layers.Spec(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size(config),
        mlp_width=config["intermediate_size"],
        activation=config["hidden_act"],
        norm_eps=config.get("rms_norm_eps", 1e-5),
        ropes=(rope(config),),
    )


def language(config: dict[str, Any], spec: layers.Spec) -> Language:
    return Language(
        stack=spec,
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        tied=config["tie_word_embeddings"],
    )


def windows(config: dict[str, Any], kinds: list[str]) -> tuple[int, ...]:
    """Of each layer, 0 for none; `kinds` is used where the config has no layer_types.

    Raises:
      ValueError: a kind of layer that is not handled, or too many or few layers.
    """
    kinds, layers = config["layer_types"] or kinds, config["num_hidden_layers"]
    if len(kinds) != layers:
        raise ValueError(f"layer_types lists {len(kinds)} layers of {layers}")
    if unknown := set(map(str, kinds)) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types {sorted(unknown)} are not handled")
    window = config["sliding_window"] or 0
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def spec(config: dict[str, Any]) -> Language:
    bias = config["attention_bias"]
    return language(
        config,
        stack(config)._replace(
            qkv_bias=bias, out_bias=bias, mlp_bias=config["mlp_bias"]
        ),
    )


# Where the family's norms stand, by the places that `blocks.Block` knows.
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def rules(spec: Language, norms: dict[str, str] = NORMS) -> Rules:
    """The names of Llama's tensors; its relatives share them but for the norms'."""
    stack, block, to = spec.stack, "(model.)layers.{layer}.", "decoder.blocks."
    table: Table = {
        "(model.)embed_tokens.weight": same("embedding"),
        **unembedding("lm_head.weight", spec.tied),
        block + "self_attn.rotary_emb.inv_freq": Ignore("recomputed"),
    }
    if stack.norm_affine:
        table["(model.)norm.weight"] = same("decoder.final_norm.scale")
        for place, name in norms.items():
            table[f"{block}{name}.weight"] = same(f"{to}{place}.scale")
    for path, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        rule = linear(f"{to}attention.{path}.kernel")
        table[f"{block}self_attn.{name}.weight"] = rule
        if stack.qkv_bias:
            rule = vector(f"{to}attention.{path}.bias")
            table[f"{block}self_attn.{name}.bias"] = rule
    name, path = block + "self_attn.o_proj.", to + "attention.out."
    table[name + "weight"] = linear_of_heads(path + "kernel")
    if stack.out_bias:
        table[name + "bias"] = vector(path + "bias")
    if stack.qk_norm:
        for part in ("query", "key"):
            rule = vector(f"{to}attention.{part}_norm.scale")
            table[f"{block}self_attn.{part[0]}_norm.weight"] = rule
    for part in ("gate", "up", "down"):
        name, path = f"{block}mlp.{part}_proj.", f"{to}mlp.{part}."
        table[name + "weight"] = linear(path + "kernel")
        if stack.mlp_bias:
            table[name + "bias"] = vector(path + "bias")
    return table


FAMILY = Family(Decoder, ATTRIBUTES, {}, spec, rules)
