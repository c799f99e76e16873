"""Translation by retrieval: words, sentences, and which languages lie close together.

Spaces are rows of vectors, `source [n, d]` and `target [m, d]`, already mapped into
one space where a map is needed (`jaxling.kernels.procrustes`). Row numbers stand for
words or sentences.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.cluster.hierarchy

from jaxling import kernels

METHODS = ("nearest", "csls", "inverted_softmax", "margin_ratio")
MAPS = ("none", "procrustes", "ridge", "rcsls_spectral")
_ROUNDING = 8 * np.finfo(np.float32).eps  # of a mean of float32 cosines


def word_vectors(
    tokenizer: Any, matrix: np.ndarray, words: Sequence[str]
) -> np.ndarray:
    """Mean of the input embeddings of each word's tokens, `[words, d]` float32.

    Args:
      tokenizer: one of transformers; words are encoded behind a space, without special
        tokens. Unknown tokens, and those beyond the matrix, do not count; a word that
        has no others has a zero vector.
      matrix: `[vocab, d]` embeddings.
      words: any strings.

    Raises:
      ValueError: the embedding of a word's token is not finite.
    """
    encoded = tokenizer([" " + word for word in words], add_special_tokens=False)
    unknown = getattr(tokenizer, "unk_token_id", None)
    vectors = np.zeros((len(words), matrix.shape[1]), np.float32)
    for row, ids in enumerate(encoded["input_ids"]):
        ids = [token for token in ids if token != unknown and token < len(matrix)]
        if ids:
            vectors[row] = np.asarray(matrix[ids], np.float32).mean(0)
        if not np.isfinite(vectors[row]).all():
            raise ValueError(
                f"The embeddings of tokens must be finite; of those of {words[row]!r},"
                f" {ids}, one is not."
            )
    return vectors


def aligned(vectors: np.ndarray) -> np.ndarray:
    """Rows at length one, then centred, then at length one again, float32.

    The preprocessing of Artetxe et al., 2018, https://aclanthology.org/P18-1073. Zero
    rows, words without a vector, stay zero and do not move the mean.
    """
    rows = _unit(vectors)
    there = np.any(rows != 0, axis=1, keepdims=True)
    mean = rows.sum(0) / max(there.sum(), 1)
    return _unit((rows - mean) * there)


def fit_map(kind: str, source: np.ndarray, target: np.ndarray, pairs: np.ndarray):
    """A linear map `[d, e]` from one space to another, fitted on word pairs.

    Args:
      kind: one of `MAPS`; "none" is the identity, "ridge" has a penalty of 1,
        "rcsls_spectral" is RCSLS within the spectral ball (the default of fastText's
        script is without).
      source, target: `[n, d]`, `[m, e]`, with rows of length one.
      pairs: `[p, 2]` rows of source and target that translate each other.

    Raises:
      ValueError: an unknown kind.
    """
    x, y = source[pairs[:, 0]], target[pairs[:, 1]]
    if kind == "none":
        return np.eye(source.shape[1], target.shape[1], dtype=np.float32)
    if kind == "procrustes":
        return np.asarray(kernels.procrustes(x, y))
    if kind == "ridge":
        return np.asarray(kernels.ridge_map(x, y, l2=1.0))
    if kind == "rcsls_spectral":
        k = min(10, len(source), len(target))
        return np.asarray(kernels.rcsls(x, y, source, target, k=k, spectral=True).map)
    raise ValueError(f"`kind` must be one of {MAPS}; got {kind!r}.")


class Translations(NamedTuple):
    """The best targets of each source row, as numbers on the host."""

    scores: np.ndarray
    indices: np.ndarray


def translate(
    source: np.ndarray,
    target: np.ndarray,
    *,
    k: int = 10,
    method: str = "csls",
    neighborhood: int = 10,
    inverse_temperature: float = 30.0,
) -> Translations:
    """The k best targets of every source row.

    - `nearest`: by cosine.
    - `csls`: `2 cos - r - r`, Conneau et al., 2018, https://arxiv.org/abs/1710.04087.
    - `inverted_softmax`: `exp(b cos(x, y)) / sum_x' exp(b cos(x', y))` as its log, with
      b the inverse temperature; Smith et al., 2017, https://arxiv.org/abs/1702.03859.
    - `margin_ratio`: `cos / ((r_x + r_y) / 2)` over the `neighborhood` nearest targets
      of each source row (at least k), as it is used for mining; Artetxe & Schwenk,
      2019, https://arxiv.org/abs/1811.01136, eq. 3. A ratio to a number that is not
      positive, or is within rounding of zero (1e-6), would turn the order around:
      such a pair is no candidate, and its slot is empty.

    Args:
      source: `[n, d]`, any float dtype; scored in float32.
      target: `[m, d]`.
      k: how many targets.
      method: one of `METHODS`.
      neighborhood: rows that the corrections average over.
      inverse_temperature: of the inverted softmax.

    Returns:
      Scores and indices `[n, k]`, best first; -1 and NaN at empty slots: beyond the
      last target, and in the rows of zero vectors, which are nobody's translation
      either.

    Raises:
      ValueError: an unknown method, a side without rows, or of another width.
    """
    left, right = np.shape(source), np.shape(target)
    if len(left) != 2 or len(right) != 2 or left[1] != right[1] or 0 in left + right:
        raise ValueError(
            "`source` and `target` must be rows of one width, [n, d] and [m, d], not"
            f" empty; got shapes {left} and {right}."
        )
    n = len(source)
    x, y = _padded(source), _padded(target)
    if method == "nearest":
        found = kernels.nearest_neighbors(x, y, k=k)
    elif method == "csls":
        found = kernels.csls_neighbors(x, y, k=k, neighborhood=neighborhood)
    elif method == "inverted_softmax":
        found = _inverted_softmax(x, y, k, inverse_temperature)
    elif method == "margin_ratio":
        found = kernels.nearest_neighbors(x, y, k=max(k, neighborhood))
        found = _by_margin(found, x, y, neighborhood)
    else:
        raise ValueError(f"`method` must be one of {METHODS}; got {method!r}.")
    return Translations(
        np.asarray(found.scores)[:n, :k], np.asarray(found.indices)[:n, :k]
    )


def _padded(rows: np.ndarray) -> np.ndarray:
    """Filled up with NaN rows, nobody's neighbours, so that few shapes are compiled."""
    rows = np.asarray(rows, np.float32)
    return np.pad(rows, ((0, -len(rows) % 512), (0, 0)), constant_values=np.nan)


def _unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(kernels.numerics.unit(jnp.asarray(x)))


def _valid(rows: np.ndarray) -> np.ndarray:
    """Zero rows, which have no cosine, as NaN: no inner product makes them anyone's."""
    return np.where(np.any(rows != 0, axis=1, keepdims=True), rows, np.nan)


def _inverted_softmax(source, target, k, inverse_temperature):
    """One inner product: the normaliser of each target is one more column."""
    x, y = (_valid(_unit(side)) for side in (source, target))
    # Rows that are nobody's take part with a weight of exp(-10000), which is 0.
    nobody = np.where(np.isnan(x[:, :1]), np.float32(-1e4), np.float32(0))
    scores = kernels.reduce_scores(
        np.pad(
            inverse_temperature * np.nan_to_num(y), ((0, 0), (0, 1)), constant_values=1
        ),
        np.concatenate([np.nan_to_num(x), nobody], 1),
        (kernels.log_sum_exp(),),
    )
    normaliser = np.asarray(scores[0], np.float32)[:, None]
    left = np.concatenate([inverse_temperature * x, -np.ones_like(x[:, :1])], 1)
    return kernels.nearest_neighbors(
        left, np.concatenate([y, normaliser], 1), k=k, metric="dot"
    )


def _by_margin(found, source, target, neighborhood) -> Translations:
    """Orders each row's nearest targets by the ratio margin."""
    scores, indices = np.array(found.scores), np.asarray(found.indices)
    nearest = min(neighborhood, scores.shape[1])
    own = _mean(scores[:, :nearest])
    back = kernels.nearest_neighbors(
        target, source, k=min(neighborhood, len(np.asarray(source)))
    )
    theirs = _mean(np.asarray(back.scores))
    near = (own[:, None] + theirs[indices]) / 2
    candidate = (indices >= 0) & (near > _ROUNDING)
    scores = np.where(candidate, scores / np.where(candidate, near, 1), -np.inf)
    indices = np.where(candidate, indices, -1)
    order = np.lexsort((indices, -scores), axis=-1)
    scores = np.take_along_axis(scores, order, 1)
    scores[~np.isfinite(scores)] = np.nan
    return Translations(scores, np.take_along_axis(indices, order, 1))


def _mean(scores: np.ndarray) -> np.ndarray:
    """Of the slots that are not empty; NaN where all are."""
    there = ~np.isnan(scores)
    sums = np.where(there, scores, 0).sum(1)
    return np.where(there.any(1), sums / np.maximum(there.sum(1), 1), np.nan)


class Induction(NamedTuple):
    """How well retrieved translations agree with a dictionary.

    `precision_at` is the share of source words with a gold translation among the first
    1, 5, 10, ... retrieved; `mrr` the mean reciprocal rank of the first gold one (0
    where none was retrieved); `coverage` the share of the dictionary's source words
    that could be asked for; `words` how many were.
    """

    precision_at: dict[int, float]
    mrr: float
    coverage: float
    words: int


def evaluate_induction(
    retrieved: np.ndarray,
    rows: Sequence[int],
    gold: Mapping[int, AbstractSet[int]],
    *,
    entries: int | None = None,
    at: Sequence[int] = (1, 5, 10),
) -> Induction:
    """Bilingual lexicon induction: P@k, MRR and coverage.

    Args:
      retrieved: `[len(rows), k]` target rows, best first, -1 where empty.
      rows: the source row that each list belongs to.
      gold: the correct target rows of each source row.
      entries: source words of the whole dictionary; by default those in `gold`.
      at: the k of P@k, each at most the width of `retrieved`.

    Raises:
      ValueError: an entry of `at` exceeds the lists; no row has a gold translation.
    """
    retrieved = np.asarray(retrieved)
    if max(at) > retrieved.shape[1] or min(at) < 1:
        raise ValueError(
            f"`at` must be within [1, {retrieved.shape[1]}], the lists' length;"
            f" got {tuple(at)}."
        )
    asked = [i for i, row in enumerate(rows) if gold.get(row)]
    if not asked:
        raise ValueError("No source row has a gold translation: nothing to evaluate.")
    ranks = np.full(len(asked), np.inf)
    for position, i in enumerate(asked):
        hit = np.isin(retrieved[i], list(gold[rows[i]]))
        if hit.any():
            ranks[position] = 1 + int(hit.argmax())
    return Induction(
        {k: float(np.mean(ranks <= k)) for k in at},
        float(np.mean(1 / ranks)),
        len(asked) / (entries or len(gold)),
        len(asked),
    )


class Bitext(NamedTuple):
    """Mined sentence pairs `[p, 2]` (source row, target row), best margin first."""

    pairs: np.ndarray
    margins: np.ndarray


def mine_bitext(source: np.ndarray, target: np.ndarray, *, k: int = 4) -> Bitext:
    """Pairs that are each other's best candidate by ratio margin.

    A pair is kept when it is the best of both directions, decided on indices (two
    directions round the same score differently, so comparing scores would lose pairs).
    Artetxe & Schwenk, 2019, https://arxiv.org/abs/1811.01136, with the k = 4 of Jones
    et al., 2021, https://arxiv.org/abs/2109.06324.

    Args:
      source: `[n, d]`.
      target: `[m, d]`.
      k: neighbours that the margin averages over.

    Returns:
      The pairs, each row at most once; none where no margin is defined (`translate`).

    Raises:
      ValueError: a side without rows, sides of different width, or `k` below 1.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1; got {k}.")
    forward = translate(source, target, k=1, method="margin_ratio", neighborhood=k)
    backward = translate(target, source, k=1, method="margin_ratio", neighborhood=k)
    there = forward.indices[:, 0]
    home = backward.indices[:, 0]
    rows = np.flatnonzero(there >= 0)
    rows = rows[home[there[rows]] == rows]
    margins = forward.scores[rows, 0]
    order = np.argsort(-margins, kind="stable")
    pairs = np.stack([rows, there[rows]], 1)
    return Bitext(pairs[order], margins[order])


def pair_f1(pairs: np.ndarray, gold: np.ndarray) -> float:
    """F1 of mined pairs `[p, 2]` against gold pairs `[g, 2]`; 0 where neither has any.

    2 * correct / (mined + gold), each pair counted once.
    """
    mined = {tuple(pair) for pair in np.asarray(pairs).reshape(-1, 2).tolist()}
    true = {tuple(pair) for pair in np.asarray(gold).reshape(-1, 2).tolist()}
    return 2 * len(mined & true) / max(len(mined) + len(true), 1)


def language_centroids(vectors: np.ndarray, languages: Sequence[str]) -> np.ndarray:
    """Mean vector of each language `[g, d]`, languages in alphabetical order.

    Fan et al., 2021 (representation sprachbund), https://arxiv.org/abs/2109.00271.

    Args:
      vectors: `[n, d]`.
      languages: the language of each.

    Returns:
      `[g, d]`, of the dtype of `vectors`.

    Raises:
      ValueError: no row, or not one language for each.
    """
    if len(vectors) != len(languages) or not len(languages):
        raise ValueError(
            "`languages` must name one for each row of `vectors`, of which there must"
            f" be some; got {len(languages)} for {len(vectors)} rows."
        )
    names = np.asarray(languages)
    return np.stack([vectors[names == name].mean(0) for name in sorted(set(languages))])


def language_similarity(centroids: np.ndarray) -> np.ndarray:
    """Cosines `[g, g]` of language centroids `[g, d]`, in [-1, 1].

    In the dtype of the centroids. NaN where one is zero or not finite.
    """
    length = np.linalg.norm(centroids, axis=1, keepdims=True)
    rows = centroids / np.where(length > 0, length, np.nan)
    return np.clip(rows @ rows.T, -1, 1)


def cluster_languages(
    centroids: np.ndarray, clusters: int, *, method: str = "average"
) -> np.ndarray:
    """Hierarchical clusters of centroids by cosine distance: labels `[g]` from 0.

    Args:
      centroids: `[g, d]`, at least two, none of them zero.
      clusters: how many; fewer come back where the tree cannot be cut so.
      method: linkage, as in `scipy.cluster.hierarchy.linkage`.

    Returns:
      `[g]` int64.

    Raises:
      ValueError: fewer than two centroids, one that is zero or not finite, fewer than
        one cluster, or an unknown method.
    """
    if len(centroids) < 2 or clusters < 1:
        raise ValueError(
            "At least two centroids and one cluster are needed; got"
            f" {len(centroids)} and {clusters}."
        )
    apart = 1 - language_similarity(centroids)[np.triu_indices(len(centroids), 1)]
    if np.isnan(apart).any():
        raise ValueError("`centroids` must be finite and not zero; one is not.")
    tree = scipy.cluster.hierarchy.linkage(apart, method)
    labels = scipy.cluster.hierarchy.fcluster(tree, clusters, "maxclust")
    return np.unique(labels, return_inverse=True)[1]


class Mantel(NamedTuple):
    """Correlation of two distance matrices and its one-sided permutation p-value."""

    correlation: float
    p_value: float


def mantel(
    a: np.ndarray, b: np.ndarray, *, permutations: int = 9999, seed: int = 0
) -> Mantel:
    """Mantel's test: do two symmetric `[g, g]` matrices over the same items agree?

    Pearson correlation of the upper triangles; the null relabels the items of one
    matrix, because its entries are not independent. p = (1 + permutations with at
    least this correlation) / (1 + permutations). Mantel, 1967. Both are NaN where a
    matrix holds NaN or is constant: nothing correlates with it.

    Raises:
      ValueError: not square, of different size, asymmetric, fewer than 3 items, or
        fewer than one permutation.
    """
    if permutations < 1:
        raise ValueError(f"`permutations` must be at least 1; got {permutations}.")
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if a.shape != b.shape or a.ndim != 2 or a.shape[0] != a.shape[1] or len(a) < 3:
        raise ValueError(
            "`a` and `b` must be square, of one size, with at least 3 items;"
            f" got {a.shape} and {b.shape}."
        )
    if not all(np.allclose(x, x.T, equal_nan=True) for x in (a, b)):
        raise ValueError("`a` and `b` must be symmetric.")
    upper = np.triu_indices(len(a), 1)

    def standard(x):
        x = x[upper] - x[upper][0]  # equal entries must differ by nothing
        x = x - x.mean()
        norm = np.linalg.norm(x)
        return x / norm if norm > 0 else x * np.nan

    own = standard(a)
    correlation = float(own @ standard(b))
    if np.isnan(correlation):
        return Mantel(np.nan, np.nan)
    generator = np.random.default_rng(seed)
    reached = 1
    for _ in range(permutations):
        order = generator.permutation(len(b))
        reached += own @ standard(b[np.ix_(order, order)]) >= correlation - 1e-12
    return Mantel(correlation, float(reached / (1 + permutations)))
