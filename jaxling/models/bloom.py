"""BLOOM: distance is a penalty in the attention (ALiBi), embeddings are normed.

BigScience, 2022, https://arxiv.org/abs/2211.05100. Any length is allowed.
"""

from typing import Any

from . import gpt_neox, layers
from .config import Family
from .decoder import Decoder, Language
from .rules import Rules, norm, same, unembedding

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
    "seq_length",
    "skip_bias_add",
    "skip_bias_add_qkv",
    "slow_but_exact",
)


def spec(config: dict[str, Any]) -> Language:
    width = config["hidden_size"]
    stack = layers.plain(
        layers=config["num_hidden_layers"],
        width=width,
        heads=config["num_attention_heads"],
        mlp_width=4 * width,
        activation="gelu_new",
        eps=config["layer_norm_epsilon"],
    )._replace(alibi=True)
    return Language(
        stack=stack,
        vocabulary=config["vocab_size"],
        length=None,
        embedding_norm=True,
        tied=config["tie_word_embeddings"],
    )


def rules(spec: Language) -> Rules:
    name = "(transformer.)h.{layer}."
    return {
        "(transformer.)word_embeddings.weight": same("embedding"),
        **unembedding("lm_head.weight", spec.tied),
        **gpt_neox.block_rules(name, name + "self_attention."),
        **norm("(transformer.)word_embeddings_layernorm", "entrance.norm"),
        **norm("(transformer.)ln_f", "decoder.final_norm"),
    }


FAMILY = Family(Decoder, ATTRIBUTES, FIXED, spec, rules, IGNORED, ALIASES)
