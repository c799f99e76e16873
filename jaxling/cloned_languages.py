"""A language and its clone: every token's true translation is known exactly.

Token id t of the language has the clone t + V, so that neighbours, maps between spaces,
layers and lenses of a model trained on both can be checked against the truth.
Schäfer et al., "The Role of Language Imbalance in Cross-lingual Generalisation", 2024,
https://arxiv.org/abs/2404.07982.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxling import kernels
from jaxling.kernels import numerics
from jaxling.models import Model
from jaxling.training import Document

# Shared by both languages.
PAD, END, UNKNOWN, EQUALS = range(4)
SPECIAL = 4


class Agreement(NamedTuple):
    """How far a model treats a language and its clone alike; chance is near 0 in all.

    Shares are of tokens or positions; layers run from the first block's output to the
    last one's.
    """

    neighbours: float  # words whose nearest embedding in the clone is their clone
    mapped: float  # the same after an orthogonal map fitted on other words
    cosine: np.ndarray  # [layer] of clones in the same place, less that of other words
    retrieved: np.ndarray  # [layer] positions whose nearest state is their clone's
    translated: np.ndarray  # [layer] lens: the top token is the translation
    copied: np.ndarray  # [layer] lens: the top token is the word that is translated


def number_words(sentences: Sequence[Sequence[str]], size: int) -> list[list[int]]:
    """Token ids: the `size` commonest words from `SPECIAL` up, others `UNKNOWN`."""
    counts = Counter(word for sentence in sentences for word in sentence)
    commonest = sorted(counts, key=lambda word: (-counts[word], word))[:size]
    number = {word: SPECIAL + rank for rank, word in enumerate(commonest)}
    return [[number.get(word, UNKNOWN) for word in words] for words in sentences]


def clone(tokens: Sequence[int], size: int, number: int = 1) -> list[int]:
    """The same sentence in clone `number`; special tokens are their own clones."""
    return [token + number * size if token >= SPECIAL else token for token in tokens]


def documents(
    sentences: Sequence[Sequence[int]],
    size: int,
    *,
    clone_share: float,
    parallel_share: float,
    seed: int,
) -> Iterator[Document]:
    """Draws documents without end: sentences of either language, and translations.

    Args:
      sentences: of the language, from `number_words`.
      size: words of the language.
      clone_share: of the documents in one language, how many are in the clone.
      parallel_share: of all documents, how many are a sentence, `EQUALS`, and the same
        in the other language; one direction is as likely as the other.
      seed: decides everything.
    """
    rng = np.random.default_rng(seed)
    while True:
        original = list(sentences[int(rng.integers(len(sentences)))])
        cloned = clone(original, size)
        if rng.random() < parallel_share:
            first, second = (
                (original, cloned) if rng.integers(2) else (cloned, original)
            )
            yield Document([*first, EQUALS, *second, END])
        else:
            chosen = cloned if rng.random() < clone_share else original
            yield Document([*chosen, END])


def bridged_documents(
    sentences: Sequence[Sequence[int]],
    size: int,
    *,
    bridges: int,
    parallel_share: float,
    seed: int,
) -> Iterator[Document]:
    """Draws documents without end in which a language and its clone never meet.

    Clones 2 to `bridges + 1` are bridges: each is in documents together with the
    language, and in others together with its clone. Whatever relates a word t to its
    clone t + size in such a corpus goes by way of a bridge, and the word's own clones
    there, t + 2 size and so on, are the true pivots of the pair. The words beside it in
    its sentences come along, as they do in real text.

    Args:
      sentences: of the language, from `number_words`.
      size: words of the language; the vocabulary has `SPECIAL` + (2 + `bridges`) size.
      bridges: bridging languages, at least 1.
      parallel_share: of all documents, how many are a sentence, `EQUALS`, and the same
        in another language; the others are a sentence in one.
      seed: decides everything.
    """
    rng = np.random.default_rng(seed)
    while True:
        sentence = sentences[int(rng.integers(len(sentences)))]
        outer, bridge = rng.integers(2), 2 + rng.integers(bridges)
        sides = [clone(sentence, size, int(number)) for number in (outer, bridge)]
        if rng.integers(2):
            sides.reverse()
        if rng.random() < parallel_share:
            yield Document([*sides[0], EQUALS, *sides[1], END])
        else:
            yield Document([*sides[0], END])


def config(vocabulary: int, *, longest: int, width: int = 64, layers: int = 4) -> dict:
    """The `config.json` of a tiny Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 16,
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "eos_token_id": END,
    }


@jax.jit
def _residuals(model: Model, tokens):
    _, cache = model.run_with_cache(tokens, names_filter=("resid_post",))
    return cache["resid_post"]


def agreement(
    model: Model, sentences: Sequence[Sequence[int]], size: int, *, seed: int = 0
) -> Agreement:
    """Measures a trained model on sentences that it has not read.

    Half of the words fit the orthogonal map, the other half are looked up through it.
    Positions of unknown words are left out.

    Raises:
      ValueError: no sentence has a known word.
    """
    if not any(token > EQUALS for sentence in sentences for token in sentence):
        raise ValueError("`sentences` must have a known word; they have none.")
    rng = np.random.default_rng(seed)
    table = jnp.asarray(model.unembed_matrix, jnp.float32)
    own, other = table[SPECIAL : SPECIAL + size], table[SPECIAL + size :][:size]
    words = np.arange(size)
    order = rng.permutation(size)
    fitted, tested = order[: size // 2], order[size // 2 :]
    turn = kernels.procrustes(numerics.unit(own[fitted]), numerics.unit(other[fitted]))

    def found(queries, expected):
        nearest = kernels.nearest_neighbors(queries, other, k=1).indices[:, 0]
        return float(np.mean(np.asarray(nearest) == expected))

    longest = max(len(sentence) for sentence in sentences)
    tokens = np.zeros((2, len(sentences), longest), np.int32)
    pairs = np.zeros((2, len(sentences), 2 * longest + 1), np.int32)
    places = []
    for row, sentence in enumerate(sentences):
        sides = list(sentence), clone(sentence, size)
        for side in range(2):
            tokens[side, row, : len(sentence)] = sides[side]
            both = [*sides[side], EQUALS, *sides[1 - side]]
            pairs[side, row, : len(both)] = both
        places += [
            (row, i, len(sentence)) for i, t in enumerate(sentence) if t > EQUALS
        ]
    rows, columns, lengths = np.array(places).T

    own_states, other_states = (
        _residuals(model, side)[:, rows, columns] for side in tokens
    )
    cosine, retrieved = _alike(own_states, other_states, tokens[0][rows, columns])

    asked = columns + lengths  # predicts the translation of the word at `columns`
    hidden = jnp.concatenate([_residuals(model, p)[:, rows, asked] for p in pairs], 1)
    translation = np.concatenate([p[rows, asked + 1] for p in pairs])
    source = np.concatenate([p[rows, columns] for p in pairs])
    lens = kernels.project_layers(
        hidden, model.unembed_matrix, transform=model.final_norm, k=1
    )
    top = np.asarray(lens.top_tokens)[..., 0]
    return Agreement(
        found(own, words),
        found(own[tested] @ turn, tested),
        cosine,
        retrieved,
        (top == translation).mean(1),
        (top == source).mean(1),
    )


def _alike(own, other, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By layer: cosine of clones less that of other words, and clones retrieved."""
    cosines, shares = [], []
    different = words[:, None] != words[None]
    for left, right in zip(own, other):
        table = np.asarray(numerics.unit(left) @ numerics.unit(right).T)
        cosines.append(table.diagonal().mean() - table[different].mean())
        shares.append((table.argmax(1) == np.arange(len(words))).mean())
    return np.array(cosines), np.array(shares)
