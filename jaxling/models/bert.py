"""BERT, and what shares its architecture: mBERT, MiniLM, sentence encoders.

Devlin et al., 2019, https://arxiv.org/abs/1810.04805. The norms stand behind the sums.
"""

from typing import Any

from jaxling.checkpoints import Checkpoint

from . import layers
from .config import Family
from .conversion import has
from .encoder import Encoder, Masked
from .rules import Alias, Ignore, Rules, Table, dense, linear_of_heads, same
from .rules import norm as plain_norm

ATTRIBUTES = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
FIXED = {"position_embedding_type": (None, "absolute")}

# Of the pooler, which no hidden state depends on; old configs of mBERT list its sizes.
IGNORED = (
    "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
    "pooler_size_per_head", "pooler_type",
)  # fmt: skip


def stack(config: dict[str, Any]) -> layers.Spec:
    """What BERT's own and its relatives' configs say in the same words."""
    return layers.plain(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        activation=config["hidden_act"],
        eps=config["layer_norm_eps"],
    )._replace(norm_placement="post", final_norm=False, causal=False)


def spec(config: dict[str, Any]) -> Masked:
    return Masked(
        stack=stack(config),
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        token_types=config["type_vocab_size"],
        head_activation=config["hidden_act"],
        tied=config["tie_word_embeddings"] is not False,
    )


def amend(spec: Masked, checkpoint: Checkpoint) -> Masked:
    head = has(checkpoint, "cls.predictions.transform.dense.weight")
    return spec._replace(head=head)


def norm(name: str, path: str) -> Table:
    """A layer norm, under its present name and under the one of TensorFlow's BERT."""
    return plain_norm(name, path) | {
        f"{name}.gamma": Alias(f"{name}.weight"),
        f"{name}.beta": Alias(f"{name}.bias"),
    }


def body(prefix: str, norms: dict[str, str]) -> Table:
    """The tensors below the head; `norms` says where the blocks' norms stand."""
    block, to = prefix + "encoder.layer.{layer}.", "encoder.blocks."
    attention = to + "attention."
    table: Table = {
        f"{prefix}embeddings.word_embeddings.weight": same("embedding"),
        f"{prefix}embeddings.position_embeddings.weight": same(
            "entrance.position_embedding"
        ),
        f"{prefix}embeddings.token_type_embeddings.weight": same("type_embedding"),
        f"{prefix}embeddings.position_ids": Ignore("recomputed"),
        f"{prefix}embeddings.token_type_ids": Ignore("recomputed"),
        f"{prefix}pooler.{{any}}": Ignore("no hidden state depends on it"),
        **dense(block + "attention.self.query", attention + "query"),
        **dense(block + "attention.self.key", attention + "key"),
        **dense(block + "attention.self.value", attention + "value"),
        **dense(block + "attention.output.dense", attention + "out", linear_of_heads),
        **dense(block + "intermediate.dense", to + "mlp.up"),
        **dense(block + "output.dense", to + "mlp.down"),
    }
    for place, name in norms.items():
        table |= norm(block + name, to + place)
    return table


NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}


def rules(spec: Masked) -> Rules:
    table = body("(bert.)", NORMS)
    table |= norm("(bert.)embeddings.LayerNorm", "entrance.norm")
    table["cls.seq_relationship.{any}"] = Ignore("a head for another task")
    if spec.head:
        table |= dense("cls.predictions.transform.dense", "head.dense")
        table |= norm("cls.predictions.transform.LayerNorm", "head.norm")
        table |= unembedding(spec, "cls.predictions")
    return table


def unembedding(spec: Masked, name: str) -> Table:
    """The last product of a head; what is tied is stored twice in old files."""
    own, inner = f"{name}.bias", f"{name}.decoder.bias"
    if spec.tied:
        return {
            f"{name}.decoder.weight": Ignore("tied: it is the embedding"),
            own: same("bias"),
            inner: Alias(own),
        }
    return {
        f"{name}.decoder.weight": same("unembedding"),
        inner: same("bias"),
        own: Alias(inner, copy=False),  # where both are there, this one is unused
    }


FAMILY = Family(Encoder, ATTRIBUTES, FIXED, spec, rules, IGNORED, amend=amend)
