"""How good a demo model is: words it never met in a prompt, verses it never read.

Words: the word-translation task of He et al. (arXiv 2505.16385), five shots of training
concepts. With P(y | w) = exp(mean log-probability of the tokens of y after the prompt
for w), a held-out pair (w, y) is ranked first when P(y | w) is above P(y | w') of nine
other held-out source words w', and its Score is P(y | w) minus their mean. Chance is
0.1 and 0. Resampling is by concept, as pairs of different languages share words.
"""

from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxling import kernels, models, writing_systems

from . import documents, lexicons, text

SHOTS, DISTRACTORS = 5, 9
ORDERED_PAIRS = [
    *(("eng", language) for language in list(text.LANGUAGES)[1:]),
    *((language, "eng") for language in list(text.LANGUAGES)[1:]),
    ("lav", "ukr"),
    ("cop", "syc"),
]
_BATCH = 40
_HIDDEN = "ln_final.hook_normalized"


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


@jax.jit
def _hidden_states(model: models.Model, tokens):
    _, cache = model.run_with_cache(tokens, names_filter=(_HIDDEN,))
    return cache[_HIDDEN]


@jax.jit
def _picked(model: models.Model, hidden, targets):
    logits = model.unembed(hidden)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)


def mean_log_probabilities(
    model: models.Model, sequences: list[list[int]], starts: list[int]
) -> np.ndarray:
    """Mean log-probability of each sequence's tokens from its start on, in nats.

    Logits are made at those positions alone. Lengths are padded to multiples of 32 and
    rows to full batches, so that few programs are compiled.
    """
    results = np.zeros(len(sequences))
    order = np.argsort([len(sequence) for sequence in sequences], kind="stable")
    for begin in range(0, len(order), _BATCH):
        batch = order[begin : begin + _BATCH]
        longest = -(-max(len(sequences[i]) for i in batch) // 32) * 32
        tokens = np.zeros((_BATCH, longest), np.int32)
        for row, i in enumerate(batch):
            tokens[row, : len(sequences[i])] = sequences[i]
        where = [
            (row, position)
            for row, i in enumerate(batch)
            for position in range(starts[i], len(sequences[i]))
        ]
        rows, columns = np.array(where).T
        hidden = _hidden_states(model, tokens)
        padding = -len(rows) % 256
        hidden = hidden[np.pad(rows, (0, padding)), np.pad(columns - 1, (0, padding))]
        targets = np.pad(tokens[rows, columns], (0, padding))
        values = np.asarray(_picked(model, hidden, targets))[: len(rows)]
        sums = np.bincount(rows, values, minlength=_BATCH)
        results[batch] = (sums / np.maximum(np.bincount(rows, minlength=_BATCH), 1))[
            : len(batch)
        ]
    return results


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

    `tokenizer` is a `tokenizers.Tokenizer`. Distractors are sources of other concepts.
    """
    rng = np.random.default_rng(seed)
    pairs = lexicons.lexicon(source, target, split)
    known = lexicons.lexicon(source, target, "train")
    concept = concepts_of(source)
    of = [concept.get(pair[0], pair[0]) for pair in pairs]
    chosen = rng.permutation(len(pairs))[:count]
    sequences, starts = [], []
    for item in chosen:
        shots = [known[i] for i in rng.permutation(len(known))[:SHOTS]]
        others = [i for i in rng.permutation(len(pairs)) if of[i] != of[item]]
        answer = tokenizer.encode(" " + pairs[item][1]).ids
        for i in [item, *others[:DISTRACTORS]]:
            prompt = documents.word_prompt(source, target, shots, pairs[i][0])
            tokens = tokenizer.encode(prompt).ids
            sequences.append(tokens + answer)
            starts.append(len(tokens))
    log_probabilities = mean_log_probabilities(model, sequences, starts)
    table = np.exp(log_probabilities.reshape(len(chosen), 1 + DISTRACTORS))
    return Ranking(
        [of[item] for item in chosen],
        table[:, 0] > table[:, 1:].max(1),
        table[:, 0] - table[:, 1:].mean(1),
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

    A verse is a document.

    The unigram model is that language's token frequencies in the training verses,
    with one added to every token's count.
    """
    training, held_out = text.verses("train"), text.verses("held_out")
    losses = {}
    for language in text.LANGUAGES:
        seen = tokenizer.encode_batch([" " + v for v in training.text[language] if v])
        counts = np.ones(tokenizer.get_vocab_size())
        for coded in seen:
            counts += np.bincount(coded.ids, minlength=len(counts))
        unigram = np.log(counts / counts.sum())
        present = [verse for verse in held_out.text[language] if verse]
        number = verses_a_language or len(present)
        spaced = np.linspace(0, len(present) - 1, number).astype(int)
        coded = tokenizer.encode_batch([" " + present[i] for i in spaced])
        sequences = [c.ids[: documents.LONGEST] for c in coded if len(c.ids) > 1]
        sizes = np.array([len(sequence) - 1 for sequence in sequences])
        found = mean_log_probabilities(model, sequences, [1] * len(sequences))
        predicted = np.concatenate([sequence[1:] for sequence in sequences])
        losses[language] = Loss(
            float(-(found * sizes).sum() / sizes.sum()),
            float(-unigram[predicted].mean()),
            int(sizes.sum()),
        )
    return losses
