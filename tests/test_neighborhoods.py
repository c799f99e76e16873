"""Statistics of neighbour lists against loops that say the same."""

import itertools
import time

import numpy as np
import pytest

from jaxling import neighborhoods
from jaxling.dictionaries import read_dictionary, read_frequencies

TOKENS = ["▁dog", "▁Hund", "dog", "▁chien", "▁cat", "▁", "Hund", "7"]
SYSTEMS = ["Latin", "Latin", "Latin", "Latin", "Latin", "Common", "Latin", "Common"]


def random_lists(rng, n=300, vocab=500, k=20, kinds=7):
    indices = np.stack([rng.choice(vocab, k, replace=False) for _ in range(n)])
    indices[rng.random((n, k)) < 0.05] = -1
    indices[3] = -1
    queries = rng.choice(vocab, n, replace=False)
    names = [f"L{i}" for i in rng.integers(0, kinds, vocab) ** 2]
    return indices, queries, names


def test_distinct_labels_counts_sets(rng):
    indices, queries, names = random_lists(rng)
    labels = neighborhoods.encode(names)
    assert [labels.names[code] for code in labels.codes] == names
    expected = [len({names[i] for i in row if i >= 0}) for row in indices]
    found = neighborhoods.distinct_labels(indices, labels)
    assert found.tolist() == expected and 0 in expected
    own = neighborhoods.with_self(indices, queries)
    assert own.shape == (300, 21) and (own[:, 0] == queries).all()
    assert neighborhoods.distinct_labels(own, labels).min() == 1
    assert neighborhoods.distinct_labels(indices[:, :0], labels).tolist() == [0] * 300


def test_more_labels_than_a_short_integer_holds():
    labels = neighborhoods.encode([str(i) for i in range(70_000)])
    indices = np.array([[0, 69_999, 4_464, -1]])  # 70,000 - 65,536 = 4,464
    assert neighborhoods.distinct_labels(indices, labels).tolist() == [3]


@pytest.mark.parametrize("block", [7, 100_000])
def test_label_matrix_matches_a_loop(rng, monkeypatch, block):
    monkeypatch.setattr(neighborhoods, "_BLOCK", block)
    indices, queries, names = random_lists(rng)
    found = neighborhoods.label_matrix(indices, queries, neighborhoods.encode(names))
    for a, row in enumerate(found.names):
        lists = [indices[i] for i, query in enumerate(queries) if names[query] == row]
        assert found.tokens[a] == len(lists)
        for b, column in enumerate(found.names):
            counts = [sum(names[j] == column for j in x if j >= 0) for x in lists]
            kept = [count for count in counts if count]
            np.testing.assert_allclose(found.mean[a, b], np.mean(counts))
            np.testing.assert_allclose(found.mean_where_present[a, b], np.mean(kept))


def test_the_clean_rows_add_up_to_the_lists_length(rng):
    indices, queries, names = random_lists(rng)
    full = np.abs(indices)
    found = neighborhoods.label_matrix(full, queries, neighborhoods.encode(names))
    np.testing.assert_allclose(found.mean.sum(axis=1), 20)
    assert (found.mean_where_present >= found.mean).all()


def test_labels_without_tokens_are_not_numbers():
    labels = neighborhoods.encode(SYSTEMS)
    found = neighborhoods.label_matrix(np.array([[1, 2]]), np.array([0]), labels)
    assert found.names == ["Common", "Latin"] and found.tokens.tolist() == [0, 1]
    np.testing.assert_array_equal(found.mean, [[np.nan, np.nan], [0, 2]])
    np.testing.assert_array_equal(found.mean_where_present[1], [np.nan, 2])


def test_spread_of_small_lists():
    found = neighborhoods.spread(np.array([1, 1, 4]))
    assert (found.mean, found.histogram.tolist()) == (2.0, [0, 2, 0, 0, 1])
    np.testing.assert_allclose(found.std, np.sqrt(3))
    assert neighborhoods.spread(np.array([2])).std == 0
    assert np.isnan(neighborhoods.spread(np.array([], dtype=int)).mean)


def test_hubness_of_equal_and_of_planted_shares():
    equal = neighborhoods.hubness(np.full(100, 5))
    assert equal[:5] == (0.0, 0.0, 0.0, 0.0, 5)
    planted = np.zeros(100, dtype=int)
    planted[[7, 3]] = 300, 200
    found = neighborhoods.hubness(planted, top=3)
    assert found.hubs.tolist() == [3, 7, 0] or found.hubs.tolist() == [7, 3, 0]
    assert found.hubs[0] == 7 and found.largest == 300
    assert (found.hub_occurrence, found.antihub_occurrence) == (1.0, 0.98)
    np.testing.assert_allclose(found.robin_hood_index, 0.98)
    centred = planted - 5.0
    skewness = (centred**3).mean() / (centred**2).mean() ** 1.5
    np.testing.assert_allclose(found.k_skewness, skewness)
    with pytest.raises(ValueError, match="k_occurrence"):
        neighborhoods.hubness(np.zeros(4))


def test_deciles_hold_a_tenth_each_and_never_split_ties(rng):
    distinct = neighborhoods.frequency_deciles(rng.permutation(1_000))
    assert np.bincount(distinct).tolist() == [0] + [100] * 10
    order = np.argsort(distinct, kind="stable")
    assert distinct[order[0]] == 1 and distinct[order[-1]] == 10
    tied = neighborhoods.frequency_deciles(np.array([0] * 40 + list(range(1, 61))))
    assert set(tied[:40]) == {2} and tied[-1] == 10 and tied[40] == 5
    assert neighborhoods.frequency_deciles(np.array([3])).tolist() == [1]


def test_group_means_match_a_loop(rng):
    groups, values = rng.integers(0, 5, 200), rng.normal(size=200)
    found = neighborhoods.group_means(groups, values, 6)
    for group in range(5):
        mine = values[groups == group]
        np.testing.assert_allclose(found.mean[group], mine.mean())
        np.testing.assert_allclose(found.std[group], mine.std(ddof=1))
    assert np.isnan(found.mean[5]) and found.size[5] == 0


def test_translations_are_found_in_either_direction():
    dictionary = [("dog", "hund"), ("chien", "DOG"), ("cat", "gato"), ("7", "7")]
    indices = np.array([[2, 6], [3, 0], [5, 4], [5, 7], [0, 1], [2, 4], [4, 5], [0, 1]])
    found = neighborhoods.translations(indices, np.arange(8), TOKENS, dictionary)
    # The cat has no translation that is a token, 7 none but itself.
    assert found.rows.tolist() == [0, 1, 2, 3, 6]
    assert found.ranks.tolist() == [2, 2, 0, 0, 0]
    assert (found.rate, found.rate_at(1), found.rate_at(2)) == (0.4, 0.0, 0.4)
    # Two tokens of eight translate `hund` and `chien`, three `dog`.
    shares = np.array([3, 2, 3, 2, 2]) / 8
    np.testing.assert_allclose(found.chance, (1 - (1 - shares) ** 2).mean())


def test_translations_of_nothing():
    found = neighborhoods.translations(
        np.array([[1]]), np.array([0]), TOKENS, [("x", "y")]
    )
    assert found.rows.size == 0 and np.isnan(found.rate) and np.isnan(found.rate_at(1))


def test_a_full_vocabulary_takes_seconds(rng):
    vocab = 250_000
    indices = rng.integers(-1, vocab, (vocab, 50), dtype=np.int32)
    queries = np.arange(vocab)
    tokens = [f"▁{i}" for i in range(vocab)]
    labels = neighborhoods.encode([f"L{i % 41}" for i in range(vocab)])
    dictionary = [(f"{i}", f"{i + 9}") for i in range(0, 100_000, 2)]
    begin = time.process_time()
    own = neighborhoods.with_self(indices, queries)
    neighborhoods.distinct_labels(own, labels)
    neighborhoods.label_matrix(own, queries, labels)
    neighborhoods.translations(indices, queries, tokens, dictionary)
    neighborhoods.hubness(np.bincount(indices[indices >= 0], minlength=vocab))
    assert time.process_time() - begin < 30  # 5 s on one busy core


def test_a_dictionary_is_read_by_tab_or_space(tmp_path):
    path = tmp_path / "en-fr.txt"
    path.write_bytes("\ufeffcat\tchat\r\n\ndog chien\nice cream\tla glace\n".encode())
    pairs = [("cat", "chat"), ("dog", "chien"), ("ice cream", "la glace")]
    assert read_dictionary(path) == pairs


@pytest.mark.parametrize(
    "content, message",
    [
        (b"one\n", "line 1"),
        (b"a b\nc d e\n", "line 2"),
        (b"a\t\n", "line 1"),
        (b"\n \n", "no word pair"),
        (b"\xff\xfe a", "UTF-8"),
    ],
)
def test_a_damaged_dictionary_is_named(tmp_path, content, message):
    (tmp_path / "d.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"d.txt.*{message}"):
        read_dictionary(tmp_path / "d.txt")


def test_striking_tokens_are_readable_and_mixed():
    words = ["▁king", "▁ox", "king", "▁мир", "▁два", "▁три", "水火", "▁123", "▁water"]
    systems = ["Latin"] * 3 + ["Cyrillic"] * 3 + ["Han", "Common", "Latin"]
    wide, narrow, digits = [0, 3, 6], [3, 3, 6], [7, 7, 3]
    lists = np.array([wide, wide, wide, wide, narrow, digits, narrow, wide, [0, 8, -1]])
    queries = np.arange(9)
    far = np.full(lists.shape, 0.5)
    found = neighborhoods.striking(lists, far, queries, words, systems, top=4)
    # Widest first, one of each system, then others: no fragment, no number. Numbers
    # among the neighbours are no writing system.
    assert [words[i] for i in found] == ["▁king", "▁мир", "水火", "▁два"]
    # Of equally wide ones the closest; a list with an empty place comes last.
    for i, value in ((3, 0.25), (0, np.nan)):
        other = far.copy()
        other[i] = value
        found = neighborhoods.striking(lists, other, queries, words, systems, top=4)
        assert [words[i] for i in found] == ["▁мир", "▁king", "水火", "▁два"]
    none = neighborhoods.striking(lists[:0], far[:0], np.arange(0), words, systems)
    assert none == []
    pieces = ["##ing", "sing", "water"]
    lists = np.zeros((3, 2), np.int32)
    far = np.zeros((3, 2))
    found = neighborhoods.striking(lists, far, np.arange(3), pieces, ["Latin"] * 3)
    assert [pieces[i] for i in found] == ["sing", "water"]


def lists_with_a_hub(rng, n, k, hub):
    """Each row first, the hub with it, and others at random."""
    lists = []
    for row in range(n):
        near = [row] + [hub] * (row != hub)
        others = np.setdiff1d(np.arange(n), near)
        lists.append(near + rng.choice(others, k - len(near), replace=False).tolist())
    return np.array(lists)


def test_relabelled_hubs_stay_hubs(rng):
    lists, new = lists_with_a_hub(rng, 40, 5, hub=7), rng.permutation(40)
    lists[3, 4] = -1
    found = neighborhoods._relabelled(lists, new)
    times, before = (np.bincount(x[x >= 0], minlength=40) for x in (found, lists))
    assert before[7] == 40  # in every list
    np.testing.assert_array_equal(times[new], before)
    np.testing.assert_array_equal(found[:, 0], np.arange(40))  # rows go with their ids
    assert found[new[3], 4] == -1


def test_chance_is_that_of_all_relabellings(rng):
    n = 5
    a, b = (lists_with_a_hub(rng, n, 3, hub) for hub in (1, 4))
    every = []
    for new in itertools.permutations(range(n)):
        moved = {new[row]: {new[i] for i in b[row]} for row in range(n)}
        every.append(np.mean([len(set(a[row]) & moved[row]) for row in range(n)]))
    found = neighborhoods.shared_by_chance(a, b, permutations=2000)
    assert np.min(np.abs(found[:, None] - every), axis=1).max() < 1e-12
    values, share = np.unique(np.round(every, 9), return_counts=True)
    assert len(values) > 2
    share = share / len(every)
    drawn = np.mean(np.round(found, 9)[:, None] == values, axis=0)
    # Four standard errors of each share of 2,000 draws.
    assert np.all(np.abs(drawn - share) < 4 * np.sqrt(share * (1 - share) / 2000))


def test_frequencies_are_read_by_token(tmp_path):
    path = tmp_path / "counts.tsv"
    path.write_bytes("\ufeff▁the\t12\r\nother\t3\n\na\tb\t4.5\n".encode())
    found = read_frequencies(path, ["a\tb", "▁the", "▁rare"])
    np.testing.assert_array_equal(found, [4.5, 12, 0])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"the 12\n", "line 1: a line holds a token, a tab"),
        (b"a\t1\nthe\t-3\n", "line 2"),
        (b"a\tnan\n", "line 1"),
        (b"other\t3\n", "names none of the model's 2 tokens"),
        (b"\xff\xfe\t1", "must be UTF-8"),
    ],
)
def test_bad_frequencies_are_one_sentence(tmp_path, content, message):
    path = tmp_path / "counts.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_frequencies(path, ["the", "a"])
