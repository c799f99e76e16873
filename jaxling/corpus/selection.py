"""Documents for pivot-aware pre-training: a graph of tokens, its hubs, and a budget.

He et al., 2025, "Semantic Pivots", https://arxiv.org/abs/2505.16385, say in their
repository: build a graph of co-occurrence from the pre-training documents, take the
tokens that have a high co-occurrence with many tokens as the pivots, and select the
documents with a high share of pivots. Which co-occurrence is high, how many tokens are
many and how documents are scored was not published; the choices here are arguments:

    edge (t, u)    in at least `documents` documents together, and their association
                   (`graph`) is at least so much
    pivots         the `size` tokens with the most edges
    score          a document's pivots / its tokens, each occurrence counted

Documents are of many languages, and two tokens of one language meet far more often than
chance has it for that alone: without a remedy the hubs are the commonest tokens of the
rarest language. Association is therefore what the languages of the documents do not
explain. Least association -1 leaves counts alone to decide, and hubs are commas.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .cooccurrence import Counts
from .terms import Terms


class Graph(NamedTuple):
    """An undirected graph of tokens: edge i joins `first[i]` < `second[i]`."""

    tokens: np.ndarray
    """`[node]` token ids; edges are of nodes."""
    first: np.ndarray
    second: np.ndarray
    degree: np.ndarray
    """`[node]`: edges of each."""


def commonest(
    token_documents: np.ndarray, size: int, *, excluded: Sequence[int] = ()
) -> np.ndarray:
    """The `size` tokens in most documents, by falling count; ties, the lower id first.

    Tokens of one document, and those of `excluded` (special tokens), are left out.
    """
    counts = np.array(token_documents, np.int64)
    counts[list(excluded)] = 0
    order = np.argsort(-counts, kind="stable")[:size]
    return order[counts[order] > 1]


def token_nodes(tokens: Sequence[int] | np.ndarray) -> Terms:
    """Terms of one token each, to be counted by a `Plan` with `pairs`."""
    ids = [int(token) for token in tokens]
    return Terms(tuple(map(str, ids)), tuple(((token,),) for token in ids), "tokens")


def graph(
    counts: Counts,
    tokens: np.ndarray,
    *,
    parts: Sequence[Counts],
    documents: int,
    association: float,
) -> Graph:
    """The graph of `tokens`, whose association is, with n(t, u) documents of both,

        log(n(t, u) / sum_l n_l(t) n_l(u) / n_l) / log(n / n(t, u))

    where n_l counts documents of language l. It is at most 1, and 0 if the tokens are
    independent within every language; of documents of one language it is normalised
    pointwise mutual information (Bouma, 2009).

    Args:
      counts: of all documents and the terms `token_nodes(tokens)`, with pairs.
      tokens: the nodes, in the order of those terms.
      parts: counts of the same terms, language by language; pairs are not read.
      documents: an edge's least number of documents with both, at least 1.
      association: an edge's least association, in [-1, 1].

    Raises:
      ValueError: counts of other terms or documents, or thresholds out of range.
    """
    tokens = np.asarray(tokens, np.int64)
    alone = counts.term_documents
    if counts.document_pairs is None or alone is None or len(alone) != len(tokens):
        raise ValueError(
            f"`counts` must be of pairs of the {len(tokens)} tokens; count them with"
            " Plan(token_nodes(tokens), pairs=True)."
        )
    if documents < 1 or not -1 <= association <= 1:
        raise ValueError(
            "`documents` must be at least 1 and `association` in [-1, 1]; got"
            f" {documents} and {association}."
        )
    if sum(part.documents for part in parts) != counts.documents:
        raise ValueError(
            f"`parts` hold {sum(part.documents for part in parts):,} documents, and all"
            f" languages together {counts.documents:,}."
        )
    first, second, together = counts.document_pairs
    often = together >= documents
    first, second, together = first[often], second[often], together[often]
    expected = np.zeros(len(together))
    for part in parts:
        own = np.asarray(part.term_documents, np.float64)
        expected += own[first] * (own[second] / max(part.documents, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(together / expected) / np.log(counts.documents / together)
    # Two tokens that are in every document: nothing is left to be explained.
    found = np.where(together == counts.documents, 0.0, found)
    kept = found >= association
    first, second = first[kept], second[kept]
    degree = np.bincount(np.concatenate([first, second]), minlength=len(tokens))
    return Graph(tokens, first, second, degree)


def pivot_set(of: Graph, size: int) -> np.ndarray:
    """The `size` tokens with most edges, by falling degree; ties, the lower id first.

    A token without an edge is none, so there may be fewer.
    """
    order = np.lexsort((of.tokens, -of.degree))[:size]
    return of.tokens[order[of.degree[order] > 0]]


def share_of(
    documents: Sequence[np.ndarray],
    chosen: Sequence[int] | np.ndarray,
    vocabulary: int,
) -> np.ndarray:
    """`[document]`: the share of a document's tokens that are among `chosen`.

    0 for an empty document.
    """
    held = np.zeros(vocabulary)
    held[np.asarray(chosen, np.int64)] = 1
    return np.array(
        [held[document].mean() if len(document) else 0.0 for document in documents]
    )


def joined_share(
    documents: Sequence[np.ndarray],
    of: Graph,
    vocabulary: int,
    *,
    without: Sequence[int] | np.ndarray = (),
) -> np.ndarray:
    """`[document]`: the share of the pairs of a document's tokens that are edges.

    Distinct tokens that are nodes and not among `without` (the pivots, so that what is
    left is co-occurrence that needs none); 0 where there are fewer than two.
    """
    size = len(of.tokens)
    edge = np.zeros((size, size), bool)
    edge[of.first, of.second] = edge[of.second, of.first] = True
    node = np.full(vocabulary, -1)
    node[of.tokens] = np.arange(size)
    node[np.asarray(without, np.int64)] = -1
    shares = np.zeros(len(documents))
    for row, document in enumerate(documents):
        own = np.unique(node[document])
        own = own[own >= 0]
        if len(own) > 1:
            shares[row] = edge[np.ix_(own, own)].sum() / (len(own) * (len(own) - 1))
    return shares


def load_identifier(name: str) -> Callable[[str], str]:
    """The function `name`, as module:function, that tells the language of a text.

    It raises ValueError where what it tells is no text.

    Raises:
      ValueError: there is no such function.
    """
    module, colon, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"A language identifier is given as module:function; {name!r} cannot be"
            f" imported: {error}."
        ) from None
    if not colon or not callable(found):
        raise ValueError(f"A language identifier is a function; {name!r} is none.")

    def identify(text: str) -> str:
        language = found(text)
        if not isinstance(language, str):
            raise ValueError(
                f"A language identifier must return the language as text; {name}"
                f" returned {language!r}."
            )
        return language

    return identify


def equal_mix(languages: Sequence[str]) -> dict[str, float]:
    """The same share of tokens for each language, in order of appearance."""
    names = list(dict.fromkeys(languages))
    return {name: 1 / len(names) for name in names}


def select(
    order: Sequence[int] | np.ndarray,
    lengths: np.ndarray,
    budget: int,
    *,
    languages: Sequence[str] | None = None,
    mix: Mapping[str, float] | None = None,
) -> np.ndarray:
    """The first documents of `order` that fill a budget of tokens.

    With a mix, every language fills its own share of the budget, from its own documents
    in that order. A language is filled by the document that reaches its share, so it
    may have up to one document more; one that runs out is an error, for arms could not
    be compared.

    Args:
      order: documents, best first (`np.argsort(-score, kind="stable")`).
      lengths: `[document]`, in tokens.
      budget: tokens to select, at least 1.
      languages: of each document, where there is a mix.
      mix: the share of each language; shares are divided by their sum.

    Returns:
      Indices of documents, in the order of `order`.

    Raises:
      ValueError: too few tokens of a language, or a mix that names none.
    """
    best, lengths = np.asarray(order, np.int64), np.asarray(lengths, np.int64)
    if budget < 1:
        raise ValueError(f"`budget` must be at least 1 token; got {budget}.")
    if mix is None:
        return best[_filled(lengths[best], budget, "The documents")]
    total = float(sum(mix.values()))
    if languages is None or not total > 0 or min(mix.values()) < 0:
        raise ValueError(
            "A mix needs the documents' languages, and shares that are not negative"
            f" and not all 0; got {dict(mix)}."
        )
    of = np.asarray(languages, object)[best]
    kept = np.zeros(len(best), bool)
    for language, share in mix.items():
        if share > 0:
            own = np.flatnonzero(of == language)
            wanted = int(np.ceil(budget * share / total))
            filled = _filled(lengths[best[own]], wanted, f"Documents of {language!r}")
            kept[own[filled]] = True
    return best[kept]


def _filled(lengths: np.ndarray, wanted: int, what: str) -> slice:
    """The first so many that hold `wanted` tokens."""
    held = np.cumsum(lengths)
    if not len(held) or held[-1] < wanted:
        raise ValueError(
            f"{what} hold {held[-1] if len(held) else 0:,} tokens in all and must"
            f" hold {wanted:,}: lower the budget, change the mix, or add documents."
        )
    return slice(0, int(np.searchsorted(held, wanted)) + 1)


ARMS = ("pivots", "original", "multilingual", "co-occurrence")


def arm(
    name: str,
    *,
    pivot_score: np.ndarray,
    joined_score: np.ndarray,
    lengths: np.ndarray,
    languages: Sequence[str],
    mix: Mapping[str, float],
    budget: int,
    seed: int,
) -> np.ndarray:
    """The documents of one arm of the comparison, all of the same number of tokens.

    `pivots` takes the highest pivot scores; the others are the baselines. `original` is
    the pool from its beginning, whatever its languages; `multilingual` is drawn at
    random with `seed`; `co-occurrence` takes the highest joined scores among documents
    whose pivot score is not above the median of their language. All but `original`
    have the mix.

    Raises:
      ValueError: an unknown arm; too few tokens (see `select`).
    """
    count = len(lengths)
    if name == "original":
        return select(np.arange(count), lengths, budget)
    if name == "multilingual":
        order = np.random.default_rng(seed).permutation(count)
    elif name == "pivots":
        order = np.argsort(-pivot_score, kind="stable")
    elif name == "co-occurrence":
        low = np.zeros(count, bool)
        of = np.asarray(languages, object)
        for language in dict.fromkeys(languages):
            own = of == language
            low[own] = pivot_score[own] <= np.median(pivot_score[own])
        order = np.argsort(-joined_score, kind="stable")
        order = order[low[order]]
    else:
        raise ValueError(f"`name` must be one of {', '.join(ARMS)}; got {name!r}.")
    return select(order, lengths, budget, languages=languages, mix=mix)
