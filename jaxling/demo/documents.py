"""What the demo models read: verses, verse pairs and word pairs, in a fixed mix.

Of the documents 15% are one verse (" In the beginning ..."), 65% are a verse in two
languages ("English: ...\\nSwahili: ..."), and 20% are word pairs in the prompt of the
word-translation task (He et al., arXiv 2505.16385):

    Please translate words from English to Swahili.

    English: water
    Swahili: maji


Verses are of the training books, words of training concepts. `UNSEEN_PAIRS` of
languages meet in no document. Every document ends with `</s>`.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from . import text

LONGEST = 256  # tokens a row of the packed arrays; longer documents are cut
SHARES = {"verse": 0.15, "verse pair": 0.65, "word pairs": 0.20}
ENGLISH_WEIGHT = 3.0  # of language pairs with English against the others
WORD_PAIRS = (3, 9)  # a document, bounds included
UNSEEN_PAIRS = frozenset(
    {("swh", "ukr"), ("eus", "chr"), ("lav", "cop"), ("guj", "syc")}
)
# Whole-word tokens of the prompt below, which no verse teaches the tokenizer.
TEMPLATE_TOKENS = [
    "Please",
    *(f"▁{word}" for word in ("translate", "words", "from", "to")),
    *text.LANGUAGES.values(),
    *(f"▁{name}" for name in text.LANGUAGES.values()),
]


class Packed(NamedTuple):
    """Documents laid end to end, none across two rows."""

    tokens: np.ndarray  # uint16 [row, length], 0 (padding) after the last document
    segments: np.ndarray  # uint8 [row, length], 1, 2, ... by document, 0 for padding


def word_prompt(source: str, target: str, pairs, word: str | None = None) -> str:
    """The word-translation prompt over `pairs`; with `word`, up to its answer's place.

    The answer is " " + the word's translation.
    """
    names = text.LANGUAGES[source], text.LANGUAGES[target]
    prompt = "Please translate words from {} to {}.\n\n".format(*names)
    for pair in pairs:
        prompt += f"{names[0]}: {pair[0]}\n{names[1]}: {pair[1]}\n\n"
    if word is not None:
        prompt += f"{names[0]}: {word}\n{names[1]}:"
    return prompt


def documents(
    tokenizer, verses: text.Verses, word_pairs, rng: np.random.Generator
) -> Iterator[list[int]]:
    """Draws documents without end.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      verses: training verses.
      word_pairs: `{(source, target): [(word, word), ...]}` of training concepts, each
        pair of languages once, in the order of `text.LANGUAGES`.
      rng: decides everything.
    """
    end = [tokenizer.token_to_id("</s>")]

    def encode(texts):
        return [coded.ids for coded in tokenizer.encode_batch(texts)]

    coded = {
        language: encode([" " + verse for verse in column])
        for language, column in verses.text.items()
    }
    present = {
        language: {row for row, verse in enumerate(column) if verse}
        for language, column in verses.text.items()
    }
    name = {
        language: encode([text.LANGUAGES[language] + ":", "\n"]) for language in coded
    }
    choices = [
        pair
        for pair in itertools.combinations(coded, 2)
        if pair not in UNSEEN_PAIRS and pair in word_pairs
    ]
    rows = {pair: sorted(present[pair[0]] & present[pair[1]]) for pair in choices}
    singles = [(language, sorted(present[language])) for language in coded]
    weights = np.array([ENGLISH_WEIGHT if "eng" in pair else 1.0 for pair in choices])
    weights /= weights.sum()
    kinds, shares = list(SHARES), list(SHARES.values())
    while True:
        kind = kinds[rng.choice(len(kinds), p=shares)]
        if kind == "verse":
            language, numbers = singles[rng.integers(len(singles))]
            yield coded[language][numbers[rng.integers(len(numbers))]] + end
            continue
        pair = choices[rng.choice(len(choices), p=weights)]
        turned = bool(rng.integers(2))
        source, target = pair[::-1] if turned else pair
        if kind == "verse pair":
            row = rows[pair][rng.integers(len(rows[pair]))]
            left, right = coded[source][row], coded[target][row]
            first, second = name[source][0] + left, name[target][0] + right
            yield first + name[source][1] + second + end
        else:
            known = word_pairs[pair]
            size = rng.integers(WORD_PAIRS[0], WORD_PAIRS[1] + 1)
            drawn = [known[i] for i in rng.integers(len(known), size=size)]
            drawn = [entry[::-1] if turned else entry for entry in drawn]
            yield tokenizer.encode(word_prompt(source, target, drawn)).ids + end


def pack(stream: Iterator[list[int]], rows: int) -> Packed:
    """Fills `rows` rows of `LONGEST` tokens, each with the documents that fit whole."""
    tokens = np.zeros((rows, LONGEST), np.uint16)
    segments = np.zeros((rows, LONGEST), np.uint8)
    waiting: list[int] = []
    for row in range(rows):
        used, number = 0, 0
        while True:
            document = waiting or next(stream)[:LONGEST]
            if used + len(document) > LONGEST:
                waiting = document
                break
            waiting, number = [], number + 1
            tokens[row, used : used + len(document)] = document
            segments[row, used : used + len(document)] = number
            used += len(document)
    return Packed(tokens, segments)
