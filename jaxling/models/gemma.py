"""Gemma 2 and Gemma 3 (text): local and global layers, four norms a block, soft-caps.

Gemma Team, 2024, https://arxiv.org/abs/2408.00118; 2025,
https://arxiv.org/abs/2503.19786. Norms scale by 1 + the stored weight; embeddings are
multiplied by the root of the width. The local layers of Gemma 3 have a rope of their
own.
"""

import math
from typing import Any

from . import layers, llama
from .config import Family
from .decoder import Decoder, Language
from .rules import Rules

GEMMA2 = llama.attributes(
    "mlp_bias",
    "hidden_act",
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    layer_types=None,
    final_logit_softcapping=30.0,
    attn_logit_softcapping=50.0,
)
GEMMA3 = GEMMA2 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "rope_local_base_freq": 10000.0,
    "sliding_window_pattern": 6,
}
FIXED = {"use_bidirectional_attention": (None, False)}
# transformers reads the cap of Gemma 3's attention and does not apply it.
FIXED3 = FIXED | {"attn_logit_softcapping": (None,)}
NORMS = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}


def _kinds(config: dict[str, Any], pattern: int) -> list[str]:
    """Every `pattern`-th layer is global."""
    return [
        "sliding_attention" if (layer + 1) % pattern else "full_attention"
        for layer in range(config["num_hidden_layers"])
    ]


def _language(config: dict[str, Any], stack: layers.Spec) -> Language:
    bias = config["attention_bias"]
    stack = stack._replace(
        norm_offset=1.0,
        norm_placement="both",
        qkv_bias=bias,
        out_bias=bias,
        scale=config["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=config["attn_logit_softcapping"],
    )
    return llama.language(config, stack)._replace(
        embedding_scale=math.sqrt(stack.width),
        logit_softcap=config["final_logit_softcapping"],
    )


def spec2(config: dict[str, Any]) -> Language:
    stack = llama.stack(config | {"hidden_act": config["hidden_activation"]})
    windows = llama.windows(config, _kinds(config, 2))
    return _language(config, stack._replace(windows=windows))


def spec3(config: dict[str, Any]) -> Language:
    config = config | {"hidden_act": config["hidden_activation"]}
    by_kind = config["rope_parameters"] or {}
    if not any(isinstance(value, dict) for value in by_kind.values()):  # old spelling
        by_kind = {"full_attention": by_kind or config["rope_scaling"] or {}}
    full = llama.rope(
        config | {"rope_parameters": by_kind.get("full_attention")}, 1000000.0
    )
    local = llama.rope(
        config
        | {
            "rope_parameters": by_kind.get("sliding_attention"),
            "rope_scaling": None,
            "rope_theta": config["rope_local_base_freq"],
        }
    )
    windows = llama.windows(config, _kinds(config, config["sliding_window_pattern"]))
    kinds = config["layer_types"] or _kinds(config, config["sliding_window_pattern"])
    stack = llama.stack(config | {"rope_parameters": None, "rope_scaling": None})
    stack = stack._replace(
        qk_norm="head",
        windows=windows,
        ropes=(full, local),
        rope_of_layer=tuple(int(kind == "sliding_attention") for kind in kinds),
    )
    return _language(config, stack)


def rules(spec: Language) -> Rules:
    return llama.rules(spec, NORMS)


FAMILY2 = Family(Decoder, GEMMA2, FIXED, spec2, rules, ignored=("hidden_act",))
FAMILY3 = Family(
    Decoder,
    GEMMA3,
    FIXED3,
    spec3,
    rules,
    ignored=("hidden_act",),
    aliases={"_sliding_window_pattern": "sliding_window_pattern"},
)
