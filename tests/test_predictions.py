"""Counts against Scores and behaviours, by definitions from elsewhere."""

import numpy as np
import pytest
from sklearn import metrics

from jaxling import behaviours
from jaxling.corpus import predictions

DIRECT, PIVOT = behaviours.CO_OCCURRENCE, behaviours.PIVOT


def items(seed: int = 0):
    rng = np.random.default_rng(seed)
    pairs = [("eng", "swh")] * 40 + [("swh", "eng")] * 25 + [("eng", "lav")] * 7
    counts = rng.poisson(3, (2, len(pairs)))  # ties and zeros
    scores = np.log1p(counts[0]) + rng.normal(size=len(pairs))
    kinds = rng.choice([DIRECT, PIVOT, behaviours.SKIPPED], len(pairs)).tolist()
    kinds[-7:] = [PIVOT] * 7  # one behaviour alone
    counts[1, -7:] = 4  # and a count that does not vary
    return pairs, dict(both=counts[0], alone=counts[1]), scores, kinds


def test_values_are_those_of_numpy_and_scikit_learn():
    pairs, counts, scores, kinds = items()
    found = predictions.relate(pairs, counts, scores, kinds, resamples=50)
    assert [(one.source, one.target) for one in found.pairs] == list(
        dict.fromkeys(pairs)
    )
    for one in found.pairs:
        own = [i for i, pair in enumerate(pairs) if pair == (one.source, one.target)]
        judged = [i for i in own if kinds[i] in (DIRECT, PIVOT)]
        assert one.items == len(own) and one.co_occurrence + one.pivot == len(judged)
        for name, values in counts.items():
            x = np.log(np.maximum(values, 1))
            r = one.correlation[name].value
            if np.ptp(values[own]):
                assert r == pytest.approx(np.corrcoef(x[own], scores[own])[0, 1])
            else:
                assert np.isnan(r)
            labels = [kinds[i] == DIRECT for i in judged]
            area = one.area[name].value
            if len(set(labels)) == 2:
                expected = metrics.roc_auc_score(labels, x[judged])
                assert area == pytest.approx(expected, abs=1e-6)
            else:
                assert np.isnan(area)
    areas = [one.area["both"].value for one in found.pairs[:2]]
    assert found.area["both"].value == pytest.approx(np.mean(areas))
    others = np.mean([one.area["alone"].value for one in found.pairs[:2]])
    assert found.advantage["alone"].value == pytest.approx(np.mean(areas) - others)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    held, tries, n = 0, 60, 60
    for _ in range(tries):
        x = rng.integers(1, 50, n)
        # P(direct) depends on nothing: the true area is a half.
        kinds = rng.choice([DIRECT, PIVOT], n).tolist()
        found = predictions.relate(
            [("a", "b")] * n, {"x": x}, rng.normal(size=n), kinds, resamples=200
        )
        area = found.pairs[0].area["x"]
        held += area.low <= 0.5 <= area.high
        assert area.low <= area.value <= area.high
    assert 0.82 * tries <= held


def test_the_same_items_are_drawn_for_every_count():
    pairs, counts, scores, kinds = items()
    twice = predictions.relate(
        pairs, {"a": counts["both"], "b": counts["both"] ** 2}, scores, kinds
    )
    # ln(count^2) has the order of ln(count).
    assert twice.advantage["b"] == (0, 0, 0)
    again = predictions.relate(pairs, counts, scores, kinds)
    assert repr(again) == repr(predictions.relate(pairs, counts, scores, kinds))


def test_a_linear_fit_is_least_squares():
    rng = np.random.default_rng(3)
    one, two = rng.normal(size=(2, 400))
    noise = rng.normal(size=400)
    scores = 2 * one - 3 * two + 5 + noise
    found = predictions.fit({"one": one, "two": two}, scores, resamples=200)
    design = np.stack([one, two, np.ones(400)], 1)
    expected, (left,), *_ = np.linalg.lstsq(design, scores)
    for name, slope, true in (("one", expected[0], 2), ("two", expected[1], -3)):
        estimate = found.slopes[name]
        assert estimate.value == pytest.approx(slope)
        # Standard errors are 0.05: intervals are some 0.2 wide and near the truth.
        assert 0.15 < estimate.high - estimate.low < 0.25
        assert estimate.low - 0.1 < true < estimate.high + 0.1
    total = ((scores - scores.mean()) ** 2).sum()
    assert found.explained.value == pytest.approx(1 - left / total)
    assert found.explained.low < found.explained.value < found.explained.high
    alone = predictions.fit({"one": one}, scores, resamples=2)
    r = np.corrcoef(one, scores)[0, 1]
    assert alone.explained.value == pytest.approx(r * r)
    twice = predictions.fit({"one": one, "again": one}, scores, resamples=2)
    assert twice.explained.value == pytest.approx(r * r)
    assert np.isnan(predictions.fit({"one": one}, np.ones(400)).explained.value)
    with pytest.raises(ValueError, match="Every item needs"):
        predictions.fit({"one": one}, scores[1:])


def test_items_without_a_count_are_refused():
    pairs, counts, scores, kinds = items()
    with pytest.raises(ValueError, match="Every item needs"):
        predictions.relate(pairs[1:], counts, scores, kinds)
    with pytest.raises(ValueError, match="Every item needs"):
        predictions.relate([], {}, [], [])
