"""mBART and mBART-50; and M2M-100 and NLLB, which differ in positions and norms.

Liu et al., 2020, https://arxiv.org/abs/2001.08210; Tang et al., 2020,
https://arxiv.org/abs/2008.00401; Fan et al., 2020, https://arxiv.org/abs/2010.11125;
NLLB, 2022, https://arxiv.org/abs/2207.04672.
"""

import math
from typing import Any

from jaxling.checkpoints import Checkpoint

from . import layers
from .config import Family
from .conversion import has
from .encoder_decoder import EncoderDecoder, Pair
from .rules import (
    Alias,
    Ignore,
    Rule,
    Rules,
    Table,
    dense,
    linear_of_heads,
    norm,
    reshaped,
    same,
    unembedding,
)

ATTRIBUTES = {
    "vocab_size": 50265,
    "max_position_embeddings": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "activation_function": "gelu",
    "d_model": 1024,
    "scale_embedding": False,
    "tie_word_embeddings": True,
    "decoder_start_token_id": None,
}
ATTRIBUTES_M2M = {
    **ATTRIBUTES,
    "vocab_size": 128112,
    "activation_function": "relu",
    "scale_embedding": True,
    "decoder_start_token_id": 2,
}
# Of fairseq's BART: all of these models are pre-norm, with a norm after each stack.
FIXED = {
    "is_encoder_decoder": (True,),
    "normalize_before": (True,),
    "normalize_embedding": (True,),
    "add_final_layer_norm": (True,),
    "add_bias_logits": (False,),
    "static_position_embeddings": (False,),
    "extra_pos_embeddings": (2,),
    # The row of positions that is zero; rows are offset by 2, so these are never used.
    "pad_token_id": (None, 0, 1),
}
# Positions begin behind padding's row there, whichever it is; here always at row 2.
FIXED_M2M = FIXED | {"pad_token_id": (None, 1)}
IGNORED = ("num_hidden_layers", "save_step")
EMBEDDING = "(model.)shared.weight"


def stack(config: dict[str, Any], side: str) -> layers.Spec:
    decoding = side == "decoder"
    return layers.plain(
        layers=config[f"{side}_layers"],
        width=config["d_model"],
        heads=config[f"{side}_attention_heads"],
        mlp_width=config[f"{side}_ffn_dim"],
        activation=config["activation_function"],
        eps=1e-5,
    )._replace(causal=decoding, cross=decoding)


def spec(config: dict[str, Any]) -> Pair:
    return Pair(
        encoder=stack(config, "encoder"),
        decoder=stack(config, "decoder"),
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        embedding_scale=math.sqrt(config["d_model"])
        if config["scale_embedding"]
        else 1.0,
        embedding_norm=True,
        positions="learned",
        position_offset=2,
        tied=config["tie_word_embeddings"] is not False,
        unembed_bias=True,
        start_token=config["decoder_start_token_id"],
    )


def spec_m2m(config: dict[str, Any]) -> Pair:
    return spec(config)._replace(
        embedding_norm=False, positions="sinusoidal", unembed_bias=False
    )


def amend(spec: Pair, checkpoint: Checkpoint) -> Pair:
    return spec._replace(unembed_bias=has(checkpoint, "final_logits_bias"))


def rules(spec: Pair) -> Rules:
    table: Table = {
        EMBEDDING: same("embedding"),
        **unembedding("lm_head.weight", spec.tied),
    }
    if spec.unembed_bias:
        table["final_logits_bias"] = Rule(
            ("bias",),
            lambda tensor, part, shape: reshaped(tensor, (1, *shape), shape),
            lambda parts: parts[0][None],
        )
    for side, own in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        name = f"(model.){side}."
        table[name + "embed_tokens.weight"] = Alias(EMBEDDING)
        table[name + "version"] = Ignore("of fairseq's format")
        table |= norm(name + "layer_norm", f"{side}.final_norm")
        if spec.positions == "learned":
            path = f"{side}_entrance.position_embedding"
            table[name + "embed_positions.weight"] = same(path)
        else:
            table[name + "embed_positions.weights"] = Ignore("recomputed")
        if spec.embedding_norm:
            table |= norm(name + "layernorm_embedding", f"{side}_entrance.norm")
        table |= block_rules(
            name + "layers.{layer}.", f"{side}.blocks.", cross=own.cross
        )
    return table


def block_rules(block: str, to: str, *, cross: bool) -> Table:
    """Of a block, named as fairseq named it."""
    table = norm(block + "final_layer_norm", to + "mlp_norm")
    table |= dense(block + "fc1", to + "mlp.up")
    table |= dense(block + "fc2", to + "mlp.down")
    places = {"self_attn": "attention", **({"encoder_attn": "cross"} if cross else {})}
    for name, place in places.items():
        table |= norm(f"{block}{name}_layer_norm", f"{to}{place}_norm")
        attention, path = f"{block}{name}.", f"{to}{place}."
        for part in ("query", "key", "value"):
            table |= dense(f"{attention}{part[0]}_proj", path + part)
        table |= dense(attention + "out_proj", path + "out", linear_of_heads)
    return table


FAMILY = Family(EncoderDecoder, ATTRIBUTES, FIXED, spec, rules, IGNORED, amend=amend)
FAMILY_M2M = FAMILY._replace(attributes=ATTRIBUTES_M2M, fixed=FIXED_M2M, spec=spec_m2m)
