"""Exact counts of terms, of pairs of terms, and of the tokens around them.

One pure function counts a shard, another merges two counts; merging is associative and
commutative, so that shards may be counted anywhere and in any order.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from . import matching
from .readers import EXAMPLES, Damage, Shard, read_shard
from .terms import Terms

_BATCH = 4096  # documents
_HELD = 1 << 22  # entries of a table of documents by terms before it is multiplied
_NEAR = 1 << 24  # pairs of places before they are counted


class Plan(NamedTuple):
    """What to count.

    `terms`: whom to look for. `pairs`: count documents that hold two of them. `window`:
    count pairs of occurrences that begin at most so many units (words, or tokens)
    apart. `tokens`: how often each token occurs, and in how many documents.
    `term_tokens`: documents that hold a term and a token, for every term and token.

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
    # [pair] int64
    count: np.ndarray  # type: ignore[assignment]  # a tuple has a method of that name


class Counts(NamedTuple):
    """What a `Plan` asks for, 64-bit; parts that it does not ask for are None."""

    documents: int
    """Documents that are not empty."""
    characters: int
    """Of texts; as UTF-8 they have more bytes."""
    units: int
    """Words looked at for surface terms, otherwise tokens."""
    term_documents: np.ndarray | None
    """`[term]`: documents that hold the term."""
    term_occurrences: np.ndarray | None
    """`[term]`: places where it begins."""
    document_pairs: Pairs | None
    """(term, term): documents that hold both."""
    window_pairs: Pairs | None
    """(term, term): pairs of their places, at most `window` units apart."""
    token_occurrences: np.ndarray | None
    """`[token]`."""
    token_documents: np.ndarray | None
    """`[token]`: documents that hold the token."""
    term_tokens: Pairs | None
    """(term, token): documents that hold both."""
    damage: Damage = Damage()


def count_shard(shard: Shard, plan: Plan, *, strict: bool = False) -> Counts:
    """Reads and counts one shard; with `strict` the first damage raises.

    Raises:
      ValueError: as `count_documents`; damage, where it is `strict`.
      OSError: the shard cannot be read.
    """
    damage = [Damage()]

    def damaged(more: Damage) -> None:
        damage[0] = add_damage(damage[0], more)

    try:
        counts = count_documents(read_shard(shard, None if strict else damaged), plan)
    except ValueError as error:
        if shard.url in str(error):
            raise
        raise ValueError(f"{shard.url}: {error}") from None
    return counts._replace(damage=add_damage(damage[0], counts.damage))


def add_damage(a: Damage, b: Damage) -> Damage:
    """The damage of both, with the first few examples."""
    return Damage(
        a.skipped + b.skipped,
        a.mended + b.mended,
        a.empty + b.empty,
        (a.examples + b.examples)[:EXAMPLES],
    )


def count_documents(documents: Iterable[str | np.ndarray], plan: Plan) -> Counts:
    """Counts a stream of documents, texts or arrays of token ids; pure.

    Holds a few thousand documents at a time, and tables of what was counted.

    Raises:
      ValueError: the plan cannot be carried out on such documents; a token is not in
        the vocabulary.
    """
    size = _check(plan)
    terms = plan.terms
    matcher = matching.compile_terms(terms) if terms else None
    n = len(terms.names) if terms else 0
    counts_tokens = plan.tokens or plan.term_tokens
    needs_tokens = counts_tokens or (terms is not None and terms.kind == "tokens")
    totals = np.zeros(4, np.int64)  # documents, characters, units, empty
    term_totals = np.zeros((2, n), np.int64)  # documents, occurrences
    token_totals = np.zeros((2, size if counts_tokens else 0), np.int64)
    both, near, joint = Sums(), Sums(), Sums()
    held: list[tuple[sparse.csr_array, sparse.csr_array | None]] = []
    entries = 0

    def multiply() -> None:
        """Counts the documents that are held."""
        if not held:
            return
        by_term = sparse.vstack([part for part, _ in held], format="csr")
        if plan.pairs:
            _add_pairs(both, by_term)
        if plan.term_tokens:
            by_token = sparse.vstack([part for _, part in held], format="csr")
            _add_products(joint, by_term, by_token)
        held.clear()

    for batch in _batches(documents, totals):
        coded = _coded(batch, plan, size) if needs_tokens else None
        matches = None
        if matcher and terms and terms.kind == "surface":
            if not isinstance(batch[0], str):
                raise ValueError(
                    "Surface terms are looked for in texts; the documents are token"
                    " ids. Make the terms with `token_terms`."
                )
            matches = matching.find_in_texts(matcher, batch)
        elif matcher:
            assert coded is not None
            matches = matching.find_in_tokens(matcher, coded)
        totals[2] += (
            sum(map(len, coded or ())) if matches is None else matches.units.sum()
        )
        by_token = None
        if counts_tokens:
            assert coded is not None
            by_token = _by_token(coded, size)
            token_totals[0] += np.bincount(np.concatenate(coded), minlength=size)
            token_totals[1] += np.bincount(by_token.indices, minlength=size)
        if matches is None:
            continue
        by_term = _table(matches.documents, matches.terms, (len(batch), n))
        term_totals[0] += np.bincount(by_term.indices, minlength=n)
        term_totals[1] += np.bincount(matches.terms, minlength=n)
        if plan.window is not None:
            _add_near(near, matches, plan.window, n)
        if plan.pairs or plan.term_tokens:
            # Most documents may hold no term: they add nothing, and are not held.
            some = np.diff(by_term.indptr) > 0
            by_term = _with_rows(by_term, some)
            entries += by_term.nnz
            beside = None
            if plan.term_tokens and by_token is not None:
                beside = by_token[some]
                entries += beside.nnz
            held.append((by_term, beside))
            if entries > _HELD:
                multiply()
                entries = 0
    multiply()
    return Counts(
        int(totals[0]),
        int(totals[1]),
        int(totals[2]),
        term_totals[0] if terms else None,
        term_totals[1] if terms else None,
        both.pairs(n) if terms and plan.pairs else None,
        near.pairs(n) if terms and plan.window is not None else None,
        token_totals[0] if counts_tokens else None,
        token_totals[1] if counts_tokens else None,
        joint.pairs(size) if plan.term_tokens else None,
        Damage(empty=int(totals[3])),
    )


def _check(plan: Plan) -> int:
    """The size of the vocabulary, 0 where there is none.

    Raises:
      ValueError: the plan contradicts itself.
    """
    size = plan.vocabulary_size
    if size is None:
        size = plan.tokenizer.get_vocab_size() if plan.tokenizer else 0
    if plan.terms is None and (plan.term_tokens or not plan.tokens):
        raise ValueError("A plan needs `terms`, or counts `tokens` alone.")
    if (plan.tokens or plan.term_tokens) and not size:
        raise ValueError(
            "Counting tokens needs `tokenizer`, or `vocabulary_size` where documents"
            " are token ids already."
        )
    if plan.window is not None and plan.window < 1:
        raise ValueError(f"`window` must be at least 1 unit; got {plan.window}.")
    return size


def _batches(documents: Iterable, totals: np.ndarray) -> Iterator[list]:
    """Documents that are looked at together; adds them to `totals`."""
    batch: list = []
    size = 0
    for document in documents:
        length = len(document)
        text = isinstance(document, str)
        if not length or (text and document.isspace()):
            totals[3] += 1
            continue
        totals[0] += 1
        if text:
            totals[1] += length
        if batch and (
            size + length > matching.BLOCK
            or len(batch) >= _BATCH
            or isinstance(batch[0], str) != text
        ):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += length
    if batch:
        yield batch


def _coded(batch: Sequence, plan: Plan, size: int) -> list[np.ndarray]:
    """The token ids of each document.

    Raises:
      ValueError: there is no tokenizer for texts; a token is not in the vocabulary.
    """
    if isinstance(batch[0], str):
        if plan.tokenizer is None:
            raise ValueError("Tokens of texts are counted with a `tokenizer`.")
        texts = [
            # A tokenizer takes Unicode alone, and JSON may hold half a character.
            text.encode("utf-8", "replace").decode("utf-8")
            for text in batch
        ]
        found = plan.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        coded = [np.array(one.ids, np.int64) for one in found]
    else:
        coded = [np.asarray(document) for document in batch]
    # With other integers NumPy would make floats of uint64.
    coded = [c.astype(np.int64) if c.dtype == np.uint64 else c for c in coded]
    if any(ids.dtype.kind not in "iu" or ids.ndim != 1 for ids in coded):
        raise ValueError("A document of token ids must be a list of integers.")
    low = min((int(ids.min()) for ids in coded if len(ids)), default=0)
    high = max((int(ids.max()) for ids in coded if len(ids)), default=0)
    if low < 0 or high >= (size or 1 << 32):
        raise ValueError(
            f"A token must be in [0, {size or 1 << 32}); got"
            f" {low if low < 0 else high}. Is this the tokenizer that the documents"
            " were made with?"
        )
    return coded


def _table(
    rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]
) -> sparse.csr_array:
    """1 where a row and a column stand together, once or more often."""
    keys = matching.distinct(rows * np.int64(shape[1]) + columns)
    rows = keys // shape[1]
    columns = (keys - rows * shape[1]).astype(np.int32)
    begins = np.searchsorted(rows, np.arange(shape[0] + 1)).astype(np.int32)
    ones = np.ones(len(columns), np.int32)
    return sparse.csr_array((ones, columns, begins), shape=shape)


def _with_rows(table: sparse.csr_array, some: np.ndarray) -> sparse.csr_array:
    """The rows `some`; all others are empty, so that nothing but bounds goes away."""
    if some.all():
        return table
    bounds = np.concatenate([table.indptr[:1], table.indptr[1:][some]])
    shape = (len(bounds) - 1, table.shape[1])
    return sparse.csr_array((table.data, table.indices, bounds), shape=shape)


def _by_token(coded: Sequence[np.ndarray], size: int) -> sparse.csr_array:
    rows = np.repeat(np.arange(len(coded)), [len(ids) for ids in coded])
    tokens = np.concatenate([ids.astype(np.int64, copy=False) for ids in coded])
    return _table(rows, tokens, (len(coded), size))


class Sums:
    """A growing sparse table of counts by key, as sorted runs of doubling length."""

    def __init__(self) -> None:
        self.runs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        """Adds `counts` int64 at `keys` int64, ascending and all different."""
        if not len(keys):
            return
        self.runs.append((keys, counts))
        while len(self.runs) > 1 and len(self.runs[-2][0]) < 2 * len(self.runs[-1][0]):
            self._join()

    def _join(self) -> None:
        (a, x), (b, y) = self.runs.pop(), self.runs.pop()
        keys = np.concatenate([a, b])
        order = np.argsort(keys, kind="stable")  # two sorted runs: one pass
        keys = keys[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        counts = np.concatenate([x, y])[order]
        self.runs.append((keys[first], np.add.reduceat(counts, first)))

    def pairs(self, columns: int) -> Pairs:
        """The table; a key is row times `columns` plus column."""
        while len(self.runs) > 1:
            self._join()
        empty = np.zeros(0, np.int64)
        keys, counts = self.runs[0] if self.runs else (empty, empty)
        first, second = np.divmod(keys, max(columns, 1))
        return Pairs(first.astype(np.int32), second.astype(np.int32), counts)


def _add_pairs(sums: Sums, table: sparse.csr_array) -> None:
    """How many rows hold both of two columns, the smaller one first."""
    n = table.shape[1]
    keys, counts = [], []
    for begin, product in _products(table, table, True):
        rows = np.repeat(np.arange(len(product.indptr) - 1), np.diff(product.indptr))
        above = rows < product.indices
        keys.append((rows[above] + begin) * n + product.indices[above] + begin)
        counts.append(product.data[above].astype(np.int64))
    sums.add(np.concatenate(keys), np.concatenate(counts))


def _add_products(sums: Sums, left: sparse.csr_array, right: sparse.csr_array) -> None:
    """How many rows hold column i of `left` and column j of `right`."""
    keys, counts = [], []
    for begin, product in _products(left, right, False):
        rows = np.repeat(np.arange(len(product.indptr) - 1), np.diff(product.indptr))
        keys.append((rows + begin) * right.shape[1] + product.indices)
        counts.append(product.data.astype(np.int64))
    sums.add(np.concatenate(keys), np.concatenate(counts))


def _products(
    left: sparse.csr_array, right: sparse.csr_array, above: bool
) -> Iterator[tuple[int, sparse.csr_array]]:
    """Some rows of `left.T @ right` at a time, in order, with the first one's number.

    The steps have about as many entries of `left` each, so the product is never in
    memory as a whole. With `above`, columns before the first row are left out.
    """
    turned = left.T.tocsr()
    ends = np.searchsorted(turned.indptr, np.linspace(0, turned.nnz, 9))
    steps = np.unique([0, *ends[1:-1].clip(0, left.shape[1]), left.shape[1]])
    for begin, end in zip(steps[:-1].tolist(), steps[1:].tolist()):
        product = turned[begin:end] @ (right[:, begin:] if above else right)
        yield begin, product.tocsc().tocsr()  # which puts the columns in order


def _add_near(sums: Sums, matches: matching.Matches, window: int, n: int) -> None:
    """Counts pairs of matches that begin at most `window` units apart."""
    begins = np.cumsum(matches.units) - matches.units
    # Documents are moved so far apart that no window reaches from one to another.
    places = (begins + np.arange(len(begins)) * window)[matches.documents]
    places += matches.positions
    dtype = np.uint32 if n * n < 1 << 32 else np.uint64
    terms = matches.terms.astype(dtype)
    found: list[np.ndarray] = []
    held = 0
    for apart in range(1, len(places)):
        close = places[apart:] - places[:-apart] <= window
        if not close.any():
            break
        a, b = terms[:-apart][close], terms[apart:][close]
        keys = np.minimum(a, b) * dtype(n) + np.maximum(a, b)
        found.append(keys[a != b])
        held += len(found[-1])
        if held > _NEAR:  # a document may be a library
            _add_keys(sums, found)
            found, held = [], 0
    if found:
        _add_keys(sums, found)


def _add_keys(sums: Sums, found: Sequence[np.ndarray]) -> None:
    """Counts each key as often as it is found."""
    keys = np.concatenate(found)
    keys.sort()
    first = np.flatnonzero(np.diff(keys, prepend=keys[:1] + keys.dtype.type(1)))
    sums.add(keys[first].astype(np.int64), np.diff(first, append=len(keys)))


def merge(a: Counts, b: Counts) -> Counts:
    """The counts of two disjoint sets of documents, counted by the same plan.

    Raises:
      ValueError: the plans were not the same.
    """

    def joined(x: Any, y: Any) -> Any:
        if (x is None) != (y is None) or np.shape(x) != np.shape(y):
            if not (isinstance(x, Pairs) and isinstance(y, Pairs)):
                raise ValueError("Counts of different plans cannot be merged.")
        if isinstance(x, Pairs):
            sums = Sums()
            for part in (x, y):
                sums.add(_keys(part.first, part.second), part.count)
            return sums.pairs(1 << 32)
        return None if x is None else x + y

    parts: list[Any] = [joined(x, y) for x, y in zip(a[:-1], b[:-1])]
    parts.append(add_damage(a.damage, b.damage))
    return Counts(*parts)


def pair_counts(
    pairs: Pairs, first: Any, second: Any, *, ordered: bool = False
) -> np.ndarray:
    """The counts of the pairs (`first[i]`, `second[i]`), int64; 0 where there is none.

    Pairs of terms are the same both ways round; (term, token) is `ordered`.
    """
    first, second = np.asarray(first, np.int64), np.asarray(second, np.int64)
    if not ordered:
        first, second = np.minimum(first, second), np.maximum(first, second)
    known, wanted = _keys(pairs.first, pairs.second), _keys(first, second)
    if not len(known):
        return np.zeros(wanted.shape, np.int64)
    place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[place] == wanted, pairs.count[place], 0)


def _keys(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first.astype(np.int64) << 32) | second.astype(np.int64)
