"""Which tensor holds a family's token embeddings, and which its unembedding.

Names are written without prefix; any prefix made of dotted words may stand before them
(`bert.`, `transformer.`, `model.`, `language_model.model.`: repositories of one family
differ), as long as the answer is one.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple


class Family(NamedTuple):
    """Candidates in order of preference, and what shows that there is a head."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    head: tuple[str, ...] = ()


_ENCODER = "embeddings.word_embeddings.weight"
_DECODER = Family(("embed_tokens.weight",), ("lm_head.weight",))
_BERT = Family(
    (_ENCODER,), ("cls.predictions.decoder.weight",), ("cls.predictions.bias",)
)
_ROBERTA = Family((_ENCODER,), ("lm_head.decoder.weight",), ("lm_head.bias",))
_SEQ2SEQ = Family(
    ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    ("lm_head.weight",),
)

FAMILIES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "xlm-roberta-xl": _ROBERTA,
    "gpt2": Family(("wte.weight",), ("lm_head.weight",)),
    "gpt_neox": Family(("embed_in.weight",), ("embed_out.weight",)),
    "bloom": Family(("word_embeddings.weight",), ("lm_head.weight",)),
    "xglm": _DECODER,
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2")
        + ("gemma", "gemma2", "gemma3", "gemma3_text"),
        _DECODER,
    ),
    **dict.fromkeys(("t5", "mt5", "umt5", "mbart", "m2m_100", "nllb"), _SEQ2SEQ),
}


def matching(candidates: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that are the first candidate that any name is, prefix aside."""
    names = list(names)
    for candidate in candidates:
        rule = re.compile(rf"(?:\w+\.)*{re.escape(candidate)}")
        if found := [name for name in names if rule.fullmatch(name)]:
            return found
    return []


def tied(config: dict[str, Any]) -> bool | None:
    """Whether the config says that inputs and outputs share a matrix; None: silent."""
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, dict) else {}):
        if isinstance(value := part.get("tie_word_embeddings"), bool):
            return value
    return None
