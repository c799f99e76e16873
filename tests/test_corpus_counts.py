"""Counts of terms against regular expressions and plain loops."""

import collections
import itertools
import re

import numpy as np
import pytest
import tokenizers

from jaxling import corpus
from jaxling.corpus import matching

# Letters, letters of scripts without spaces, and what parts words, as Unicode has them.
LETTERS = "abAB1éßΣςσжअाݐ\u200c\u0301가"
ALONE = "中国あーกၐ"
PARTS = " -.'、\n\u2028\ufffd😀\udc00"


def fold(text: str) -> str:
    return "".join(c.casefold() if len(c.casefold()) == 1 else c for c in text)


def places(term: str, text: str, fold_case: bool = True) -> list[int]:
    """Numbers of the units where `term` begins, by regular expressions."""
    if fold_case:
        term, text = fold(term), fold(text)
    unit = re.compile(f"[{ALONE}]|[{LETTERS + fold(LETTERS)}]+")
    letter, any_ = f"[{LETTERS + fold(LETTERS)}]", f"[{LETTERS + fold(LETTERS)}{ALONE}]"
    wanted, end = "", None
    for found in unit.finditer(term):
        if end is not None and found.start() > end:
            wanted += f"(?:(?!{any_})[\\s\\S])+"
        end = found.end()
        word = re.escape(found[0])
        alone = found[0] in ALONE
        wanted += word if alone else f"(?<!{letter}){word}(?!{letter})"
    starts = [found.start() for found in unit.finditer(text)]
    return [starts.index(m.start()) for m in re.finditer(f"(?={wanted})", text)]


def tables(hits: list[list[tuple[int, int]]], window: int) -> dict:
    """Every count, by plain loops over the (position, term) of each document."""
    alone, found, both, near = (collections.Counter() for _ in range(4))
    for own in hits:
        present = sorted({term for _, term in own})
        alone.update(term for _, term in own)
        found.update(present)
        both.update(itertools.combinations(present, 2))
        for (p, a), (q, b) in itertools.combinations(own, 2):
            if a != b and abs(p - q) <= window:
                near[min(a, b), max(a, b)] += 1
    return dict(alone=alone, found=found, both=both, near=near)


def as_counter(pairs: corpus.Pairs) -> dict:
    keys = zip(pairs.first.tolist(), pairs.second.tolist())
    counter = dict(zip(keys, pairs.count.tolist()))
    assert len(counter) == len(pairs.count) and list(counter) == sorted(counter)
    assert pairs.count.dtype == np.int64
    return counter


def check(counts: corpus.Counts, hits, n: int, window: int) -> None:
    expected = tables(hits, window)
    assert counts.term_occurrences.tolist() == [expected["alone"][i] for i in range(n)]
    assert counts.term_documents.tolist() == [expected["found"][i] for i in range(n)]
    assert as_counter(counts.document_pairs) == expected["both"]
    assert as_counter(counts.window_pairs) == expected["near"]


def random_text(rng, length: int) -> str:
    # Words are short and few, so that terms are found and nearly found.
    letters = rng.choice(list("aabbAB1éςσжअा\u0301" + ALONE + PARTS + " " * 8), length)
    return "".join(letters)


@pytest.mark.parametrize("fold_case", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_texts_against_regular_expressions(seed, fold_case):
    rng = np.random.default_rng(seed)
    texts = [random_text(rng, n) for n in rng.integers(0, 90, 150)]
    whole = random_text(rng, 3000)
    words = ["ab", "A b", "aB-a", "中国", "国", "あー", "ab中", "中 国", "б", "Σ", "ς"]
    for size in rng.integers(1, 13, 40):
        at = rng.integers(len(whole) - 20)
        words.append(whole[at : at + size])
    words = [w for w in words if re.search(f"[{LETTERS}{ALONE}]", w)] + ["ab", "AB"]
    terms = corpus.surface_terms(words, fold_case=fold_case)
    texts += [whole, "ab" * 7 + " ab", words[0]]
    plan = corpus.Plan(terms, window=5)
    counts = corpus.count_documents(texts, plan)
    kept = [text for text in texts if text.strip()]
    hits = [
        [(p, i) for i, word in enumerate(words) for p in places(word, text, fold_case)]
        for text in kept
    ]
    check(counts, hits, len(words), 5)
    assert counts.term_occurrences.sum() > 200
    assert counts.documents == len(kept)
    assert counts.damage.empty == len(texts) - len(kept)
    assert counts.characters == sum(map(len, kept))


def test_long_words_differ_anywhere():
    base = "abcdefghijklmnopqrstuvwxyz" * 2
    words = [base[:n] for n in range(1, 31)]
    words += [base[:i] + "é" + base[i + 1 : 30] for i in range(30)]
    text = " ".join(words * 2)
    near_misses = " ".join(w[:i] + "7" + w[i + 1 :] for w in words for i in range(5))
    counts = corpus.count_documents(
        [text, near_misses], corpus.Plan(corpus.surface_terms(words))
    )
    assert counts.term_occurrences.tolist() == [2] * len(words)


def test_a_document_of_any_length_is_one(monkeypatch):
    rng = np.random.default_rng(5)
    text = random_text(rng, 4000) + "b" * 300 + "中国" * 50 + " ab"
    words = ["ab", "中国", "国中", "ab ab", "b" * 300, "a ab a", "中a", "b中国"]
    plan = corpus.Plan(corpus.surface_terms(words), window=3)
    whole = corpus.count_documents([text], plan)
    for size in (64, 97, 250):
        monkeypatch.setattr(matching, "BLOCK", size)
        again = corpus.count_documents([text], plan)
        for a, b in zip(whole, again):
            np.testing.assert_equal(a, b)
    hits = [[(p, i) for i, word in enumerate(words) for p in places(word, text)]]
    check(whole, hits, len(words), 3)


@pytest.mark.parametrize("top", [50, 2**32 - 1])
def test_tokens_against_loops(top):
    rng = np.random.default_rng(1)
    names = np.arange(50, dtype=np.uint32) if top < 100 else rng.integers(0, top, 50)
    names[-1] = top - 1
    documents = [
        names[rng.integers(0, 50, n)].astype(np.uint32)
        for n in rng.integers(0, 60, 200)
    ]
    sequences = [
        tuple(names[rng.integers(0, 6 if i % 2 else 50, n)].tolist())
        for i, n in enumerate(rng.integers(1, 4, 60))
    ]
    variants = tuple(zip(sequences[::2], sequences[1::2]))
    terms = corpus.Terms(tuple(map(str, range(30))), variants, "tokens")
    counts = corpus.count_documents(documents, corpus.Plan(terms, window=7))
    hits = []
    for row in (document.tolist() for document in documents if len(document)):
        hits.append(
            sorted(
                {
                    (p, i)
                    for i, own in enumerate(variants)
                    for v in own
                    for p in range(len(row))
                    if tuple(row[p : p + len(v)]) == v
                }
            )
        )
    check(counts, hits, 30, 7)
    assert counts.units == sum(map(len, documents))


def word_tokenizer(words) -> tokenizers.Tokenizer:
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return made


def test_tokens_in_documents_with_a_term():
    rng = np.random.default_rng(2)
    words = [f"w{i}" for i in range(30)]
    tokenizer = word_tokenizer(words)
    texts = [" ".join(rng.choice(words, n)) for n in rng.integers(1, 12, 300)]
    coded = [np.array(tokenizer.encode(text).ids) for text in texts]
    names = ["w3", "w7 w8", "w9", "w29"]
    joint, with_token = collections.Counter(), collections.Counter()
    for text, ids in zip(texts, coded):
        present = set(ids.tolist())
        with_token.update(present)
        own = [i for i, name in enumerate(names) if f" {name} " in f" {text} "]
        joint.update(itertools.product(own, present))
    for terms, documents in (
        (corpus.surface_terms(names), texts),
        (corpus.token_terms(names, tokenizer), texts),
        (corpus.token_terms(names, tokenizer), coded),
    ):
        plan = corpus.Plan(
            terms,
            *(False, None),
            tokens=True,
            term_tokens=True,
            tokenizer=tokenizer,
        )
        counts = corpus.count_documents(documents, plan)
        assert as_counter(counts.term_tokens) == joint
        assert counts.token_documents.tolist() == [with_token[i] for i in range(31)]
        everything = np.bincount(np.concatenate(coded), minlength=31)
        np.testing.assert_array_equal(counts.token_occurrences, everything)
        assert counts.document_pairs is None and counts.window_pairs is None
    rows = corpus.pair_counts(counts.term_tokens, [2, 1], [10, 0], ordered=True)
    assert rows.tolist() == [joint[2, 10], 0]


def test_merging_is_counting_together():
    rng = np.random.default_rng(3)
    words = ["ab", "a", "中", "b b"]
    texts = [random_text(rng, 60) for _ in range(90)]
    plan = corpus.Plan(corpus.surface_terms(words), window=9)
    a, b, c = (corpus.count_documents(texts[i::3], plan) for i in range(3))
    whole = corpus.count_documents(texts, plan)
    for merged in (
        corpus.merge(corpus.merge(a, b), c),
        corpus.merge(c, corpus.merge(b, a)),
        corpus.merge(whole, corpus.count_documents([], plan)),
    ):
        for x, y in zip(merged, whole):
            np.testing.assert_equal(x, y)
    with pytest.raises(ValueError, match="different plans"):
        corpus.merge(a, corpus.count_documents(texts, plan._replace(window=None)))


def test_many_documents_are_multiplied_in_parts(monkeypatch):
    rng = np.random.default_rng(4)
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(rng.choice(words, 15)) for _ in range(500)]
    # Documents without a term among them, alone and a whole batch of them.
    texts[100:130] = ["none"] * 30
    texts[200:300:3] = ["nothing here"] * 34
    tokenizer = word_tokenizer(words)
    plan = corpus.Plan(
        corpus.surface_terms(words), window=4, term_tokens=True, tokenizer=tokenizer
    )
    whole = corpus.count_documents(texts, plan)
    monkeypatch.setattr("jaxling.corpus.cooccurrence._NEAR", 200)
    monkeypatch.setattr("jaxling.corpus.cooccurrence._HELD", 300)
    monkeypatch.setattr("jaxling.corpus.cooccurrence._BATCH", 7)
    again = corpus.count_documents(texts, plan)
    for x, y in zip(whole, again):
        np.testing.assert_equal(x, y)
    assert whole.document_pairs.count.sum() > 10_000
    hits = [
        [(p, words.index(w)) for p, w in enumerate(text.split()) if w in words]
        for text in texts
    ]
    check(whole, hits, len(words), 4)


@pytest.mark.parametrize(
    ("plan", "documents", "words"),
    [
        (corpus.Plan(), [], "needs `terms`"),
        (corpus.Plan(tokens=True), [], "vocabulary_size"),
        (corpus.Plan(corpus.surface_terms(["a"]), window=0), [], "at least 1"),
        (corpus.Plan(corpus.surface_terms(["a"])), [np.arange(3)], "token ids"),
        (corpus.Plan(tokens=True, vocabulary_size=3), ["text"], "`tokenizer`"),
        (corpus.Plan(tokens=True, vocabulary_size=3), [np.arange(4)], "got 3"),
        (corpus.Plan(tokens=True, vocabulary_size=3), [np.array([-1])], "got -1"),
        (corpus.Plan(tokens=True, vocabulary_size=3), [np.zeros(2)], "integers"),
    ],
)
def test_what_cannot_be_counted_is_said(plan, documents, words):
    with pytest.raises(ValueError, match=words):
        corpus.count_documents(documents, plan)
    for nothing in ([], ["  -"]):
        with pytest.raises(ValueError, match="must h"):
            corpus.surface_terms(nothing)
