"""Models of Hugging Face checkpoints in Flax NNX, with their hidden states in hand.

model = load("path or id", dtype="float32")
logits, cache = model.run_with_cache(tokens, attention_mask)
cache["resid_post"]  # [layer, batch, position, d]

A family is one file: the attributes of its config with their defaults, the spec that
they amount to, and the rules by which its tensors fill the parameters; `FAMILIES` names
it. What it computes is chosen from the parts of `layers`, `attention` and `blocks`.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxling.checkpoints import CheckpointError, open_checkpoint

from . import (
    bert,
    bloom,
    conversion,
    gemma,
    gpt2,
    gpt_neox,
    llama,
    mbart,
    mistral,
    olmo,
    qwen,
    roberta,
    t5,
    xglm,
)
from .cache import Cache as Cache
from .config import Family, abstract
from .generation import generate as generate
from .model import Model as Model
from .model import as_dtype

# By the `model_type` of config.json.
FAMILIES: dict[str, Family] = {
    "bert": bert.FAMILY,
    "bloom": bloom.FAMILY,
    "gemma2": gemma.FAMILY2,
    "gemma3_text": gemma.FAMILY3,
    "gpt2": gpt2.FAMILY,
    "gpt_neox": gpt_neox.FAMILY,
    "llama": llama.FAMILY,
    "m2m_100": mbart.FAMILY_M2M,
    "mbart": mbart.FAMILY,
    "mistral": mistral.FAMILY,
    "mt5": t5.FAMILY_MT5,
    "olmo": olmo.FAMILY,
    "olmo2": olmo.FAMILY2,
    "qwen2": qwen.FAMILY2,
    "qwen3": qwen.FAMILY3,
    "roberta": roberta.FAMILY,
    "t5": t5.FAMILY,
    "umt5": t5.FAMILY_UMT5,
    "xglm": xglm.FAMILY,
    "xlm-roberta": roberta.FAMILY_XLM,
    "xlm-roberta-xl": roberta.FAMILY_XL,
}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family that a config names.

    Raises:
      CheckpointError: none of those that are here.
    """
    kind = config.get("model_type")
    if kind is None:
        raise CheckpointError(
            f"{where} has no config.json, or one without a model_type."
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type {kind!r:.80} is none of those that are handled,"
            f" {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[kind]


def load(
    path_or_id: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Model:
    """A model of the family that the checkpoint's config names, with its weights.

    Args:
      path_or_id: a built-in name, a directory, or a hub id; with `revision` of the hub.
      dtype: of the parameters; tensors are cast while they are read. Where not given,
        the one of the files, or the narrowest that holds all of theirs. T5, mT5 and
        Gemma were trained in bfloat16 and overflow float16: give them bfloat16.
      mesh: spreads every parameter over these devices, each of which receives its own
        part only. Calls then run on all of them.

    Tied embeddings are stored once, whatever the file holds. Where a config ties them
    and the file holds an unembedding of other values, that one is kept, as in
    transformers 5. Logits of umT5 as published, whose config says that it is not tied,
    are those of T5X, transformers 4 and transformers from 5.24 on: sqrt(d_model) times
    those of transformers 5 before, which forces the flag and scales. Poolers and heads
    of other tasks are not read, and `save` does not write them.

    Raises:
      CheckpointError: an unknown family; unhandled attributes of the config; tensors
        that are unknown, missing or of a wrong shape. The message lists the names.
      ValueError: `dtype` is not one of floats.
    """
    dtype = None if dtype is None else as_dtype(dtype)
    checkpoint = open_checkpoint(path_or_id, revision)
    family = family_of(checkpoint.config, str(checkpoint.path))
    return conversion.load(checkpoint, family, dtype=dtype, mesh=mesh)


def build(
    config: Mapping[str, Any], key: jax.Array, *, dtype: DTypeLike = jnp.float32
) -> Model:
    """A new model with random weights, from a config in the words of `config.json`.

    Attributes that are absent have the values that transformers gives them.

    Raises:
      CheckpointError: an unknown family, or an attribute that is not handled.
      ValueError: `dtype` is not one of floats.
    """
    dtype = as_dtype(dtype)
    family = family_of(config, "config")
    empty = abstract(config, family, "config")

    @jax.jit
    def parameters(key: jax.Array) -> nnx.State:
        rngs = nnx.Rngs(params=key)
        made = nnx.state(family.model(empty.spec, empty.config_json, rngs=rngs))
        return jax.tree.map(lambda array: array.astype(dtype), made)

    return nnx.merge(nnx.graphdef(empty), parameters(key))


def save(model: Model, directory: str | os.PathLike) -> None:
    """Writes a Hugging Face directory, safetensors and config, that transformers loads.

    The tokenizer, and poolers and heads of other tasks, which a model does not have,
    are the caller's to copy. Weights of an earlier save in `directory` (safetensors
    files and their index) are removed.
    """
    family = family_of(model.config, "model")
    conversion.save(model, family, directory)
