"""Semantic pivots: tokens that keep company with a word and with its translation.

He et al., 2025, "Semantic Pivots", https://arxiv.org/abs/2505.16385, and its released
code. Of 2,000 documents with the word w, c_w(t) hold the token t; of 2,000 others,
c_bg(t) do:

    d_w(t) = c_w(t) - c_bg(t),   s(t) = min(d_source(t), d_target(t))

and the tokens of largest s are the pivots of the pair. Here the counts are of all
documents, so each is divided by the documents it is out of: d is a difference of
shares, the paper's d / 2,000 in expectation.

The paper then leaves out tokens "with no semantic relation" by a filter that was not
published. Ours are two thresholds, each of what relates the token to the less related
of the two words: `mutual_information`, which tells company from sheer frequency, and
`similarity` of embeddings.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from .cooccurrence import Counts, Pairs

_BLOCK = 32  # items whose counts are dense at a time, some GB of a large vocabulary


class Pivots(NamedTuple):
    """Tokens of each item, best first; equal scores go to the lower id.

    Behind an item's last pivot the token is -1 and the score NaN.
    """

    tokens: np.ndarray
    """`[item, k]` int64."""
    scores: np.ndarray
    """`[item, k]` float64: s(t), in (0, 1]."""

    def sets(self) -> list[list[int]]:
        """Every item's tokens, without the padding."""
        return [row[row >= 0].tolist() for row in self.tokens]


def excess(
    together: np.ndarray, words: np.ndarray, tokens: np.ndarray, documents: int
) -> np.ndarray:
    """d_w(t): by how much tokens are commoner beside a word than anywhere.

    Args:
      together: `[word, token]`, documents that hold both.
      words: `[word]`, documents that hold the word.
      tokens: `[token]`, documents that hold the token.
      documents: all of them.

    Returns:
      `[word, token]` float64 in (-1, 1]; NaN for a word that no document holds.

    Raises:
      ValueError: shapes that differ, or counts that no corpus has.
    """
    together, words, tokens = _checked(together, words, tokens, documents)
    with np.errstate(divide="ignore", invalid="ignore"):
        return together / words[:, None] - tokens / documents


def mutual_information(
    together: np.ndarray, words: np.ndarray, tokens: np.ndarray, documents: int
) -> np.ndarray:
    """Normalised pointwise mutual information of a word and tokens, over documents.

        log(P(w, t) / (P(w) P(t))) / -log P(w, t)

    Bouma, 2009, "Normalized (pointwise) mutual information in collocation extraction".
    Without the division, common tokens could not reach what rare ones do. Arguments and
    errors as in `excess`.

    Returns:
      `[word, token]` float64 in [-1, 1]: 1 for a token in the word's documents and no
      others, 0 for independence (and for two that are everywhere), -1 where no document
      holds both. NaN for a word that no document holds.
    """
    together, words, tokens = _checked(together, words, tokens, documents)
    joint = together / documents
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = joint * documents**2 / (words[:, None] * tokens.astype(np.float64))
        found = np.log(ratio) / -np.log(joint)
    found = np.where(together == 0, -1.0, np.where(together == documents, 0.0, found))
    return np.where(words[:, None] == 0, np.nan, found)


def _checked(together, words, tokens, documents):
    together, words, tokens = (np.asarray(x) for x in (together, words, tokens))
    if together.shape != (*words.shape, *tokens.shape) or together.ndim != 2:
        raise ValueError(
            f"`together` must be [word, token] = {(*words.shape, *tokens.shape)};"
            f" got {together.shape}."
        )
    if documents < 1:
        raise ValueError(f"`documents` must be at least 1; got {documents}.")
    if together.size and (
        (together < 0).any()
        or (together > words[:, None]).any()
        or (together > tokens).any()
        or max(words.max(), tokens.max()) > documents
    ):
        raise ValueError(
            "No corpus has these counts: documents with two things must be between 0"
            f" and those with either, and none can be above {documents}, all of them."
        )
    return together, words, tokens


def candidates(
    source: np.ndarray,
    target: np.ndarray,
    *,
    k: int,
    excluded: Sequence[Collection[int]] | None = None,
) -> Pivots:
    """The `k` tokens of largest s(t) = min(d_source, d_target), where it is above 0.

    A token that is no commoner beside one of the words than anywhere bridges nothing,
    so an item may have fewer than `k`.

    Args:
      source: `[item, token]`, `excess` of each item's source word.
      target: the same of its target word.
      k: how many; the paper looks at 50 and at 100.
      excluded: of each item, tokens that are no pivots: those of its own two words.

    Raises:
      ValueError: shapes that differ, or `k` below 1.
    """
    source, target = np.asarray(source), np.asarray(target)
    if source.shape != target.shape or source.ndim != 2:
        raise ValueError(
            "`source` and `target` must be [item, token], of one shape; got"
            f" {source.shape} and {target.shape}."
        )
    if k < 1:
        raise ValueError(f"`k` must be at least 1; got {k}.")
    if excluded is not None and len(excluded) != len(source):
        raise ValueError(
            f"`excluded` must have an entry for each of {len(source)} items; got"
            f" {len(excluded)}."
        )
    shared = np.minimum(source, target)
    shared = np.where(shared > 0, shared, 0.0)  # NaN is not
    for row, own in enumerate(excluded or ()):
        shared[row, sorted(own)] = 0.0
    k = min(k, shared.shape[1])
    order = np.argsort(-shared, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(shared, order, 1)
    return Pivots(np.where(scores > 0, order, -1), np.where(scores > 0, scores, np.nan))


class Found(NamedTuple):
    """The candidates of each item, and what speaks for them.

    `association` `[item, k]` is the mutual information with the less related word,
    `together` `[item, k]` how many documents hold the pivot and the word that it is
    rarer beside, `documents` `[item, 2]` how many hold the source and the target word.
    """

    pivots: Pivots
    association: np.ndarray
    together: np.ndarray
    documents: np.ndarray


def find(
    counts: Counts,
    sources: Sequence[int],
    targets: Sequence[int],
    *,
    k: int = 100,
    excluded: Sequence[Collection[int]] | None = None,
) -> Found:
    """The candidates of word pairs from the counts of a corpus.

    Args:
      counts: by a `Plan` with `term_tokens`.
      sources, targets: the terms of each item, as indices.
      k, excluded: as in `candidates`.

    Raises:
      ValueError: counts without `term_tokens`; as `candidates`.
    """
    pairs, held = counts.term_tokens, counts.term_documents
    tokens_held = counts.token_documents
    if pairs is None or held is None or tokens_held is None:
        raise ValueError("`counts` must be by a Plan with term_tokens=True.")
    sides = np.array([sources, targets], np.int64).T
    blocks = []
    for start in range(0, len(sides), _BLOCK):
        chosen = sides[start : start + _BLOCK]
        terms, of = np.unique(chosen, return_inverse=True)
        of = of.reshape(chosen.shape).T
        together = _rows(pairs, terms, len(tokens_held))
        arguments = together, held[terms], tokens_held, counts.documents
        own = None if excluded is None else excluded[start : start + _BLOCK]
        shares = excess(*arguments)
        listed = candidates(shares[of[0]], shares[of[1]], k=k, excluded=own)
        relations = [
            weaker(table[of[0]], table[of[1]], listed)
            for table in (mutual_information(*arguments), together)
        ]
        blocks.append((*listed, *relations))
    tokens, scores, association, rarer = map(np.concatenate, zip(*blocks))
    return Found(Pivots(tokens, scores), association, rarer, held[sides])


def company(found: Found, kept: Pivots) -> np.ndarray:
    """How much company the pivots of each item keep with both words, `[item]` float64.

    The sum over the pivots t that are left in `kept` of ln min(n(source, t), n(target,
    t)), documents of both: the second variable of the linear fit of the Score in the
    paper's code (`predictions.fit`). 0 without pivots.
    """
    sums = np.zeros(len(found.pivots.tokens))
    for row, own in enumerate(kept.sets()):
        chosen = np.isin(found.pivots.tokens[row], own)
        sums[row] = np.log(found.together[row, chosen]).sum()
    return sums


def _rows(pairs: Pairs, terms: np.ndarray, size: int) -> np.ndarray:
    """`[term, token]`: documents that hold both, of these terms alone."""
    table = np.zeros((len(terms), size), np.int64)
    for row, term in enumerate(terms):
        own = slice(*np.searchsorted(pairs.first, [term, term + 1]))
        table[row, pairs.second[own]] = pairs.count[own]
    return table


def weaker(source: np.ndarray, target: np.ndarray, pivots: Pivots) -> np.ndarray:
    """What relates each pivot to the less related of its two words, `[item, k]`.

    `source` and `target` are `[item, token]`, such as `mutual_information`; NaN behind
    an item's last pivot.
    """
    at = np.maximum(pivots.tokens, 0)
    sides = [np.take_along_axis(np.asarray(side), at, 1) for side in (source, target)]
    return np.where(pivots.tokens >= 0, np.minimum(*sides), np.nan)


def similarity(
    embedding: np.ndarray,
    pivots: Pivots,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> np.ndarray:
    """Cosine of each pivot with the less similar of its two words, `[item, k]`.

    A word's vector is the mean of its tokens'. NaN behind an item's last pivot.

    Args:
      embedding: `[vocab, d]`.
      pivots: of items.
      sources, targets: tokens of each item's two words.

    Raises:
      ValueError: a word without a token, or lists of another length than the items.
    """
    sides = []
    for name, words in (("sources", sources), ("targets", targets)):
        if len(words) != len(pivots.tokens):
            raise ValueError(
                f"`{name}` must have an entry for each of {len(pivots.tokens)} items;"
                f" got {len(words)}."
            )
        if not all(len(word) for word in words):
            raise ValueError(f"Every word of `{name}` must have a token.")
        sides.append(
            [np.asarray(embedding[list(w)], np.float64).mean(0) for w in words]
        )
    found = np.full(pivots.tokens.shape, np.nan)
    for row, (tokens, *words) in enumerate(zip(pivots.tokens, *sides)):
        own = tokens[tokens >= 0]
        vectors = _unit(np.asarray(embedding[own], np.float64))
        found[row, : len(own)] = (vectors @ _unit(np.stack(words)).T).min(1)
    return found


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def keep(pivots: Pivots, relation: np.ndarray, minimum: float) -> Pivots:
    """The pivots whose `relation` `[item, k]` is at least `minimum`, in order."""
    kept = (pivots.tokens >= 0) & (np.asarray(relation) >= minimum)
    order = np.argsort(~kept, axis=1, kind="stable")
    kept = np.take_along_axis(kept, order, 1)
    tokens = np.take_along_axis(pivots.tokens, order, 1)
    scores = np.take_along_axis(pivots.scores, order, 1)
    return Pivots(np.where(kept, tokens, -1), np.where(kept, scores, np.nan))


class Agreement(NamedTuple):
    """How found pivots agree with true ones, over the items that have any.

    `precision` and `recall` are of all pivots together (micro averages); `first` is the
    share of items whose best pivot is a true one; `items_found` the share with one at
    all.
    """

    precision: float
    recall: float
    first: float
    items_found: float


def agreement(pivots: Pivots, truth: Sequence[Collection[int]]) -> Agreement:
    """Precision and recall where the true pivots of each item are known.

    Raises:
      ValueError: no item has a true pivot.
    """
    found = pivots.sets()
    if len(found) != len(truth) or not any(truth):
        raise ValueError(
            f"`truth` must have an entry for each of {len(found)} items, and a pivot."
        )
    judged = [(own, set(true)) for own, true in zip(found, truth) if true]
    right = [len(true.intersection(own)) for own, true in judged]
    listed = sum(len(own) for own, _ in judged)
    return Agreement(
        sum(right) / listed if listed else float("nan"),
        sum(right) / sum(len(true) for _, true in judged),
        float(np.mean([bool(own) and own[0] in true for own, true in judged])),
        float(np.mean([count > 0 for count in right])),
    )
