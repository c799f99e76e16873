"""The classification rule, on hand-made layers and on a planted residual stream."""

import numpy as np
import pytest

from jaxling import behaviours, kernels

SOURCE, ANSWER, PIVOT, OTHER = 1, 2, 3, 4


def layers(*tops):
    """`(token, probability)` of each layer, for one item."""
    tokens, probabilities = np.array(tops).T
    return tokens[:, None].astype(int), probabilities[:, None]


@pytest.mark.parametrize(
    "tops, expected",
    [
        ([(OTHER, 0.2), (PIVOT, 0.9), (ANSWER, 0.8)], "pivot"),
        ([(OTHER, 0.2), (PIVOT, 0.7), (ANSWER, 0.8)], "co-occurrence"),
        ([(SOURCE, 0.9), (PIVOT, 0.7), (ANSWER, 0.8)], "co-occurrence"),
        ([(ANSWER, 0.9), (PIVOT, 0.7), (ANSWER, 0.8)], "co-occurrence"),
        ([(PIVOT, 0.8), (OTHER, 0.1), (ANSWER, 0.8)], "co-occurrence"),  # later wins
        ([(OTHER, 0.8), (PIVOT, 0.8), (ANSWER, 0.1)], "pivot"),
    ],
)
def test_the_firmest_token_decides(tops, expected):
    found = behaviours.classify(*layers(*tops), [{SOURCE}], [{ANSWER}])
    assert found.kind == [expected]


def test_a_filter_leaves_soft_items_undecided():
    tops = layers((PIVOT, 0.1), (ANSWER, 0.05))
    for minimum, expected in [(None, "pivot"), (0.05, "pivot"), (0.1, "none")]:
        found = behaviours.classify(*tops, [{SOURCE}], [{ANSWER}], minimum=minimum)
        assert found.kind == [expected]


def test_the_older_rule_asks_for_any_firm_foreign_token():
    tops = layers((PIVOT, 0.1), (SOURCE, 0.9), (ANSWER, 0.8))
    found = behaviours.classify(*tops, [{SOURCE}], [{ANSWER}], rule="threshold")
    assert (found.kind, found.layer[0], found.token[0]) == (["pivot"], 0, PIVOT)
    found = behaviours.classify(
        *tops, [{SOURCE}], [{ANSWER}], rule="threshold", minimum=0.2
    )
    assert (found.kind, found.token[0]) == (["co-occurrence"], SOURCE)


def test_items_that_share_a_token_are_skipped_unless_it_is_ignored():
    tops = layers((PIVOT, 0.9), (ANSWER, 0.8))
    both = [{SOURCE, 9}], [{ANSWER, 9}]
    assert behaviours.classify(*tops, *both).kind == ["skipped"]
    assert behaviours.classify(*tops, *both, ignored={9}).kind == ["pivot"]


def test_a_planted_model_is_recovered_item_by_item(rng):
    """A residual stream in which some items go through a pivot's direction.

    Ten layers move from the source word's unembedding row to the answer's; half of the
    items go by way of another word's row, with a larger norm: firmer than the answer.
    """
    vocab, d, n, depth = 600, 64, 80, 10
    unembed = rng.normal(size=(vocab, d)).astype("f")
    unembed /= np.linalg.norm(unembed, axis=1, keepdims=True)
    ids = np.stack([rng.permutation(vocab)[:3] for _ in range(n)])
    source, pivot, answer = ids.T
    planted = rng.random(n) < 0.5
    time = np.linspace(0, 1, depth)[:, None, None]
    start, way, end = (unembed[i] for i in (source, pivot, answer))
    direct = (1 - time) * 10 * start + time * 20 * end
    middle = np.exp(-((time - 0.5) ** 2) / 0.02)
    through = (1 - middle) * direct + middle * 30 * way
    hidden = np.where(planted[:, None], through, direct).astype("f")
    hidden += 0.05 * rng.normal(size=hidden.shape).astype("f")
    seen = kernels.project_layers(hidden, unembed, k=1)
    found = behaviours.classify(
        np.asarray(seen.top_tokens)[..., 0],
        np.exp(np.asarray(seen.top_log_probs)[..., 0]),
        [{i} for i in source],
        [{i} for i in answer],
    )
    assert [k == "pivot" for k in found.kind] == planted.tolist()
    np.testing.assert_array_equal(found.token[planted], pivot[planted])
    assert np.all((2 < found.layer[planted]) & (found.layer[planted] < 7))
    counted = behaviours.shares(found.kind)
    assert counted.pivot == planted.sum() and counted.skipped == 0
    assert counted.pivot_share == pytest.approx(planted.mean())


def test_what_does_not_fit_is_said():
    tops = layers((1, 0.5), (2, 0.5))
    with pytest.raises(ValueError, match="`rule`"):
        behaviours.classify(*tops, [{1}], [{2}], rule="first")
    with pytest.raises(ValueError, match=r"\[layer, 2\]"):
        behaviours.classify(*tops, [{1}, {2}], [{2}, {1}])
    with pytest.raises(ValueError, match="`answer_tokens`"):
        behaviours.classify(*tops, [{1}], [])
