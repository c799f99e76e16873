"""Translating sentences with a decoder, and how much of them is right: chrF.

The protocol of He et al., 2025, https://arxiv.org/abs/2505.16385, in its released code:
one example, the sentence before, then the question,

    Translate the sentence from English to Swahili.

    English: <example>
    Swahili: <its translation>

    English: <sentence>
    Swahili:

continued greedily, cut at the end of the line, and scored by sentence chrF (Popović,
2015, https://aclanthology.org/W15-3049; sacrebleu's, 0 to 100). That code puts a space
behind the last colon; here it is left to the answer's first token, which holds it in
most tokenizers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxling import models

_LENGTH = 32  # prompts are padded to a multiple of it


class Sentence(NamedTuple):
    """A sentence to translate, its translation, and the pair that is the example."""

    source: str
    target: str
    text: str
    answer: str
    example: tuple[str, str]


def build_sentences(
    texts: Mapping[str, Sequence[str]],
    pairs: Sequence[tuple[str, str]],
    *,
    count: int | None = None,
    fits: Callable[[Sentence], bool] = lambda sentence: True,
) -> list[Sentence]:
    """Evenly spaced sentences of each ordered pair, each with the one before it.

    Args:
      texts: by language; row i of all languages means the same, "" where it is missing.
      pairs: ordered pairs of languages.
      count: sentences of each pair; all where None.
      fits: which sentences may be asked (for one, those that leave room to answer).

    Raises:
      ValueError: a pair with fewer than two sentences, or without a language; none that
        fits.
    """
    found: list[Sentence] = []
    for source, target in pairs:
        missing = {source, target} - set(texts)
        if missing:
            raise ValueError(f"There are no sentences in {sorted(missing)}.")
        both = [
            (a, b)
            for a, b in zip(texts[source], texts[target])
            if a.strip() and b.strip()
        ]
        if len(both) < 2:
            raise ValueError(
                f"{source} and {target} need two sentences, the first of which is the"
                f" example; got {len(both)}."
            )
        own = [Sentence(source, target, *b, a) for a, b in zip(both, both[1:])]
        own = [sentence for sentence in own if fits(sentence)]
        if not own:
            raise ValueError(
                f"No sentence from {source} to {target} leaves room for an answer."
            )
        if count is not None and count < len(own):
            own = [own[i] for i in np.linspace(0, len(own) - 1, count).astype(int)]
        found += own
    return found


def prompt(sentence: Sentence, names: Mapping[str, str]) -> str:
    """The question, up to the place of the answer (" " + the translation)."""
    source, target = names[sentence.source], names[sentence.target]
    shown, translated = sentence.example
    return (
        f"Translate the sentence from {source} to {target}.\n\n"
        f"{source}: {shown}\n{target}: {translated}\n\n"
        f"{source}: {sentence.text}\n{target}:"
    )


def translate(
    model: models.Model,
    tokenizer: Any,
    sentences: Sequence[Sentence],
    names: Mapping[str, str],
    *,
    most: int = 150,
    batch: int = 32,
    progress: Callable[[Sequence], Any] = iter,
) -> list[str]:
    """A translation of each sentence; "" where the first thing said ends the line.

    Args:
      model: a decoder.
      tokenizer: its `tokenizers.Tokenizer`.
      sentences: what to translate.
      names: what a prompt calls each language.
      most: tokens of an answer; less where the longest prompt leaves no more room.
      batch: prompts at a time.
      progress: wraps the iteration over batches (`tqdm.tqdm`).

    Raises:
      ValueError: a prompt that leaves no room for an answer.
    """
    coded = tokenizer.encode_batch([prompt(s, names) for s in sentences])
    lengths = np.array([len(c.ids) for c in coded])
    room = getattr(model.spec, "length", None)
    if room is not None and lengths.max(initial=0) >= room:
        raise ValueError(
            f"A prompt has {lengths.max()} tokens and the model {room} positions, which"
            " leaves no room for an answer: choose shorter sentences."
        )
    end = model.config.get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    # All prompts are padded alike, for a shape is a program to compile.
    longest = -(-int(lengths.max(initial=1)) // _LENGTH) * _LENGTH
    new = most
    if room is not None:
        new = min(most, room - int(lengths.max(initial=1)))
        longest = min(longest, room - new)
    order = np.argsort(lengths, kind="stable")
    answers = [""] * len(sentences)
    for chosen in progress([order[i : i + batch] for i in range(0, len(order), batch)]):
        tokens = np.zeros((batch, longest), np.int32)
        mask = np.zeros(tokens.shape, bool)
        mask[:, -1] = True  # rows that fill the batch
        for row, i in enumerate(chosen):
            tokens[row, longest - lengths[i] :] = coded[i].ids
            mask[row, longest - lengths[i] :] = True
        said = models.generate(model, tokens, mask, max_new_tokens=new, eos_token=end)
        for row, i in enumerate(chosen):
            answers[i] = line(np.asarray(said[row, longest:]).tolist(), tokenizer, end)
    return answers


def line(ids: Sequence[int], tokenizer: Any, end: int | None) -> str:
    """What tokens say up to the token `end`, and of that the first line."""
    ids = list(ids)
    if end in ids:
        ids = ids[: ids.index(end)]
    return tokenizer.decode(ids).strip(" ").split("\n")[0].strip()


def sentence_chrf(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """`[sentence]`: sacrebleu's sentence chrF with its defaults, 0 to 100.

    Raises:
      ImportError: sacrebleu is not installed.
      ValueError: answers and references are not as many.
    """
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise ImportError(
            "chrF needs sacrebleu: pip install 'jaxling[eval]'."
        ) from None
    measure = CHRF()
    return np.array(
        [
            measure.sentence_score(answer, [reference]).score
            for answer, reference in zip(answers, references, strict=True)
        ]
    )
