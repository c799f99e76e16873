"""Mistral 7B: Llama, seeing a window. Jiang et al., 2023, arxiv.org/abs/2310.06825."""

from typing import Any

from . import llama
from .config import Family
from .decoder import Decoder, Language

ATTRIBUTES = llama.attributes(
    "attention_bias",
    "mlp_bias",
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    sliding_window=4096,
)


def spec(config: dict[str, Any]) -> Language:
    window = config["sliding_window"] or 0
    stack = llama.stack(config)
    return llama.language(config, stack._replace(windows=(window,) * stack.layers))


FAMILY = Family(Decoder, ATTRIBUTES, {}, spec, llama.rules)
