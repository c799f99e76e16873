"""Documents chosen for pre-training: graph, scores, budgets and arms by hand."""

import itertools

import numpy as np
import pytest

from jaxling import corpus, demo, intervals
from jaxling.corpus import pivots, pools, selection
from jaxling.demo import documents as demo_documents
from jaxling.demo import pool

VOCABULARY = 40


@pytest.fixture
def documents(rng):
    """Documents of two languages, which share the tokens from 30 up."""
    found, languages = [], []
    for row in range(300):
        language = row % 3 == 0
        low = 15 * language
        tokens = rng.integers(low, low + 15, rng.integers(4, 12))
        shared = rng.integers(30, 40, 2)
        if low in tokens:  # token 35 comes with the first token of a language
            shared[0] = 35
        found.append(np.concatenate([tokens, shared]))
        languages.append("ab"[language])
    return found, languages


def counted(documents, languages, nodes):
    plan = corpus.Plan(selection.token_nodes(nodes), vocabulary_size=VOCABULARY)
    parts = [
        corpus.count_documents(
            [d for d, own in zip(documents, languages) if own == language], plan
        )
        for language in dict.fromkeys(languages)
    ]
    return corpus.count_documents(documents, plan), parts


def test_association_is_what_languages_do_not_explain(documents):
    documents, languages = documents
    nodes = np.arange(VOCABULARY)[::-1].copy()
    counts, parts = counted(documents, languages, nodes)
    found = selection.graph(counts, nodes, parts=parts, documents=3, association=0.1)
    sets = [set(document.tolist()) for document in documents]
    edges = set()
    for t, u in itertools.combinations(range(VOCABULARY), 2):
        both = sum({t, u} <= own for own in sets)
        if both < 3:
            continue
        expected = 0.0
        for language in "ab":
            own = [s for s, of in zip(sets, languages) if of == language]
            expected += sum(t in s for s in own) * sum(u in s for s in own) / len(own)
        if np.log(both / expected) / np.log(len(sets) / both) >= 0.1:
            edges.add((t, u))
    assert edges == {
        tuple(sorted(pair))
        for pair in zip(nodes[found.first].tolist(), nodes[found.second].tolist())
    }
    assert (0, 35) in edges and (15, 35) in edges
    degree = [sum(t in edge for edge in edges) for t in nodes]
    np.testing.assert_array_equal(found.degree, degree)
    best = selection.pivot_set(found, 5)
    expected = sorted(range(VOCABULARY), key=lambda t: (-degree[39 - t], t))[:5]
    np.testing.assert_array_equal(best, expected)
    # Within one language two of its tokens are independent here; across both they
    # would not be.
    flat = selection.graph(counts, nodes, parts=[counts], documents=3, association=0.1)
    same = [
        t // 15 == u // 15 < 2 for t, u in zip(nodes[flat.first], nodes[flat.second])
    ]
    assert sum(same) > 1.5 * sum(a // 15 == b // 15 < 2 for a, b in edges)


def test_of_one_language_association_is_normalised_mutual_information(documents):
    documents, _ = documents
    nodes = np.arange(VOCABULARY)
    counts, _ = counted(documents, ["a"] * len(documents), nodes)
    table = np.zeros((VOCABULARY, VOCABULARY), int)
    pairs = counts.document_pairs
    table[pairs.first, pairs.second] = pairs.count
    table += table.T
    alone = counts.term_documents
    np.fill_diagonal(table, alone)
    expected = pivots.mutual_information(table, alone, alone, counts.documents)
    found = selection.graph(
        counts, nodes, parts=[counts], documents=1, association=0.05
    )
    wanted = np.argwhere(np.triu(expected >= 0.05, 1) & (table > 0))
    np.testing.assert_array_equal(np.stack([found.first, found.second], 1), wanted)


def test_the_commonest_tokens_are_nodes_once_they_are_in_two_documents():
    found = selection.commonest(np.array([3, 9, 1, 3, 0, 8]), 4, excluded=[5])
    np.testing.assert_array_equal(found, [1, 0, 3])


def test_a_pool_is_written_once_and_scored_by_its_own_graph(documents, tmp_path):
    documents, languages = documents
    records = [*zip(documents, languages), (np.array([], int), "a")]

    def once():
        yield from records
        records.clear()

    options = dict(vocabulary_size=VOCABULARY + 1)
    pools.write_pool(tmp_path, once(), None, end_token=VOCABULARY, **options)
    pools.write_pool(tmp_path, once(), None, end_token=VOCABULARY, **options)
    found = pools.score_pool(
        tmp_path,
        graph_tokens=30,
        edge_documents=3,
        edge_association=0.1,
        pivot_tokens=5,
        excluded=[VOCABULARY],
        processes=1,
        **options,
    )
    assert found.languages == languages
    ended = [np.append(document, VOCABULARY) for document in documents]
    for one, other in zip(found.documents, ended, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(found.lengths, list(map(len, ended)))
    held = np.zeros(VOCABULARY, int)
    for document in documents:
        held[np.unique(document)] += 1
    nodes = np.argsort(-held, kind="stable")[:30]
    counts, parts = counted(documents, languages, nodes)
    graph = selection.graph(counts, nodes, parts=parts, documents=3, association=0.1)
    best = selection.pivot_set(graph, 5)
    np.testing.assert_array_equal(found.pivots, best)
    shares = [np.isin(document, best).mean() for document in ended]
    np.testing.assert_allclose(found.pivot_score, shares)
    joined = selection.joined_share(documents, graph, VOCABULARY, without=best)
    np.testing.assert_array_equal(found.joined_score, joined)
    assert len(set(shares)) > 5 and len(set(joined.tolist())) > 5


def test_scores_by_hand():
    documents = [np.array([1, 1, 2, 5]), np.array([], int), np.array([7]), np.arange(8)]
    np.testing.assert_allclose(
        selection.share_of(documents, [1, 5], 8), [0.75, 0, 0, 0.25]
    )
    found = selection.Graph(
        np.array([1, 2, 5, 7]), np.array([0, 0]), np.array([1, 2]), np.zeros(4)
    )  # 1-2 and 1-5
    np.testing.assert_allclose(
        selection.joined_share(documents, found, 8), [2 / 3, 0, 0, 2 / 6]
    )
    np.testing.assert_allclose(
        selection.joined_share(documents, found, 8, without=[5]), [1, 0, 0, 1 / 3]
    )


def test_a_budget_is_filled_language_by_language():
    lengths = np.array([5, 5, 5, 4, 4, 4])
    languages = list("aabbab")
    order = [5, 4, 3, 2, 1, 0]
    chosen = selection.select(
        order, lengths, 18, languages=languages, mix={"a": 1, "b": 2}
    )
    # Six tokens of a: 4 and 1; twelve of b: 5, 3 and 2.
    np.testing.assert_array_equal(chosen, [5, 4, 3, 2, 1])
    np.testing.assert_array_equal(selection.select(order, lengths, 8), [5, 4])
    with pytest.raises(ValueError, match="'b' hold 13 tokens.*must hold 20"):
        selection.select(order, lengths, 20, languages=languages, mix={"b": 1.0})
    with pytest.raises(ValueError, match="'c' hold 0 tokens"):
        selection.select(order, lengths, 4, languages=languages, mix={"c": 1.0})
    with pytest.raises(ValueError, match="A mix needs"):
        selection.select(order, lengths, 4, languages=languages, mix={"a": 0.0})
    with pytest.raises(ValueError, match="`budget` must be at least 1"):
        selection.select(order, lengths, 0)


def test_arms_are_equal_in_tokens_and_mix_and_differ_in_what_they_choose(rng):
    count = 400
    lengths = rng.integers(5, 15, count)
    languages = [("a", "b")[i % 4 == 0] for i in range(count)]
    pivot, joined = rng.random(count), rng.random(count)
    mix = selection.equal_mix(languages)
    budget = 900

    def arm(name, seed=0):
        return selection.arm(
            name,
            pivot_score=pivot,
            joined_score=joined,
            lengths=lengths,
            languages=languages,
            mix=mix,
            budget=budget,
            seed=seed,
        )

    chosen = {name: arm(name) for name in selection.ARMS}
    for name, own in chosen.items():
        assert len(set(own.tolist())) == len(own)
        assert budget <= lengths[own].sum() < budget + 2 * 15
        if name != "original":
            for language in "ab":
                part = [i for i in own if languages[i] == language]
                assert budget / 2 <= lengths[part].sum() < budget / 2 + 15
    np.testing.assert_array_equal(chosen["original"], range(len(chosen["original"])))
    for language in "ab":
        best = [i for i in range(count) if languages[i] == language]
        own = {i for i in chosen["pivots"].tolist() if languages[i] == language}
        assert own == set(sorted(best, key=lambda i: -pivot[i])[: len(own)])
        few = {i for i in chosen["co-occurrence"] if languages[i] == language}
        assert max(pivot[list(few)]) <= np.median(pivot[best])
    assert joined[chosen["co-occurrence"]].mean() > joined.mean() + 0.1
    assert set(arm("multilingual", 1)) != set(chosen["multilingual"])
    np.testing.assert_array_equal(arm("multilingual"), chosen["multilingual"])
    with pytest.raises(ValueError, match="`name` must be one of"):
        arm("best")


def test_identifiers_are_functions_by_name():
    assert selection.load_identifier("unicodedata:name")("a") == "LATIN SMALL LETTER A"
    for name in ("no_such_module:f", "json", "json:missing", "string:digits", ""):
        with pytest.raises(ValueError, match="identifier is"):
            selection.load_identifier(name)


def test_the_built_in_pool_holds_labelled_verses_once():
    verses = pool.without_books(demo.verses("held_out"), pool.EVALUATED_BOOKS)
    records = list(pool.labelled_verses(verses, characters=150_000, seed=1))
    assert len(set(records)) == len({(r.language, r.verse) for r in records})
    assert sum(len(r.text) for r in records) >= 150_000
    row = {name: i for i, name in enumerate(verses.names)}
    for record in records:
        assert record.verse.split(".")[0] not in pool.EVALUATED_BOOKS
        codes = record.language.split("+")
        assert tuple(codes) not in demo_documents.UNSEEN_PAIRS
        lines = record.text.split("\n")
        for code in codes:
            content = verses.text[code][row[record.verse]]
            named = f"{demo.LANGUAGES[code]}: {content}"
            assert content and (named in lines if len(codes) > 1 else True)
        if len(codes) == 1:
            assert record.text == " " + verses.text[codes[0]][row[record.verse]]
    pairs = np.mean(["+" in record.language for record in records])
    share = demo_documents.SHARES
    share = share["verse pair"] / (share["verse pair"] + share["verse"])
    # Five standard deviations of a thousand draws are 0.07.
    assert abs(pairs - share) < 0.07
    kept = pool.without_books(verses, ["LUK"], keep=True)
    assert {name.split(".")[0] for name in kept.names} == {"LUK"}
    with pytest.raises(ValueError, match="characters in all"):
        list(
            pool.labelled_verses(
                pool.without_books(verses, ["LUK", "REV", "ROM"]), characters=1, seed=0
            )
        )


def test_intervals_over_seeds_are_student_s():
    found = intervals.over_seeds([1.0, 2.0, 4.0])
    # t(2, 0.975) = 4.302653, s = 1.527525
    half = 4.302653 * 1.527525 / np.sqrt(3)
    np.testing.assert_allclose(found, [7 / 3, 7 / 3 - half, 7 / 3 + half], rtol=1e-6)
    alone = intervals.over_seeds([3.0])
    assert alone.mean == 3 and np.isnan(alone.low) and np.isnan(alone.high)
    with pytest.raises(ValueError, match="at least one"):
        intervals.over_seeds([])
