"""Finds the terms of a list in a batch of documents, all of them at once.

A text becomes an array of small codes, one for each character of any term, 0 for what
parts words. The units are read off that array together: those that begin like a word of
the same length are looked at again, and their first four codes, the last four and the
length say exactly which word it is if it has at most eight, and name a candidate, whose
middle is compared, if it has more. Phrases are followed along a trie
from the few places where one can begin. Nothing is probabilistic: every match has been
compared code by code.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .terms import LETTER, SEPARATOR, Terms, alphabet, cut

BLOCK = 1 << 19  # characters looked at together: the arrays stay in the cache
_PAD = 4
_UNKNOWN, _UNKNOWN_ALONE, _FIRST = 1, 2, 3
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)
_TABLE_LIMIT = 1 << 24


class Matches(NamedTuple):
    """Where terms stand in a batch of documents, in order of document and position.

    A position counts the units of its document before the match.
    """

    documents: np.ndarray  # [match] int64, the document's number in the batch
    positions: np.ndarray  # [match] int64
    terms: np.ndarray  # [match] int32
    units: np.ndarray  # [document] int64, how many units each document has


class _Words(NamedTuple):
    """The different units of surface terms, and a hash table to find them by."""

    codes: np.ndarray  # [code point] uint16
    first_alone: int  # codes from here on are of scripts without spaces
    heads: np.ndarray  # [unit] uint64
    tails: np.ndarray  # [unit] uint64
    lengths: np.ndarray  # [unit] int64
    middles: np.ndarray  # [unit, block] uint64, codes 4 to 7, 8 to 11, ...
    slots: np.ndarray  # [slot] int32, a unit or -1
    begun: np.ndarray  # [slot] bool, the head and length of some unit lead here


class _Trie(NamedTuple):
    """The terms as sequences of units; node 0 is the root, node 1 + u stands for u."""

    keys: np.ndarray  # [edge] int64, sorted: (node * units + unit) * 2 + touches
    children: np.ndarray  # [edge] int32
    inner: np.ndarray  # [node] bool, has children
    begins: np.ndarray  # [node + 1] int64, its terms in `terms`
    terms: np.ndarray  # int32


class Matcher(NamedTuple):
    """Terms, ready to be looked for."""

    size: int
    trie: _Trie
    words: _Words | None
    tokens: np.ndarray | None  # sorted token ids that terms have
    fold_case: bool


@functools.lru_cache(maxsize=4)
def compile_terms(terms: Terms) -> Matcher:
    """The matcher of `terms`; made once in a process.

    Raises:
      ValueError: the terms hold more than 65,000 different characters.
    """
    if terms.kind == "tokens":
        ids = np.unique([i for variants in terms.variants for v in variants for i in v])
        known = {int(token): unit for unit, token in enumerate(ids)}
        sequences = [
            (term, [(known[i], False) for i in variant])
            for term, variants in enumerate(terms.variants)
            for variant in variants
        ]
        trie = _trie(sequences, len(ids))
        return Matcher(len(terms.names), trie, None, ids, False)
    units: dict[str, int] = {}
    sequences = []
    for term, variants in enumerate(terms.variants):
        for variant in variants:
            parts = cut(variant, terms.fold_case)
            own = [(units.setdefault(u, len(units)), touches) for u, touches in parts]
            sequences.append((term, own))
    trie = _trie(sequences, len(units))
    words = _words(list(units), terms.fold_case)
    return Matcher(len(terms.names), trie, words, None, terms.fold_case)


def _trie(sequences: list[tuple[int, list[tuple[int, bool]]]], units: int) -> _Trie:
    edges: dict[tuple[int, int, bool], int] = {}
    ends: list[set[int]] = [set() for _ in range(units + 1)]
    for term, sequence in sequences:
        node = 1 + sequence[0][0]  # what a term's first unit touches does not matter
        for unit, touches in sequence[1:]:
            node = edges.setdefault((node, unit, touches), len(ends))
            if node == len(ends):
                ends.append(set())
        ends[node].add(term)
    keys = np.array(
        [(node * units + unit) * 2 + touches for node, unit, touches in edges], np.int64
    )
    order = np.argsort(keys)
    inner = np.zeros(len(ends), bool)
    inner[[node for node, _, _ in edges]] = True
    return _Trie(
        keys[order],
        np.array(list(edges.values()), np.int32)[order],
        inner,
        np.concatenate([[0], np.cumsum([len(own) for own in ends])]),
        np.array([term for own in ends for term in sorted(own)], np.int32),
    )


def _words(units: list[str], fold_case: bool) -> _Words:
    kind, folded = alphabet(fold_case)
    letters = sorted(set("".join(units)), key=lambda c: (kind[ord(c)], c))
    if len(letters) > 65_000:
        raise ValueError(
            "The terms may hold at most 65,000 different characters; they hold"
            f" {len(letters):,}."
        )
    first_alone = _FIRST + sum(kind[ord(c)] == LETTER for c in letters)
    codes = np.array([SEPARATOR, _UNKNOWN, _UNKNOWN_ALONE], np.uint16)[kind]
    of_folded = codes.copy()
    of_folded[[ord(c) for c in letters]] = np.arange(_FIRST, _FIRST + len(letters))
    codes = np.where(kind == SEPARATOR, 0, of_folded[folded]).astype(np.uint16)

    lengths = np.array([len(unit) for unit in units], np.int64)
    longest = -(-int(lengths.max()) // 4) * 4
    spelled = np.zeros((len(units), longest), np.uint16)
    tails = np.zeros((len(units), 4), np.uint16)
    for row, unit in enumerate(units):
        own = of_folded[[ord(c) for c in unit]]
        spelled[row, : len(own)] = own
        if len(own) >= 4:
            tails[row] = own[-4:]
    blocks = spelled.view(np.uint64)
    heads, ends = blocks[:, 0].copy(), tails.view(np.uint64)[:, 0].copy()
    size = 1 << max(10, (16 * len(units) - 1).bit_length())
    slots = np.full(size, -1, np.int32)
    for number, slot in enumerate(_hash(heads, ends, lengths, size).tolist()):
        while slots[slot] >= 0:
            slot = (slot + 1) % size
        slots[slot] = number
    begun = np.zeros(size, bool)
    begun[_hash(heads, _NO_TAIL, lengths, size)] = True
    middles = blocks[:, 1:].copy()
    return _Words(codes, first_alone, heads, ends, lengths, middles, slots, begun)


def _hash(
    heads: np.ndarray, tails: np.ndarray, lengths: np.ndarray, size: int
) -> np.ndarray:
    mixed = heads * _MIX[0]
    mixed ^= (tails + lengths.view(np.uint64)) * _MIX[1]
    mixed ^= mixed >> np.uint64(32)
    mixed *= _MIX[0]
    mixed >>= np.uint64(64 - (size.bit_length() - 1))
    return mixed.view(np.int64)


# Which of four codes belong to a unit of 0, 1, 2, 3, 4 and more of them.
_HEAD = np.array([(1 << 16 * n) - 1 for n in range(5)], np.uint64)
_TAIL = np.array([0, 0, 0, 0, (1 << 64) - 1], np.uint64)
_NO_TAIL = np.zeros(1, np.uint64)


class _Units(NamedTuple):
    """Of a block of text: where units begin, which they are, whether they touch."""

    starts: np.ndarray  # [unit] int64
    ids: np.ndarray  # [unit] int32, -1 where it is in no term
    touches: np.ndarray | None  # [unit] bool, None where none does


def _read_units(words: _Words, text: str) -> _Units:
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    codes = np.zeros(len(points) + 2 * _PAD, np.uint16)
    np.take(words.codes, points, out=codes[_PAD:-_PAD], mode="clip")
    letter = codes != SEPARATOR
    touches = None
    alone = (codes == _UNKNOWN_ALONE) | (codes >= words.first_alone)
    if alone.any():
        letter &= ~alone
        begins, ends = alone.copy(), alone
        begins[1:] |= letter[1:] & ~letter[:-1]
        ends[:-1] |= letter[:-1] & ~letter[1:]
        starts, ends = np.flatnonzero(begins), np.flatnonzero(ends) + 1
        touches = np.zeros(len(starts), bool)
        touches[1:] = starts[1:] == ends[:-1]
    else:
        edges = np.flatnonzero(letter[1:] != letter[:-1]) + 1
        starts, ends = edges[::2], edges[1::2]
    ids = _identify(words, codes, starts, ends)
    return _Units(starts - _PAD, ids, touches)


def _identify(
    words: _Words, codes: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """The unit at each place, int32; -1 where there is none of the terms'."""
    # Four codes from any place on, read as one number.
    fours = np.ndarray((len(codes) - 3,), np.uint64, buffer=codes, strides=(2,))
    lengths = ends - starts
    heads = fours[starts]
    heads &= _HEAD.take(np.minimum(lengths, 4))
    ids = np.full(len(starts), -1, np.int32)
    # Few of a text's units begin like a term's: only theirs are looked at further.
    likely = words.begun.take(_hash(heads, _NO_TAIL, lengths, len(words.begun)))
    asked = np.flatnonzero(likely)
    ids[asked] = _look_up(words, fours, starts[asked], lengths[asked], heads[asked])
    return ids


def _look_up(words, fours, starts, lengths, heads) -> np.ndarray:
    """The units that begin at `starts`, from the table of all; -1 for others."""
    tails = fours[starts + (lengths - 4)]
    tails &= _TAIL.take(np.minimum(lengths, 4))
    slots = _hash(heads, tails, lengths, len(words.slots))
    ids = np.full(len(starts), -1, np.int32)
    # Those whose slot is taken; what is in it may be another unit.
    found = words.slots.take(slots)
    asked = np.flatnonzero(found >= 0)
    found = found[asked]
    while len(asked):
        same = words.heads.take(found) == heads.take(asked)
        same &= words.tails.take(found) == tails.take(asked)
        same &= words.lengths.take(found) == lengths.take(asked)
        same &= _same_middle(words, fours, starts, asked, found, same)
        ids[asked[same]] = found[same]
        asked = asked[~same]
        slots[asked] = (slots[asked] + 1) % len(words.slots)
        found = words.slots.take(slots[asked])
        asked, found = asked[found >= 0], found[found >= 0]
    return ids


def _same_middle(words, fours, starts, asked, found, same) -> np.ndarray:
    """Compares what head and tail do not hold of units with more than eight codes."""
    equal = np.ones(len(asked), bool)
    lengths = words.lengths.take(found)
    long = np.flatnonzero(same & (lengths > 8))
    for block in range(words.middles.shape[1]):
        # Blocks that the word holds whole; what is left of it after them is its tail.
        long = long[lengths[long] > 4 * block + 8]
        if not len(long):
            break
        there = fours[starts[asked[long]] + 4 * (block + 1)]
        equal[long] &= there == words.middles[found[long], block]
    return equal


def distinct(keys: np.ndarray) -> np.ndarray:
    """The different values, ascending; `keys` are sorted in place.

    `numpy.unique` goes through a hash table, ten times as slow for integers.
    """
    keys.sort()
    new = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    return keys[new]


def find_in_texts(matcher: Matcher, texts: Sequence[str]) -> Matches:
    """The matches of surface terms in each of `texts`.

    Fastest with about `BLOCK` characters in all; a single text may have any length.
    """
    words = matcher.words
    assert words is not None
    sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    if len(texts) == 1 and sizes[0] > BLOCK:
        parts = list(_read_long(matcher, texts[0]))
        counts = np.array([sum(len(part.ids) for part in parts)])
    else:
        parts = [_read_units(words, "\0".join(texts))]
        bounds = np.searchsorted(parts[0].starts, np.cumsum(sizes + 1))
        counts = np.diff(bounds, prepend=0)
    ids = np.concatenate([part.ids for part in parts])
    touches = None
    if any(part.touches is not None for part in parts):
        none = [np.zeros(len(part.ids), bool) for part in parts]
        touches = np.concatenate(
            [n if p.touches is None else p.touches for n, p in zip(none, parts)]
        )
    return _follow(matcher, ids, touches, counts)


def _read_long(matcher: Matcher, text: str) -> Iterator[_Units]:
    """The units of a text of any length, piece by piece; no unit is cut."""
    assert matcher.words is not None
    kind = alphabet(matcher.fold_case).kind
    begin = 0
    while begin < len(text):
        end = min(begin + BLOCK, len(text))
        while end < len(text) and (
            kind[ord(text[end - 1])] == LETTER == kind[ord(text[end])]
        ):
            end += 1
        units = _read_units(matcher.words, text[begin:end])
        if begin and len(units.ids) and units.starts[0] == 0:
            touches = units.touches
            if touches is None:
                touches = np.zeros(len(units.ids), bool)
            touches[0] = kind[ord(text[begin - 1])] != SEPARATOR
            units = units._replace(touches=touches)
        yield units
        begin = end


def find_in_tokens(matcher: Matcher, documents: Sequence[np.ndarray]) -> Matches:
    """The matches of token terms in each of `documents`, arrays of token ids."""
    known = matcher.tokens
    assert known is not None
    counts = np.array([len(document) for document in documents], np.int64)
    empty = np.zeros(0, np.int64)
    tokens = np.concatenate([empty, *documents]) if len(documents) else empty
    if known[-1] < _TABLE_LIMIT:
        table = np.full(int(known[-1]) + 2, -1, np.int32)
        table[known] = np.arange(len(known))
        ids = table.take(tokens, mode="clip")
    else:
        place = np.minimum(np.searchsorted(known, tokens), len(known) - 1)
        ids = np.where(known[place] == tokens, place, -1).astype(np.int32)
    return _follow(matcher, ids, None, counts)


def _follow(
    matcher: Matcher, ids: np.ndarray, touches: np.ndarray | None, counts: np.ndarray
) -> Matches:
    """The matches that begin at each known unit, from the units of all documents."""
    trie = matcher.trie
    known = matcher.words.lengths if matcher.words else matcher.tokens
    assert known is not None
    units = len(known)
    ends = np.cumsum(counts)
    places = np.flatnonzero(ids >= 0)
    nodes = ids[places] + 1
    found = [(places, nodes)]
    if len(trie.keys):
        open_ = trie.inner.take(nodes)
        places, nodes = places[open_], nodes[open_]
        last = ends[np.searchsorted(ends, places, side="right")]
        depth = 1
        while len(places):
            inside = places + depth < last
            places, nodes, last = places[inside], nodes[inside], last[inside]
            here = ids[places + depth]
            keys = (nodes.astype(np.int64) * units + here) * 2
            if touches is not None:
                keys += touches[places + depth]
            at = np.minimum(np.searchsorted(trie.keys, keys), len(trie.keys) - 1)
            good = (trie.keys[at] == keys) & (here >= 0)
            places, nodes, last = places[good], trie.children[at[good]], last[good]
            found.append((places, nodes))
            go_on = trie.inner.take(nodes)
            places, nodes, last = places[go_on], nodes[go_on], last[go_on]
            depth += 1
    places, nodes = (np.concatenate(parts) for parts in zip(*found))
    number = trie.begins[nodes + 1] - trie.begins[nodes]
    if np.all(number == 1):
        terms = trie.terms[trie.begins[nodes]]
    else:
        inside = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
        terms = trie.terms[np.repeat(trie.begins[nodes], number) + inside]
        places = np.repeat(places, number)
    if len(found) > 1:
        # A term with two variants at one place is there once.
        keys = distinct(places * matcher.size + terms)
        places = keys // matcher.size
        terms = (keys - places * matcher.size).astype(np.int32)
    bounds = np.searchsorted(places, ends)
    documents = np.repeat(np.arange(len(counts)), np.diff(bounds, prepend=0))
    positions = places - (ends - counts)[documents]
    return Matches(documents, positions, terms, counts)
