"""How good a demo model is: words it never met in a prompt, verses it never read.

Words are asked for as `word_translation` does, one draw of five examples of training
concepts; a held-out word counts where its translation is likelier after it than after
nine other held-out words (chance 0.1). Resampling is by concept, as pairs of different
languages share words.
"""

import tempfile
from collections import Counter
from typing import NamedTuple

import numpy as np

from jaxling import kernels, models, training, word_translation, writing_systems

from . import documents, lexicons, text

ORDERED_PAIRS = [
    *(("eng", language) for language in list(text.LANGUAGES)[1:]),
    *((language, "eng") for language in list(text.LANGUAGES)[1:]),
    ("lav", "ukr"),
    ("cop", "syc"),
]
# The pairs of languages that meet in no document, both ways.
UNSEEN_ORDERED_PAIRS = [
    pair for known in sorted(documents.UNSEEN_PAIRS) for pair in (known, known[::-1])
]


class Interval(NamedTuple):
    """A mean and its bootstrap 95% interval."""

    mean: float
    low: float
    high: float


class Ranking(NamedTuple):
    """Every evaluated pair of one ordered pair of languages."""

    concepts: list[str]
    first: np.ndarray  # bool: ranked first among ten sources
    score: np.ndarray


class Loss(NamedTuple):
    """Of held-out verses in nats a token; the unigram model is the training verses'."""

    model: float
    unigram: float
    tokens: int


def concepts_of(language: str) -> dict[str, str]:
    """The concept of each lexicon word of a language: its English partner's stem."""
    if language == "eng":
        return {
            pair[0]: lexicons.stem(pair[0])
            for other in list(text.LANGUAGES)[1:]
            for split in lexicons.SPLITS
            for pair in lexicons.lexicon("eng", other, split)
        }
    return {
        word: lexicons.stem(english)
        for split in lexicons.SPLITS
        for english, word in lexicons.lexicon("eng", language, split)
    }


def rank_translations(
    model: models.Model,
    tokenizer,
    source: str,
    target: str,
    *,
    split: str,
    count: int | None = None,
    seed: int = 0,
) -> Ranking:
    """Ranks `count` (all where None) pairs of a lexicon split, drawn with `seed`.

    `tokenizer` is a `tokenizers.Tokenizer`.
    """
    pair = source, target
    task = word_translation.build_task(
        {pair: lexicons.lexicon(*pair, split)},
        text.LANGUAGES,
        examples={pair: lexicons.lexicon(*pair, "train")},
        count=count,
        seed=seed,
    )
    found = word_translation.score_task(model, tokenizer, task, draws=1, seed=seed)
    concept = concepts_of(source)
    return Ranking(
        [concept.get(item.word, item.word) for item in task.items],
        found.rank == 0,
        found.score,
    )


def bootstrap(
    values: np.ndarray, concepts: list[str], *, draws: int = 2000, seed: int = 0
) -> Interval:
    """The mean of `values` and its 95% percentile interval, resampling concepts."""
    _, of = np.unique(concepts, return_inverse=True)
    sums, sizes = np.bincount(of, values), np.bincount(of)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(np.mean(values)), float(low), float(high))


class Summary(NamedTuple):
    """Of one pair of languages or several together."""

    items: int
    first: Interval
    score: Interval


def summary(rankings: list[Ranking]) -> Summary:
    """Shares and Scores of all items, with their intervals by concept."""
    concepts = [concept for ranking in rankings for concept in ranking.concepts]
    first = np.concatenate([ranking.first for ranking in rankings])
    score = np.concatenate([ranking.score for ranking in rankings])
    return Summary(
        len(concepts), bootstrap(first, concepts), bootstrap(score, concepts)
    )


def neighbour_scripts(
    model: models.Model, tokenizer, *, frequent: int = 100, k: int = 20
) -> np.ndarray:
    """How many writing systems the `k` nearest embeddings of each word have.

    The words are the most frequent English lexicon words that are one token.
    """
    counts = Counter(
        word for verse in text.verses("train").text["eng"] for word in text.words(verse)
    )
    known = [
        w for w in concepts_of("eng") if tokenizer.token_to_id("▁" + w) is not None
    ]
    chosen = sorted(known, key=lambda word: (-counts[word], word))[:frequent]
    rows = np.array([tokenizer.token_to_id("▁" + word) for word in chosen])
    table = np.asarray(model.unembed_matrix, np.float32)
    near = kernels.nearest_neighbors(table[rows], table, k=k + 1).indices
    labels = np.array(
        writing_systems.writing_systems(
            [tokenizer.id_to_token(i) for i in range(len(table))]
        )
    )
    scripts = set(labels) - {"Common", "Bytes", "Special", "Unknown"}
    return np.array(
        [len(set(labels[own[own != row]]) & scripts) for own, row in zip(near, rows)]
    )


def held_out_losses(
    model: models.Model, tokenizer, *, verses_a_language: int | None = 100
) -> dict[str, Loss]:
    """Loss on evenly spaced held-out verses (None: all) of each language.

    A verse follows its language's name ("Basque: ..."), as in the verse pairs, for the
    model it is compared with knows the language too: that language's token frequencies
    in the training verses, with one added to the count of each token of the whole
    vocabulary; less added would make it a stronger rival.
    """
    training_verses, held_out = text.verses("train"), text.verses("held_out")
    recipe = training.Recipe(batch=16, length=documents.LONGEST)
    losses = {}
    for language in text.LANGUAGES:
        present = [verse for verse in training_verses.text[language] if verse]
        counts = np.ones(tokenizer.get_vocab_size())
        for coded in tokenizer.encode_batch([" " + verse for verse in present]):
            counts += np.bincount(coded.ids, minlength=len(counts))
        unigram = np.log(counts / counts.sum())
        present = [verse for verse in held_out.text[language] if verse]
        number = verses_a_language or len(present)
        spaced = np.linspace(0, len(present) - 1, number).astype(int)
        name = tokenizer.encode(text.LANGUAGES[language] + ":").ids
        coded = tokenizer.encode_batch([" " + present[i] for i in spaced])
        sequences = [c.ids[: documents.LONGEST - len(name)] for c in coded]
        named = [
            training.Document(
                name + sequence, [False] * len(name) + [True] * len(sequence)
            )
            for sequence in sequences
        ]
        with tempfile.TemporaryDirectory() as folder:
            file = training.write_tokens(
                f"{folder}/verses", named, vocabulary_size=len(counts)
            )
            found = training.evaluate(model, file, recipe)
        expected = float(-unigram[np.concatenate(sequences)].mean())
        losses[language] = Loss(found.loss, expected, found.targets)
    return losses
