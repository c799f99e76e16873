"""Exact counts of terms, of pairs of terms, and of the tokens around them.

One pure function counts a shard, another merges two counts; merging is associative and
commutative, so that shards may be counted anywhere and in any order.
"""

import collections
import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from .readers import Damage, Shard, read_shard
from .terms import Terms


class Plan(NamedTuple):
    """What to count.

    `terms`: whom to look for. `pairs`: count documents that hold two of them. `window`:
    count pairs of occurrences at most so many units (words, or tokens) apart.
    `tokens`: how often each token occurs, and in how many documents. `term_tokens`:
    documents that hold both a term and a token, for every term and token.

    `tokenizer` (a `tokenizers.Tokenizer`) turns texts into tokens where tokens are
    counted or terms are sequences of tokens; documents may also be token ids already.
    `vocabulary_size` is the number of tokens, the tokenizer's own when None.
    """

    terms: Terms | None = None
    pairs: bool = True
    window: int | None = None
    tokens: bool = False
    term_tokens: bool = False
    tokenizer: Any = None
    vocabulary_size: int | None = None


class Pairs(NamedTuple):
    """A sparse table of counts: `count[i]` of (`first[i]`, `second[i]`), in order.

    Of pairs of terms, `first` is the smaller index.
    """

    first: np.ndarray  # [pair] int32
    second: np.ndarray  # [pair] int32
    count: np.ndarray  # [pair] int64


class Counts(NamedTuple):
    """What a `Plan` asks for, 64-bit; parts that it does not ask for are None."""

    documents: int
    """Documents that are not empty."""
    characters: int
    """Of texts; bytes of UTF-8 would be more."""
    units: int
    """Words, or tokens, looked at."""
    term_documents: np.ndarray | None
    """`[term]`: documents that hold the term."""
    term_occurrences: np.ndarray | None
    """`[term]`: places where it begins."""
    document_pairs: Pairs | None
    """(term, term): documents that hold both."""
    window_pairs: Pairs | None
    """(term, term): pairs of places, at most `window` units apart."""
    token_occurrences: np.ndarray | None
    """`[token]`."""
    token_documents: np.ndarray | None
    """`[token]`: documents that hold the token."""
    term_tokens: Pairs | None
    """(term, token): documents that hold both."""
    damage: Damage = Damage()


def count_documents(documents: Iterable[str | np.ndarray], plan: Plan) -> Counts:
    """Counts a stream of documents, texts or arrays of token ids; pure.

    Raises:
      ValueError: the plan cannot be carried out on such documents; a token is not in
        the vocabulary.
    """
    terms = plan.terms
    size = plan.vocabulary_size or (
        plan.tokenizer.get_vocab_size() if plan.tokenizer else 0
    )
    n = len(terms.names) if terms else 0
    found, alone = collections.Counter(), collections.Counter()
    both, near, joint = (collections.Counter() for _ in range(3))
    tokens, with_token = np.zeros(size, np.int64), np.zeros(size, np.int64)
    seen = characters = units = empty = 0
    patterns = []
    if terms and terms.kind == "surface":
        patterns = [
            re.compile(rf"(?<!\w){re.escape(w.casefold())}(?!\w)") for w in terms.names
        ]
    for document in documents:
        if not len(document):
            empty += 1
            continue
        seen += 1
        ids = None
        if isinstance(document, str):
            characters += len(document)
            if plan.tokenizer is not None:
                coded = plan.tokenizer.encode(document, add_special_tokens=False)
                ids = np.array(coded.ids, np.int64)
        else:
            ids = np.asarray(document, np.int64)
        hits = []
        if patterns:
            text = document.casefold()
            starts = {m.start(): i for i, m in enumerate(re.finditer(r"\w+", text))}
            units += len(starts)
            for term, pattern in enumerate(patterns):
                hits += [(starts[m.start()], term) for m in pattern.finditer(text)]
        elif terms:
            units += len(ids)
            row = ids.tolist()
            for term, variants in enumerate(terms.variants):
                hits += {
                    (i, term)
                    for v in variants
                    for i in range(len(row))
                    if tuple(row[i : i + len(v)]) == v
                }
        own = sorted({term for _, term in hits})
        alone.update(term for _, term in hits)
        found.update(own)
        if plan.pairs:
            both.update(itertools.combinations(own, 2))
        if plan.window is not None:
            near.update(
                (min(a, b), max(a, b))
                for (p, a), (q, b) in itertools.combinations(hits, 2)
                if a != b and abs(p - q) <= plan.window
            )
        if ids is not None and (plan.tokens or plan.term_tokens):
            tokens += np.bincount(ids, minlength=size)
            distinct = np.unique(ids)
            with_token[distinct] += 1
            if plan.term_tokens:
                joint.update(itertools.product(own, distinct.tolist()))
    return Counts(
        seen,
        characters,
        units,
        np.array([found[i] for i in range(n)], np.int64) if terms else None,
        np.array([alone[i] for i in range(n)], np.int64) if terms else None,
        _pairs(both) if terms and plan.pairs else None,
        _pairs(near) if terms and plan.window is not None else None,
        tokens if plan.tokens or plan.term_tokens else None,
        with_token if plan.tokens or plan.term_tokens else None,
        _pairs(joint) if plan.term_tokens else None,
        Damage(empty=empty),
    )


def _pairs(counter: collections.Counter) -> Pairs:
    keys = sorted(counter)
    first, second = np.array(keys, np.int32).reshape(-1, 2).T
    return Pairs(first, second, np.array([counter[key] for key in keys], np.int64))


def count_shard(shard: Shard, plan: Plan, *, strict: bool = False) -> Counts:
    """Reads and counts one shard; with `strict` the first damage raises.

    Raises:
      ValueError: as `count_documents`; damage, where it is `strict`.
      OSError: the shard cannot be read.
    """
    del strict
    return count_documents(read_shard(shard), plan)


def merge(a: Counts, b: Counts) -> Counts:
    """The counts of two disjoint sets of documents, counted by the same plan."""

    def joined(x, y):
        if isinstance(x, Pairs):
            counter = collections.Counter()
            for part in (x, y):
                keys = zip(part.first.tolist(), part.second.tolist())
                counter.update(dict(zip(keys, part.count.tolist())))
            return _pairs(counter)
        return None if x is None else x + y

    damage = Damage(
        *(x + y for x, y in zip(a.damage[:3], b.damage[:3])),
        (a.damage.examples + b.damage.examples)[:10],
    )
    return Counts(*(joined(x, y) for x, y in zip(a[:-1], b[:-1])), damage)


def pair_counts(pairs: Pairs, first: Any, second: Any, *, ordered: bool = False):
    """The counts of the pairs (`first[i]`, `second[i]`), int64; 0 where there is none.

    Pairs of terms are the same both ways round; (term, token) is `ordered`.
    """
    first, second = np.asarray(first, np.int64), np.asarray(second, np.int64)
    if not ordered:
        first, second = np.minimum(first, second), np.maximum(first, second)
    known = (pairs.first.astype(np.int64) << 32) | pairs.second
    wanted = (first << 32) | second
    place = np.searchsorted(known, wanted)
    place = np.minimum(place, max(len(known) - 1, 0))
    if not len(known):
        return np.zeros(wanted.shape, np.int64)
    return np.where(known[place] == wanted, pairs.count[place], 0)
