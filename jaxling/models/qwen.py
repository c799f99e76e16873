"""Qwen 2, 2.5 and 3: Llama with biases, later with norms of queries and keys.

Yang et al., 2024, https://arxiv.org/abs/2407.10671; 2025,
https://arxiv.org/abs/2505.09388.
"""

from typing import Any

from . import layers, llama
from .config import Family
from .decoder import Decoder, Language

QWEN2 = llama.attributes(
    "attention_bias",
    "mlp_bias",
    vocab_size=151936,
    intermediate_size=22016,
    num_key_value_heads=32,
    max_position_embeddings=32768,
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
    layer_types=None,
)
QWEN3 = QWEN2 | {"head_dim": 128, "attention_bias": False}


def _stack(config: dict[str, Any]) -> layers.Spec:
    stack, first = llama.stack(config), config["max_window_layers"]
    if not config["use_sliding_window"]:
        return stack
    kinds = [
        "sliding_attention" if layer >= first else "full_attention"
        for layer in range(stack.layers)
    ]
    return stack._replace(windows=llama.windows(config, kinds))


def spec2(config: dict[str, Any]) -> Language:
    return llama.language(config, _stack(config)._replace(qkv_bias=True))


def spec3(config: dict[str, Any]) -> Language:
    bias = config["attention_bias"]
    stack = _stack(config)._replace(qk_norm="head", qkv_bias=bias, out_bias=bias)
    return llama.language(config, stack)


FAMILY2 = Family(Decoder, QWEN2, {}, spec2, llama.rules)
FAMILY3 = Family(Decoder, QWEN3, {}, spec3, llama.rules)
