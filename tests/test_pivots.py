"""Semantic pivots and the selection of documents, against counts made by hand."""

import itertools

import numpy as np
import pytest

from jaxling import cloned_languages, corpus
from jaxling.corpus import pivots, selection

SIZE = 60


def dense(documents, vocabulary):
    """`[token, token]` documents that hold both, the obvious way."""
    held = np.zeros((len(documents), vocabulary), np.int64)
    for row, document in enumerate(documents):
        held[row, list(set(document))] = 1
    return held.T @ held


def test_excess_and_association_by_hand():
    # Four documents; word 0 is in two of them, token 1 in both of those and nowhere
    # else, token 2 everywhere, token 3 in one with the word and one without.
    together = np.array([[2, 2, 1, 0]])
    found = pivots.excess(together, np.array([2]), np.array([2, 4, 2, 1]), 4)
    np.testing.assert_allclose(found, [[0.5, 0, 0, -0.25]])
    found = pivots.mutual_information(
        together, np.array([2]), np.array([2, 4, 2, 1]), 4
    )
    np.testing.assert_allclose(found, [[1, 0, 0, -1]], atol=1e-12)
    everywhere = pivots.mutual_information(
        np.array([[4]]), np.array([4]), np.array([4]), 4
    )
    np.testing.assert_array_equal(everywhere, [[0]])


def test_a_word_in_no_document_has_no_pivots():
    together = np.array([[0, 0], [2, 1]])
    counts = (np.array([0, 2]), np.array([3, 2]), 4)
    found = pivots.excess(together, *counts)
    assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()
    assert np.isnan(pivots.mutual_information(together, *counts)[0]).all()
    none = pivots.candidates(found[:1], found[1:], k=2)
    assert none.sets() == [[]] and np.isnan(none.scores).all()


def test_candidates_are_the_paper_s_minimum_best_first_and_ties_by_id():
    source = np.array([[0.5, 0.2, 0.4, 0.4, 0.9, -0.1]])
    target = np.array([[0.3, 0.8, 0.4, 0.6, 0.9, 0.9]])
    found = pivots.candidates(source, target, k=4, excluded=[[4]])
    np.testing.assert_array_equal(found.tokens, [[2, 3, 0, 1]])
    np.testing.assert_allclose(found.scores, [[0.4, 0.4, 0.3, 0.2]])
    longer = pivots.candidates(source, target, k=9, excluded=[[4]])
    assert longer.sets() == [[2, 3, 0, 1]] and longer.tokens.shape == (1, 6)


def test_a_filter_keeps_order_and_closes_gaps():
    found = pivots.Pivots(
        np.array([[5, 3, 8, -1], [2, -1, -1, -1]]),
        np.array([[0.9, 0.8, 0.7, np.nan], [0.5, np.nan, np.nan, np.nan]]),
    )
    relation = np.array([[0.1, 0.4, 0.2, np.nan], [0.0, np.nan, np.nan, np.nan]])
    kept = pivots.keep(found, relation, 0.2)
    assert kept.sets() == [[3, 8], []]
    np.testing.assert_array_equal(kept.scores[0], [0.8, 0.7, np.nan, np.nan])
    assert pivots.keep(found, relation, 0.0).sets() == found.sets()


def test_similarity_is_to_the_less_similar_word(rng):
    table = rng.standard_normal((9, 5))
    found = pivots.Pivots(np.array([[7, 2, -1]]), np.array([[0.4, 0.3, np.nan]]))
    measured = pivots.similarity(table, found, [[0, 1]], [[4]])

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    words = table[[0, 1]].mean(0), table[4]
    expected = [min(cosine(table[t], word) for word in words) for t in (7, 2)]
    np.testing.assert_allclose(measured[0, :2], expected)
    assert np.isnan(measured[0, 2])


@pytest.mark.parametrize(
    "counts, message",
    [
        (([[3]], [2], [4], 5), "No corpus"),
        (([[1]], [2], [6], 5), "No corpus"),
        (([[1, 1]], [2], [2], 5), "must be .word, token."),
        (([[0]], [0], [0], 0), "`documents` must be at least 1"),
    ],
)
def test_impossible_counts_are_refused(counts, message):
    together, words, tokens, documents = counts
    arguments = np.array(together), np.array(words), np.array(tokens), documents
    for measure in (pivots.excess, pivots.mutual_information):
        with pytest.raises(ValueError, match=message):
            measure(*arguments)


def sentences(rng, count):
    """Sentences of words of unequal frequency, some of which come in pairs."""
    share = 1 / np.arange(2, SIZE + 2)
    drawn = rng.choice(SIZE, (count, 5), p=share / share.sum())
    partner = drawn[:, 0] ^ 1  # word 2i brings 2i + 1 along, and the other way round
    return (
        np.concatenate([drawn, partner[:, None]], 1) + cloned_languages.SPECIAL
    ).tolist()


@pytest.mark.parametrize("bridges", [1, 2, 3])
def test_known_pivots_of_cloned_languages_are_found(rng, bridges):
    """A word and its clone never meet: its clones in the bridges are the pivots."""
    drawn = cloned_languages.bridged_documents(
        sentences(rng, 400), SIZE, bridges=bridges, parallel_share=0.5, seed=0
    )
    documents = [document.tokens for document in itertools.islice(drawn, 6000)]
    vocabulary = cloned_languages.SPECIAL + (2 + bridges) * SIZE
    counts = dense(documents, vocabulary)
    words = cloned_languages.SPECIAL + np.arange(SIZE)
    assert not counts[words, words + SIZE].any()
    rows = np.concatenate([words, words + SIZE])
    alone = counts.diagonal()
    arguments = counts[rows], alone[rows], alone, len(documents)
    found = pivots.excess(*arguments)
    own = [[t, t + SIZE, *range(cloned_languages.SPECIAL)] for t in words]
    truth = [[t + (2 + i) * SIZE for i in range(bridges)] for t in words]
    sides = found[:SIZE], found[SIZE:]

    exact = pivots.agreement(pivots.candidates(*sides, k=bridges, excluded=own), truth)
    assert exact.precision >= 0.95 and exact.recall >= 0.95 and exact.first >= 0.98
    many = pivots.candidates(*sides, k=30, excluded=own)
    before = pivots.agreement(many, truth)
    assert before.recall == 1 and before.precision < 0.2
    association = pivots.mutual_information(*arguments)
    association = pivots.weaker(association[:SIZE], association[SIZE:], many)
    after = pivots.agreement(pivots.keep(many, association, 0.2), truth)
    assert after.precision > 4 * before.precision and after.recall >= 0.95

    # Words drawn as pairs at random have no pivot in common but by chance.
    turned = pivots.candidates(sides[0], np.roll(sides[1], 2, 0), k=bridges)
    assert pivots.agreement(turned, truth).precision < 0.3


def test_counts_of_a_corpus_give_pivots_and_their_company(monkeypatch):
    # Words 0 and 1; token 2 is beside both, token 3 beside one, token 4 anywhere.
    documents = [[0, 2, 4]] * 3 + [[1, 2, 4]] * 2 + [[1, 2], [0, 3, 4], [4], [5], [4]]
    counts = corpus.count_documents(
        map(np.array, documents),
        corpus.Plan(
            selection.token_nodes([0, 1, 9]),
            pairs=False,
            term_tokens=True,
            vocabulary_size=10,
        ),
    )
    found = pivots.find(counts, [0, 2], [1, 1], k=3, excluded=[{0, 1}, ()])
    assert found.pivots.sets() == [[2], []]
    # Shares: 3/4 and 3/3 of the words' documents, and 6/10 of all.
    np.testing.assert_allclose(found.pivots.scores[0, 0], 3 / 4 - 6 / 10)
    np.testing.assert_array_equal(found.together[0], [3, np.nan, np.nan])
    np.testing.assert_array_equal(found.documents, [[4, 3], [0, 3]])
    company = pivots.company(found, found.pivots)
    np.testing.assert_allclose(company, [np.log(3), 0])
    nothing = pivots.keep(found.pivots, found.association, 2.0)
    np.testing.assert_array_equal(pivots.company(found, nothing), [0, 0])
    monkeypatch.setattr(pivots, "_BLOCK", 1)
    again = pivots.find(counts, [0, 2], [1, 1], k=3, excluded=[{0, 1}, ()])
    np.testing.assert_equal(again, found)
    with pytest.raises(ValueError, match="term_tokens=True"):
        pivots.find(counts._replace(term_tokens=None), [0], [1])


def test_agreement_counts_by_hand():
    found = pivots.Pivots(np.array([[4, 7], [5, -1], [6, 2]]), np.zeros((3, 2)))
    measured = pivots.agreement(found, [[7, 9], [5], []])
    assert measured == (2 / 3, 2 / 3, 0.5, 1.0)
    with pytest.raises(ValueError, match="`truth` must"):
        pivots.agreement(found, [[], [], []])
