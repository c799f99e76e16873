"""GPT-2: learned positions, kernels as `[in, out]`. Radford et al., 2019,
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
"""

import math
from typing import Any

import numpy as np

from . import layers
from .config import Family
from .decoder import Decoder, Language
from .rules import Ignore, Rule, Rules, dense, norm, reshaped, same, unembedding

ATTRIBUTES = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}
FIXED = {
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "reorder_and_upcast_attn": (False, True),  # the order of a product, not its value
}
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
IGNORED = (
    "n_ctx",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
)


def spec(config: dict[str, Any]) -> Language:
    stack = layers.plain(
        layers=config["n_layer"],
        width=config["n_embd"],
        heads=config["n_head"],
        mlp_width=config["n_inner"] or 4 * config["n_embd"],
        activation=config["activation_function"],
        eps=config["layer_norm_epsilon"],
    )._replace(scale=None if config["scale_attn_weights"] else 1.0)
    return Language(
        stack=stack,
        vocabulary=config["vocab_size"],
        length=config["n_positions"],
        positions="learned",
        tied=config["tie_word_embeddings"],
    )


def _columns(path: str, leaf: str) -> Rule:
    """Queries, keys, values side by side: the last axis is [3, head, size]."""

    def view(tensor: np.ndarray, part: int, shape: tuple[int, ...]) -> np.ndarray:
        fused = (*shape[:-2], 3, *shape[-2:])
        stored = (*shape[:-2], math.prod(fused[-3:]))
        return reshaped(tensor, stored, fused)[..., part, :, :]

    def join(parts: list[np.ndarray]) -> np.ndarray:
        return np.stack(parts, -3).reshape(*parts[0].shape[:-2], -1)

    return Rule(
        tuple(f"{path}.{name}.{leaf}" for name in ("query", "key", "value")), view, join
    )


def _from_heads(path: str) -> Rule:
    return Rule(
        (path,),
        lambda tensor, part, shape: reshaped(
            tensor, (math.prod(shape[:-1]), shape[-1]), shape
        ),
        lambda parts: parts[0].reshape(-1, parts[0].shape[-1]),
    )


def rules(spec: Language) -> Rules:
    name, path = "(transformer.)h.{layer}.", "decoder.blocks."
    return {
        "(transformer.)wte.weight": same("embedding"),
        "(transformer.)wpe.weight": same("entrance.position_embedding"),
        name + "attn.bias": Ignore("the causal mask"),
        name + "attn.masked_bias": Ignore("the causal mask"),
        name + "attn.c_attn.weight": _columns(path + "attention", "kernel"),
        name + "attn.c_attn.bias": _columns(path + "attention", "bias"),
        **unembedding("lm_head.weight", spec.tied),
        **dense(name + "attn.c_proj", path + "attention.out", _from_heads),
        **dense(name + "mlp.c_fc", path + "mlp.up", same),
        **dense(name + "mlp.c_proj", path + "mlp.down", same),
        **norm(name + "ln_1", path + "attention_norm"),
        **norm(name + "ln_2", path + "mlp_norm"),
        **norm("(transformer.)ln_f", "decoder.final_norm"),
    }


FAMILY = Family(Decoder, ATTRIBUTES, FIXED, spec, rules, IGNORED, ALIASES)
