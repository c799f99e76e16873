"""What the demo models read: verses, verse pairs and word pairs, in a fixed mix.

The first 5% of the tokens are word pairs alone, in the prompt of word translation
(He et al., arXiv 2505.16385), where only the translations count in the loss:

    Please translate words from English to Swahili.

    English: water
    Swahili: maji

Then of the documents 20% are one verse (" In the beginning ..."), 60% a verse in two
languages ("English: ...\\nSwahili: ..."), and 20% word pairs as before. Verses are of
the training books, words of training concepts: the lexicon's, and the looser pairs of
`lexicons.mine`. `UNSEEN_PAIRS` of languages meet in no document. `</s>` ends each.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from jaxling.training import Document

from . import text

LONGEST = 256  # positions of the models, and tokens of a document; longer ones are cut
WORDS_FIRST = 0.05  # of the tokens
SHARES = {"verse": 0.20, "verse pair": 0.60, "word pairs": 0.20}
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


def training_documents(
    tokenizer,
    verses: text.Verses,
    word_pairs: dict[tuple[str, str], list[tuple[str, str]]],
    *,
    tokens: int,
    seed: int,
) -> Iterator[Document]:
    """Draws documents of about `tokens` tokens in all, in the order to train on.

    Args:
      tokenizer: a `tokenizers.Tokenizer`.
      verses: training verses.
      word_pairs: of training concepts by pair of languages, each pair once and in the
        order of `text.LANGUAGES`.
      tokens: at least so many are drawn.
      seed: decides everything.
    """
    rng = np.random.default_rng(seed)
    verse_codes = {
        language: [
            coded.ids for coded in tokenizer.encode_batch([" " + v for v in column])
        ]
        for language, column in verses.text.items()
    }
    present = {
        language: [row for row, verse in enumerate(column) if verse]
        for language, column in verses.text.items()
    }
    pairs = [
        pair
        for pair in itertools.combinations(verse_codes, 2)
        if pair not in UNSEEN_PAIRS and pair in word_pairs
    ]
    shared = {
        pair: np.intersect1d(present[pair[0]], present[pair[1]]) for pair in pairs
    }
    weights = np.array([ENGLISH_WEIGHT if "eng" in pair else 1.0 for pair in pairs])
    weights /= weights.sum()
    end = [tokenizer.token_to_id("</s>")]
    newline = tokenizer.encode("\n").ids

    def line(language: str, row: int) -> list[int]:
        name = tokenizer.encode(text.LANGUAGES[language] + ":").ids
        return name + verse_codes[language][row]

    drawn = 0
    while drawn < tokens:
        kind = "word pairs"
        if drawn >= WORDS_FIRST * tokens:
            kind = list(SHARES)[rng.choice(len(SHARES), p=list(SHARES.values()))]
        if kind == "verse":
            language = list(present)[rng.integers(len(present))]
            row = present[language][rng.integers(len(present[language]))]
            document = Document((verse_codes[language][row] + end)[:LONGEST])
        else:
            pair = pairs[rng.choice(len(pairs), p=weights)]
            turned = bool(rng.integers(2))
            source, target = pair[::-1] if turned else pair
            if kind == "verse pair":
                row = shared[pair][rng.integers(len(shared[pair]))]
                both = line(source, row) + newline + line(target, row) + end
                document = Document(both[:LONGEST])
            else:
                known = word_pairs[pair]
                size = rng.integers(WORD_PAIRS[0], WORD_PAIRS[1] + 1)
                chosen = [known[i] for i in rng.integers(len(known), size=size)]
                chosen = [entry[::-1] if turned else entry for entry in chosen]
                document = word_document(tokenizer, source, target, chosen)
        drawn += len(document.tokens)
        yield document


def word_document(tokenizer, source: str, target: str, pairs) -> Document:
    """The prompt over `pairs`; targets are the translations and their line ends."""
    tokens: list[int] = []
    targets: list[bool] = []
    for number, (word, translation) in enumerate(pairs):
        prompt = word_prompt(source, target, [], word)
        if number:
            prompt = prompt[len(word_prompt(source, target, [])) :]
        asked = tokenizer.encode(prompt).ids
        answer = tokenizer.encode(f" {translation}\n\n").ids
        tokens += asked + answer
        targets += [False] * len(asked) + [True] * len(answer)
    end = [tokenizer.token_to_id("</s>")]
    return Document((tokens + end)[:LONGEST], (targets + [True])[:LONGEST])
