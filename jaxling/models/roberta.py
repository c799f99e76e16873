"""RoBERTa, XLM-RoBERTa base and large, and the pre-norm XLM-RoBERTa-XL and XXL.

Liu et al., 2019, https://arxiv.org/abs/1907.11692; Conneau et al., 2020,
https://arxiv.org/abs/1911.02116; Goyal et al., 2021, https://arxiv.org/abs/2105.00572.
Positions are counted from behind the padding's id, a habit of fairseq.
"""

from typing import Any

from jaxling.checkpoints import Checkpoint

from . import bert
from .config import Family
from .conversion import has
from .encoder import Encoder, Masked
from .rules import Rules, dense

ATTRIBUTES = {
    **bert.ATTRIBUTES,
    "vocab_size": 50265,
    "pad_token_id": None,
}
ATTRIBUTES_XLM = {**ATTRIBUTES, "vocab_size": 30522}
ATTRIBUTES_XL = {
    **ATTRIBUTES,
    "vocab_size": 250880,
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 10240,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}


def spec(config: dict[str, Any]) -> Masked:
    padding = config["pad_token_id"]
    offset = 2 if padding is None else padding + 1
    length = config["max_position_embeddings"] - offset
    if length < 1:
        raise ValueError(f"max_position_embeddings leaves {length} positions")
    return Masked(
        stack=bert.stack(config),
        vocabulary=config["vocab_size"],
        length=length,
        position_offset=offset,
        token_types=config["type_vocab_size"],
        tied=config["tie_word_embeddings"] is not False,
    )


def spec_xl(config: dict[str, Any]) -> Masked:
    found = spec(config)
    stack = found.stack._replace(norm_placement="pre", final_norm=True)
    return found._replace(stack=stack, embedding_norm=False)


def amend(spec: Masked, checkpoint: Checkpoint) -> Masked:
    return spec._replace(head=has(checkpoint, "lm_head.dense.weight"))


def rules(spec: Masked) -> Rules:
    pre = spec.stack.norm_placement == "pre"
    table = bert.body("(roberta.)", NORMS_XL if pre else bert.NORMS)
    if pre:
        table |= bert.norm("(roberta.)encoder.LayerNorm", "encoder.final_norm")
    else:
        table |= bert.norm("(roberta.)embeddings.LayerNorm", "entrance.norm")
    if spec.head:
        table |= dense("lm_head.dense", "head.dense")
        table |= bert.norm("lm_head.layer_norm", "head.norm")
        table |= bert.unembedding(spec, "lm_head")
    return table


NORMS_XL = {
    "attention_norm": "attention.self_attn_layer_norm",
    "mlp_norm": "LayerNorm",
}

FAMILY = Family(Encoder, ATTRIBUTES, bert.FIXED, spec, rules, bert.IGNORED, amend=amend)
FAMILY_XLM = FAMILY._replace(attributes=ATTRIBUTES_XLM)
FAMILY_XL = FAMILY._replace(attributes=ATTRIBUTES_XL, spec=spec_xl)
