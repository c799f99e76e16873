"""From `config.json` to a family's spec: every attribute is understood, or named."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import nnx

from jaxling.checkpoints import Checkpoint, CheckpointError

from .model import Model
from .rules import Rules


class Family(NamedTuple):
    """One file of this package.

    `attributes` are those of `config.json` that `spec` reads, with the values that
    transformers assumes where they are absent; `fixed` are those that must have one of
    the values listed; `ignored` do not change what an inference computes. Where the
    tensors decide what the config leaves open (is there a head?), `amend` does.

    Of a spec all else is the family's, but for `tied`: `rules` of a spec that is not
    tied name the tensor of its unembedding.
    """

    model: Callable[..., Model]
    attributes: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]]
    spec: Callable[[dict[str, Any]], Any]
    rules: Callable[[Any], Rules]
    ignored: tuple[str, ...] = ()
    aliases: Mapping[str, str] = {}  # other spelling -> the one in `attributes`
    amend: Callable[[Any, Checkpoint], Any] | None = None


# Attributes of any family that name tokens, training, generation or bookkeeping.
IGNORED = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype",
    "_name_or_path", "name_or_path", "_attn_implementation_autoset", "auto_map",
    "attn_implementation", "_attn_implementation", "use_cache",
    "gradient_checkpointing",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "mask_token_id",
    "unk_token_id", "cls_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "initializer_range", "initializer_factor", "init_std",
    "finetuning_task", "id2label", "label2id", "num_labels", "_num_labels",
    "problem_type", "pretraining_tp", "max_sequence_length",
    "task_specific_params", "tokenizer_class", "prefix", "language", "torchscript",
    "output_attentions", "output_hidden_states", "return_dict", "use_return_dict",
    "max_length", "min_length", "num_beams", "length_penalty", "early_stopping",
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
    "no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens",
    "max_new_tokens", "_commit_hash", "directionality", "output_past",
    "cache_implementation", "chunk_size_feed_forward",
}  # fmt: skip


# Of attributes that are usually None, what a value has to be like.
KINDS = {
    "num_key_value_heads": 1, "head_dim": 1, "n_inner": 1, "num_decoder_layers": 1,
    "decoder_start_token_id": 0, "pad_token_id": 0,
    "clip_qkv": 1.0, "final_logit_softcapping": 1.0, "attn_logit_softcapping": 1.0,
    "rope_theta": 1.0, "partial_rotary_factor": 1.0,
    "rope_scaling": {}, "rope_parameters": {}, "layer_types": [],
    "scale_decoder_outputs": False,
}  # fmt: skip


# Beyond any published model; bounds what a hostile config can cost.
MOST_LAYERS = 10_000


def read_config(raw: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """All attributes that the family's spec reads, checked.

    An attribute that is neither understood nor known to be harmless must be off (None,
    False or empty), for it may change the mathematics. Nothing is dropped in inference.

    Raises:
      CheckpointError: unhandled attributes, values or types; all are named.
    """
    problems, found = [], {}
    for name, value in raw.items():
        name = family.aliases.get(name, name)
        if name in family.attributes:
            usual = family.attributes[name]
            if not _of_kind(value, KINDS.get(name) if usual is None else usual):
                problems.append(f"{name} is {value!r:.80} (usually {usual!r})")
            elif "layer" in name and isinstance(value, int) and value > MOST_LAYERS:
                problems.append(f"{name} is {value}, more than {MOST_LAYERS}")
            found[name] = value
        elif name in family.fixed:
            if value not in family.fixed[name]:
                allowed = " or ".join(map(repr, family.fixed[name]))
                problems.append(f"{name} is {value!r:.80}; handled is {allowed}")
        elif name not in IGNORED and name not in family.ignored and "drop" not in name:
            if value is not None and value is not False and value not in ({}, [], ""):
                problems.append(f"{name} = {value!r:.80} is not handled")
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(sorted(problems))}.")
    return {**family.attributes, **found}


def abstract(
    raw: Mapping[str, Any],
    family: Family,
    where: str,
    amend: Callable[[Any], Any] = lambda spec: spec,
) -> Model:
    """The model that a config describes, with shapes in the place of arrays.

    What the config leaves open, `amend` decides from the tensors of a checkpoint.

    Raises:
      CheckpointError: the config describes no model that is handled.
    """
    config, config_json = read_config(raw, family, where), json.dumps(dict(raw))
    try:
        spec = amend(family.spec(config))
        return nnx.eval_shape(lambda: family.model(spec, config_json, rngs=nnx.Rngs(0)))
    except KeyError as error:
        raise CheckpointError(f"{where}: {error} is missing.") from error
    except (ValueError, TypeError, ArithmeticError) as error:
        # Of several lines, the first is the family's; the rest is the tracer's.
        message = str(error).split("\n")[0]
        raise CheckpointError(f"{where}: {message}.") from error


def _of_kind(value: Any, usual: Any) -> bool:
    if usual is None or value is None:
        return True
    if isinstance(usual, bool) or isinstance(usual, str):
        return type(value) is type(usual)
    if isinstance(usual, int):
        return type(value) is int and value >= min(usual, 1)
    if isinstance(usual, float):
        return type(value) in (int, float) and 0 < value < math.inf
    return isinstance(value, type(usual))
