"""T5, mT5 and umT5: relative positions as a bias, norms without mean.

Raffel et al., 2020, https://arxiv.org/abs/1910.10683; Xue et al., 2021,
https://arxiv.org/abs/2010.11934; Chung et al., 2023, https://arxiv.org/abs/2304.09151.
umT5 learns the bias in every block, the others in the first block for all.
"""

from typing import Any

from . import layers
from .config import Family
from .encoder_decoder import EncoderDecoder, Pair
from .rules import (
    Alias,
    Ignore,
    Rules,
    Table,
    linear,
    linear_of_heads,
    same,
    unembedding,
)

ATTRIBUTES = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
    "scale_decoder_outputs": None,
    "decoder_start_token_id": 0,
}
ATTRIBUTES_MULTILINGUAL = {
    **ATTRIBUTES,
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}
FIXED = {"is_encoder_decoder": (True,)}
# The limit of T5's training; what newer configs derive from feed_forward_proj; and the
# name that T5X gave to umT5's code.
IGNORED = ("n_positions", "is_gated_act", "dense_act_fn", "scalable_attention")
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}


def spec(config: dict[str, Any], *, per_layer: bool = False) -> Pair:
    gate, _, activation = config["feed_forward_proj"].rpartition("-")
    if gate not in ("", "gated"):
        raise ValueError(f"feed_forward_proj {gate}-{activation} is not handled")
    encoder = layers.Spec(
        layers=config["num_layers"],
        width=config["d_model"],
        heads=config["num_heads"],
        kv_heads=config["num_heads"],
        head_size=config["d_kv"],
        mlp_width=config["d_ff"],
        # "gated-gelu" has always meant the approximation by tanh.
        activation="gelu_new" if gate and activation == "gelu" else activation,
        gated=bool(gate),
        norm_eps=config["layer_norm_epsilon"],
        scale=1.0,
        causal=False,
        relative=layers.Relative(
            config["relative_attention_num_buckets"],
            config["relative_attention_max_distance"],
            per_layer,
        ),
    )
    depth = config["num_decoder_layers"]
    decoder = encoder._replace(
        layers=config["num_layers"] if depth is None else depth,
        causal=True,
        cross=True,
    )
    return Pair(
        encoder=encoder,
        decoder=decoder,
        vocabulary=config["vocab_size"],
        length=None,
        tied=config["tie_word_embeddings"] is not False,
        output_scale=config["d_model"] ** -0.5 if scaled(config) else 1.0,
        start_token=config["decoder_start_token_id"],
    )


def scaled(config: dict[str, Any]) -> bool:
    """Whether outputs are scaled before the unembedding, as with tied embeddings.

    T5 1.1 and umT5 say that they are not tied, and are not scaled. transformers 5
    forces umT5's flag and scales its logits all the same, which makes them differ by a
    factor from those of T5X and of transformers 4; the file is believed here.
    """
    said = config["scale_decoder_outputs"]
    return config["tie_word_embeddings"] is not False if said is None else said


def spec_mt5(config: dict[str, Any]) -> Pair:
    """mT5 is never scaled, whatever its config says of ties."""
    return spec({**config, "scale_decoder_outputs": False})


def spec_umt5(config: dict[str, Any]) -> Pair:
    return spec(config, per_layer=True)


def rules(spec: Pair) -> Rules:
    table: Table = {
        "shared.weight": same("embedding"),
        "encoder.embed_tokens.weight": Alias("shared.weight"),
        "decoder.embed_tokens.weight": Alias("shared.weight"),
        **unembedding("lm_head.weight", spec.tied),
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (
            Ignore("old files hold it; nothing ever used it")
        ),
    }
    for name, stack in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        table |= stack_rules(name, stack)
    return table


def stack_rules(name: str, stack: layers.Spec) -> Table:
    block, to = f"{name}.block.{{layer}}.layer.", f"{name}.blocks."
    parts = ["SelfAttention", *["EncDecAttention"] * stack.cross, "DenseReluDense"]
    places = {
        "SelfAttention": "attention",
        "EncDecAttention": "cross",
        "DenseReluDense": "mlp",
    }
    table: Table = {f"{name}.final_layer_norm.weight": same(f"{name}.final_norm.scale")}
    for number, part in enumerate(parts):
        place, inner = to + places[part], f"{block}{number}.{part}."
        table[f"{block}{number}.layer_norm.weight"] = same(f"{place}_norm.scale")
        if part == "DenseReluDense":
            up = {"wi_0": "gate", "wi_1": "up"} if stack.gated else {"wi": "up"}
            for tensor, path in {**up, "wo": "down"}.items():
                table[f"{inner}{tensor}.weight"] = linear(f"{place}.{path}.kernel")
            continue
        for tensor, path in {"q": "query", "k": "key", "v": "value"}.items():
            table[f"{inner}{tensor}.weight"] = linear(f"{place}.{path}.kernel")
        table[f"{inner}o.weight"] = linear_of_heads(f"{place}.out.kernel")
    own = stack.relative is not None and stack.relative.per_layer
    owner, path = ("{layer}", to) if own else ("0", f"{name}.")
    bias = f"{name}.block.{owner}.layer.0.SelfAttention.relative_attention_bias.weight"
    table[bias] = same(path + "relative")
    return table


FAMILY = Family(EncoderDecoder, ATTRIBUTES, FIXED, spec, rules, IGNORED, ALIASES)
FAMILY_MT5 = FAMILY._replace(attributes=ATTRIBUTES_MULTILINGUAL, spec=spec_mt5)
FAMILY_UMT5 = FAMILY_MT5._replace(spec=spec_umt5)
