"""Initial embeddings from which verses hold which tokens (latent semantic analysis).

All languages' tokens of a verse share its column, so a word and its translations start
out near each other: most of the demo model's cross-lingual structure is put in here.
Language and frequency, in columns of their own, weigh less than meaning, so that the
neighbours of a frequent word are of several scripts by whole rows too.

S. Deerwester et al., "Indexing by Latent Semantic Analysis", JASIS 41 (1990).
"""

import numpy as np

from . import text

_LANGUAGE_WIDTH = 31
# Lengths of the three blocks of columns in a row, chosen so that neighbours by cosine
# follow meaning; and the gains with which the last norm reads them at `_GAINS_WIDTH`,
# near those that gradient descent on the three found for the first predictions of
# training documents.
_WEIGHTS = (1.8, 0.8, 1.0)
_GAINS = (0.25, 0.85, 0.7)
_GAINS_WIDTH = 192


def _singular(matrix: np.ndarray, rank: int, rng: np.random.Generator):
    """Leading left singular vectors times the square roots of the singular values."""
    # Randomised range finder with three power steps: Halko et al., arXiv 0909.4061.
    basis = matrix @ rng.standard_normal((matrix.shape[1], rank + 32), np.float32)
    for _ in range(3):
        basis = np.linalg.qr(basis)[0]
        basis = matrix @ (matrix.T @ basis)
    basis = np.linalg.qr(basis)[0]
    left, values, _ = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left[:, :rank]) * np.sqrt(values[:rank])


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def initial_embedding(
    tokenizer, verses: text.Verses, width: int, rng: np.random.Generator
) -> np.ndarray:
    """`[vocab, width]` float32 for a model whose input and output matrix is one.

    All but 32 columns hold verse statistics (tf-idf, unit rows, truncated SVD), 31 the
    languages that a token occurs in, and one its log frequency, which lets the bias
    that the architecture lacks be expressed.
    """
    size = tokenizer.get_vocab_size()
    languages = list(verses.text)
    counts = np.zeros((size, len(verses.names)), np.float32)
    share = np.zeros((size, len(languages)), np.float32)
    for number, column in enumerate(verses.text.values()):
        for row, coded in enumerate(tokenizer.encode_batch([" " + v for v in column])):
            tokens, times = np.unique(coded.ids, return_counts=True)
            counts[tokens.astype(int), row] += times
            share[tokens.astype(int), number] += times
    total = share.sum(1)
    for number, language in enumerate(languages):
        for name in (text.LANGUAGES[language], "▁" + text.LANGUAGES[language]):
            share[tokenizer.token_to_id(name)] = np.eye(len(languages))[number]
    rarity = np.log(len(verses.names) / np.maximum((counts > 0).sum(1), 1))
    weighted = _unit(np.log1p(counts) * rarity[:, None])
    meaning = _unit(_singular(weighted, width - _LANGUAGE_WIDTH - 1, rng))
    spread = rng.standard_normal((len(languages), _LANGUAGE_WIDTH), np.float32)
    origin = _unit(_unit(share) @ spread)
    rows = np.concatenate([_WEIGHTS[0] * meaning, _WEIGHTS[1] * origin], 1)
    empty = total == 0
    rows[empty] += 0.6 * _unit(
        rng.standard_normal((empty.sum(), rows.shape[1]), np.float32)
    )
    frequency = np.log(total + 1)[:, None] / np.log(total.max() + 1)
    return np.concatenate([rows, _WEIGHTS[2] * frequency], 1).astype(np.float32)


def output_gain(width: int) -> np.ndarray:
    """`[width]` gains of the last norm that suit `initial_embedding`.

    The norm makes rows as long as the root of their width; logits are to be as large
    at every width.
    """
    sizes = (width - _LANGUAGE_WIDTH - 1, _LANGUAGE_WIDTH, 1)
    gains = np.repeat(_GAINS, sizes) * np.sqrt(_GAINS_WIDTH / width)
    return gains.astype(np.float32)
