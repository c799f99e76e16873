"""OLMo, whose norms have no parameters, and OLMo 2, which norms what blocks add.

Groeneveld et al., 2024, https://arxiv.org/abs/2402.00838; OLMo et al., 2024,
https://arxiv.org/abs/2501.00656.
"""

from typing import Any

from . import llama
from .config import Family
from .decoder import Decoder, Language
from .rules import Rules

OLMO = llama.attributes("mlp_bias", "rms_norm_eps", vocab_size=50304, clip_qkv=None)
OLMO2 = llama.attributes("mlp_bias", vocab_size=50304, rms_norm_eps=1e-5)
NORMS2 = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}


def spec(config: dict[str, Any]) -> Language:
    bias = config["attention_bias"]
    stack = llama.stack(config)._replace(
        norm="layer",
        norm_eps=1e-5,
        norm_affine=False,
        qkv_bias=bias,
        out_bias=bias,
        clip_qkv=config["clip_qkv"],
    )
    return llama.language(config, stack)


def spec2(config: dict[str, Any]) -> Language:
    bias = config["attention_bias"]
    stack = llama.stack(config)._replace(
        norm_placement="output", qk_norm="all", qkv_bias=bias, out_bias=bias
    )
    return llama.language(config, stack)


def rules2(spec: Language) -> Rules:
    return llama.rules(spec, NORMS2)


FAMILY = Family(Decoder, OLMO, {}, spec, llama.rules)
FAMILY2 = Family(Decoder, OLMO2, {}, spec2, rules2)
