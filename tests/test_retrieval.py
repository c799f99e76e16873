"""Retrieval against dense formulas and planted translations."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial.distance
import sklearn.cluster
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxling import retrieval


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def scores_oracle(method, x, y, neighborhood, beta):
    """Every score of every pair, dense, in float64."""
    cosine = unit(x) @ unit(y).T
    near = np.sort(cosine, 1)[:, ::-1][:, :neighborhood].mean(1)[:, None]
    near_back = np.sort(cosine, 0)[::-1][:neighborhood].mean(0)[None]
    return {
        "nearest": cosine,
        "csls": 2 * cosine - near - near_back,
        "inverted_softmax": beta * cosine - np.log(np.exp(beta * cosine).sum(0)),
        "margin_ratio": cosine / ((near + near_back) / 2),
    }[method]


@pytest.mark.parametrize("method", retrieval.METHODS)
def test_every_method_orders_by_its_formula(rng, method):
    x, y = rng.normal(size=(40, 6)) + 1, rng.normal(size=(33, 6)) + 1
    expected = scores_oracle(method, x, y, 10, 30.0)
    if method == "margin_ratio":  # defined over the nearest 10 only
        cosine = unit(x) @ unit(y).T
        far = cosine < np.sort(cosine, 1)[:, -10][:, None]
        expected[far] = -np.inf
    found = retrieval.translate(x.astype("f"), y.astype("f"), k=5, method=method)
    order = np.argsort(-expected, axis=1)[:, :5]
    np.testing.assert_array_equal(found.indices, order)
    best = np.take_along_axis(expected, order, 1)
    # Inverse temperature 30 multiplies the float32 rounding of the cosines.
    np.testing.assert_allclose(found.scores, best, atol=2e-5)


def test_a_margin_over_what_is_not_positive_is_none(rng):
    """Its ratio would be largest for the pairs that lie farthest apart."""
    x, y = (np.abs(rng.normal(size=(9, 4))) for _ in range(2))
    found = retrieval.translate(x, -y, k=3, method="margin_ratio")
    assert (found.indices == -1).all() and np.isnan(found.scores).all()
    assert len(retrieval.mine_bitext(x, -y).pairs) == 0
    y[2:] *= -1  # the first two are all that is near anything
    found = retrieval.translate(x, y, k=2, method="margin_ratio", neighborhood=2)
    np.testing.assert_array_equal(np.sort(found.indices, 1), [[0, 1]] * 9)
    assert len(retrieval.mine_bitext(x, y, k=2).pairs) > 0


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_margins_of_few_centred_rows_are_defined(n, seed):
    """Their cosines are about as often negative; of two the mean is exactly zero."""
    rng = np.random.default_rng(seed)
    x, y = (z - z.mean(0) for z in rng.normal(size=(2, n, 6)))
    cosine = unit(x) @ unit(y).T
    near = (cosine.mean(1)[:, None] + cosine.mean(0)) / 2
    assert ((near > 1e-4) | (near < 1e-7)).all()  # far from where rounding decides
    expected = np.where(near > 1e-6, cosine / np.where(near > 1e-6, near, 1), -np.inf)
    found = retrieval.translate(x, y, k=n, method="margin_ratio", neighborhood=4)
    order = np.argsort(-expected, axis=1)
    best = np.take_along_axis(expected, order, 1)
    there = best > -np.inf
    np.testing.assert_array_equal(found.indices, np.where(there, order, -1))
    np.testing.assert_allclose(found.scores, np.where(there, best, np.nan), rtol=1e-2)
    assert there.any() == (n > 2)


def test_sides_that_do_not_fit_are_named_in_their_own_terms(rng):
    x = rng.normal(size=(5, 3))
    for left, right in [(x, x[:0]), (x[:0], x), (x, x[:, :2]), (x[0], x)]:
        for ask in (retrieval.translate, retrieval.mine_bitext):
            with pytest.raises(ValueError, match="`source` and `target` must be rows"):
                ask(left, right)
    with pytest.raises(ValueError, match="`k` must be at least 1; got 0"):
        retrieval.mine_bitext(x, x, k=0)


@pytest.mark.parametrize("method", retrieval.METHODS)
def test_words_without_a_vector_are_nobodys_translation(rng, method):
    x, y = (rng.normal(size=(12, 6)).astype("f") for _ in range(2))
    x[3] = y[[0, 7]] = 0
    found = retrieval.translate(x, y, k=12, method=method, neighborhood=12)
    assert (found.indices[3] == -1).all() and np.isnan(found.scores[3]).all()
    rest = np.delete(found.indices, 3, axis=0)
    assert not np.isin(rest, [0, 7]).any() and (np.sort(rest, 1)[:, :2] == -1).all()
    left, right = np.delete(x, 3, axis=0), np.delete(y, [0, 7], axis=0)
    alone = retrieval.translate(left, right, k=10, method=method, neighborhood=12)
    kept = np.delete(np.arange(12), [0, 7])
    expected = np.where(alone.indices < 0, -1, kept[alone.indices])
    np.testing.assert_array_equal(rest[:, :10], expected)
    np.testing.assert_allclose(
        np.delete(found.scores, 3, axis=0)[:, :10], alone.scores, atol=2e-5
    )


def test_words_have_the_mean_of_the_tokens_that_are_known():
    class Tokenizer:
        unk_token_id = 1

        def __call__(self, words, add_special_tokens):
            ids = {" ab": [2, 3], " a?": [2, 1], " ?": [1], " ": [], " far": [9]}
            return {"input_ids": [ids[word] for word in words]}

    matrix = np.array([[0, 0], [9, 9], [4, 0], [0, 6]], "f")
    words = ["ab", "a?", "?", "", "far"]
    found = retrieval.word_vectors(Tokenizer(), matrix, words)
    np.testing.assert_array_equal(found, [[2, 3], [4, 0], [0, 0], [0, 0], [0, 0]])
    rows = retrieval.aligned(found)
    assert not rows[2:].any()
    np.testing.assert_allclose(rows[:2].sum(0), 0, atol=1e-6)
    assert not retrieval.aligned(np.zeros((2, 3))).any()


def test_an_unknown_method_is_named(rng):
    with pytest.raises(ValueError, match="'best'"):
        retrieval.translate(np.eye(3), np.eye(3), k=1, method="best")


def test_csls_finds_what_a_hub_hides(rng):
    """A target close to everything is nearest to many, and best by CSLS for few."""
    x = unit(rng.normal(size=(60, 20)) + 0.8)
    y = np.concatenate([x + 0.3 * rng.normal(size=x.shape), x.mean(0, keepdims=True)])
    found = {
        method: np.asarray(retrieval.translate(x, y, k=1, method=method).indices)[:, 0]
        for method in ("nearest", "csls")
    }
    right = {method: np.mean(i == np.arange(60)) for method, i in found.items()}
    assert right["csls"] > right["nearest"]


def test_induction_by_hand():
    lists = np.array([[3, 1, 2], [0, 1, 2], [4, 4, -1]])
    gold = {10: {1}, 11: {0, 9}, 12: {7}, 13: {2}}
    found = retrieval.evaluate_induction(lists, [10, 11, 12], gold, at=(1, 2))
    assert found.precision_at == {1: 1 / 3, 2: 2 / 3}
    assert found.mrr == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert found.coverage == 3 / 4 and found.words == 3


def test_induction_after_a_planted_rotation_is_perfect_and_under_noise_is_not(rng):
    x = rng.normal(size=(200, 16))
    turn = scipy.linalg.qr(rng.normal(size=(16, 16)))[0]
    gold = {i: {i} for i in range(200)}
    reached = []
    for noise in (0.0, 2.0):
        y = x @ turn + noise * rng.normal(size=x.shape)
        mapped = x @ np.asarray(retrieval.kernels.procrustes(x[:50], y[:50]))
        lists = retrieval.translate(mapped, y, k=10).indices
        reached.append(retrieval.evaluate_induction(lists, range(200), gold))
    assert reached[0].precision_at[1] == 1 and reached[0].mrr == 1
    assert reached[1].precision_at[1] < 0.9


def test_induction_refuses_what_it_cannot_answer():
    with pytest.raises(ValueError, match="lists' length"):
        retrieval.evaluate_induction(np.zeros((1, 3), int), [0], {0: {1}}, at=(5,))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        retrieval.evaluate_induction(np.zeros((1, 3), int), [0], {1: {1}}, at=(1,))


def test_bitext_keeps_only_pairs_that_choose_each_other(rng):
    x = rng.normal(size=(50, 12))
    order = rng.permutation(50)
    y = np.concatenate([(x + 0.1 * rng.normal(size=x.shape))[order], -x[:7]])
    found = retrieval.mine_bitext(x, y)
    gold = np.stack([order, np.arange(50)], 1)
    assert retrieval.pair_f1(found.pairs, gold) == 1
    assert np.all(np.diff(found.margins) <= 0)
    assert len(set(found.pairs[:, 0])) == len(set(found.pairs[:, 1])) == 50
    assert retrieval.pair_f1(found.pairs[:25], gold) == pytest.approx(2 / 3)
    assert retrieval.pair_f1(np.zeros((0, 2)), np.zeros((0, 2))) == 0


def mined_oracle(x, y, k):
    """Both directions by dense ratio margin, and those pairs that they agree on."""
    cosine = unit(x) @ unit(y).T
    margin = scores_oracle("margin_ratio", x, y, k, 1.0)
    forward = np.where(cosine >= np.sort(cosine, 1)[:, -k][:, None], margin, -np.inf)
    backward = np.where(cosine >= np.sort(cosine, 0)[-k], margin, -np.inf)
    there, home = forward.argmax(1), backward.argmax(0)
    mutual = [(i, j) for i, j in enumerate(there) if home[j] == i]
    return sorted(mutual, key=lambda pair: -margin[pair]), margin


@pytest.mark.parametrize("k", [1, 4])
def test_mined_pairs_are_those_that_both_directions_choose(rng, k):
    """Weakly related spaces: many choices are not returned."""
    x = rng.normal(size=(60, 8)) + 1
    y = np.concatenate([x[:45] + 0.9 * rng.normal(size=(45, 8)), x[:9] + 2])
    expected, margin = mined_oracle(x, y, k)
    found = retrieval.mine_bitext(x, y, k=k)
    assert 20 < len(expected) < 45  # one-sided choices are many
    np.testing.assert_array_equal(found.pairs, expected)
    np.testing.assert_allclose(found.margins, margin[tuple(found.pairs.T)], rtol=1e-5)
    other = retrieval.mine_bitext(y, x, k=k)
    assert set(map(tuple, other.pairs[:, ::-1])) == set(map(tuple, found.pairs))


def test_pair_f1_by_hand():
    gold = [(0, 0), (1, 1), (2, 2), (3, 3)]
    wrong_and_right = [(0, 0), (1, 2), (3, 3), (3, 3)]  # two of three, of four
    assert retrieval.pair_f1(wrong_and_right, gold) == pytest.approx(4 / 7)
    assert retrieval.pair_f1([(b, a) for a, b in [(0, 1), (5, 6)]], gold) == 0
    assert retrieval.pair_f1(gold[::-1], gold) == 1
    assert retrieval.pair_f1([], gold) == 0 == retrieval.pair_f1(gold, [])


def test_languages_of_a_planted_family_cluster(rng):
    roots = rng.normal(size=(2, 20))
    vectors, languages = [], []
    for name in ["lav", "eng", "deu", "lit"]:
        family = roots[int(name[0] == "l")]
        vectors.append(family + 0.2 * rng.normal(size=(30, 20)))
        languages += [name] * 30
    centroids = retrieval.language_centroids(np.concatenate(vectors), languages)
    labels = retrieval.cluster_languages(centroids, 2)  # deu, eng, lav, lit
    assert labels[0] == labels[1] != labels[2] == labels[3]
    similarity = retrieval.language_similarity(centroids)
    expected = sklearn.metrics.pairwise.cosine_similarity(centroids)
    np.testing.assert_allclose(similarity, expected, atol=1e-12)
    assert np.isnan(retrieval.language_similarity(np.eye(3) * [1, 1, 0])[2]).all()


def test_clusters_are_those_of_scikit_learn(rng):
    centroids = rng.normal(size=(14, 5)) + 2 * np.eye(5)[rng.integers(0, 5, 14)]
    for clusters in (2, 4):
        model = sklearn.cluster.AgglomerativeClustering(
            clusters, metric="cosine", linkage="average"
        )
        labels = retrieval.cluster_languages(centroids, clusters)
        expected = model.fit_predict(centroids)
        assert sklearn.metrics.adjusted_rand_score(labels, expected) == 1


def test_languages_that_cannot_be_grouped_are_refused(rng):
    x = rng.normal(size=(3, 4))
    for centroids, clusters in [(x[:1], 1), (x, 0)]:
        with pytest.raises(ValueError, match="At least two centroids and one cluster"):
            retrieval.cluster_languages(centroids, clusters)
    with pytest.raises(ValueError, match="finite and not zero"):
        retrieval.cluster_languages(x * [[1], [0], [1]], 2)
    for languages in (["a"], []):
        with pytest.raises(ValueError, match="one for each row"):
            retrieval.language_centroids(x[: 3 * len(languages)], languages)


def test_mantel_counts_what_enumeration_counts(rng):
    a, b = (scipy.spatial.distance.pdist(rng.normal(size=(5, 2))) for _ in range(2))
    a, b = (scipy.spatial.distance.squareform(v) for v in (a, b))
    upper = np.triu_indices(5, 1)
    every = [
        np.corrcoef(a[upper], b[np.ix_(order, order)][upper])[0, 1]
        for order in itertools.permutations(range(5))
    ]
    found = retrieval.mantel(a, b, permutations=4000)
    assert found.correlation == pytest.approx(every[0])
    share = np.mean(np.array(every) >= every[0] - 1e-12)
    # Four standard errors of a share of 4000 draws.
    error = 4 * np.sqrt(share * (1 - share) / 4000) + 1 / 4000
    assert found.p_value == pytest.approx(share, abs=error)


def test_mantel_finds_agreement_and_its_absence(rng):
    points = rng.normal(size=(12, 3))
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    noisy = distances + 0.05 * np.abs(np.subtract.outer(*[np.arange(12.0)] * 2))
    near = retrieval.mantel(distances, noisy, permutations=199)
    assert near.correlation > 0.9 and near.p_value == 1 / 200
    other = rng.normal(size=(12, 3))
    far = np.linalg.norm(other[:, None] - other[None], axis=-1)
    assert retrieval.mantel(distances, far, permutations=199).p_value > 0.05
    unknown = distances.copy()
    unknown[0, 1] = unknown[1, 0] = np.nan
    for undefined in (np.ones((12, 12)), np.full((12, 12), 0.1), unknown):
        assert np.isnan(retrieval.mantel(distances, undefined, permutations=9)).all()
    for permutations in (-1, 0):
        with pytest.raises(ValueError, match="`permutations` must be at least 1"):
            retrieval.mantel(distances, far, permutations=permutations)
    with pytest.raises(ValueError, match="symmetric"):
        retrieval.mantel(distances, np.triu(distances))
    with pytest.raises(ValueError, match="at least 3"):
        retrieval.mantel(np.eye(2), np.eye(2))


@pytest.mark.parametrize("method", retrieval.METHODS)
def test_one_row_and_equal_spaces_translate_to_themselves(rng, method):
    x = rng.normal(size=(9, 5))
    found = retrieval.translate(x, 3 * x, k=1, method=method, neighborhood=4)
    np.testing.assert_array_equal(found.indices[:, 0], np.arange(9))
    alone = retrieval.translate(x[:1], x[:1], k=3, method=method)
    np.testing.assert_array_equal(alone.indices, [[0, -1, -1]])
    assert np.isfinite(alone.scores[0, 0]) and np.isnan(alone.scores[0, 1:]).all()


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32 - 1).map(np.random.default_rng), st.floats(-3, 3))
def test_mining_ignores_rotation_scale_and_order(rng, exponent):
    x, y = rng.normal(size=(20, 6)) + 1, rng.normal(size=(17, 6)) + 1
    turn = scipy.linalg.qr(rng.normal(size=(6, 6)))[0]
    rows, columns = rng.permutation(20), rng.permutation(17)
    found = retrieval.mine_bitext(x, y)
    other = retrieval.mine_bitext(
        10.0**exponent * (x @ turn)[rows], (y @ turn)[columns]
    )
    there = np.stack([rows[other.pairs[:, 0]], columns[other.pairs[:, 1]]], 1)
    assert sorted(map(tuple, there)) == sorted(map(tuple, found.pairs))
    np.testing.assert_allclose(other.margins, found.margins, rtol=1e-5)
