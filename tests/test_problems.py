"""Builders of problems: what they accept, and what they refuse by name."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxling import kernels

LABELS = np.array([2, 0, 1, 1, 0, -1, 2])
FOLDS = np.array([0, 1, 0, 1, -1, 0, 1])


def same(a: kernels.Problems, b: kernels.Problems) -> bool:
    return a[1:] == b[1:] and all(
        np.array_equal(x, y)
        for own, other in zip(a.tiles, b.tiles, strict=True)
        for x, y in zip(own[:3], other[:3])
    )


@pytest.mark.parametrize(
    "labels", [[0, 256], [0, -2], [0, 0.9], ["0", "1"], [[0, 1]], [0, 2]]
)
def test_labels_of_a_task_are_never_wrapped(labels):
    task = np.arange(2), np.array([0, 1])
    with pytest.raises(ValueError, match="`labels` of task 1 must be"):
        kernels.independent([task, (np.arange(2), labels)])
    with pytest.raises(ValueError, match="below `classes` = 3; got 0..255"):
        kernels.independent([(np.arange(2), np.uint8([0, 255]))], classes=3)
    assert kernels.independent([(np.arange(2), [1, -1])]).tiles[0].labels.tolist() == [
        [1, -1]
    ]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64, np.int8])
def test_labels_and_folds_of_any_integers(dtype):
    labels = np.array([2, 0, 1, 1, 0])
    for build in (kernels.one_vs_rest, kernels.one_vs_one, kernels.multinomial):
        assert same(build(labels.astype(dtype)), build(labels))
        problems = build(labels)
        folded = kernels.leave_folds_out(problems, labels)
        assert same(kernels.leave_folds_out(problems, labels.astype(dtype)), folded)
    with pytest.raises(ValueError, match="got 0..255"):
        kernels.one_vs_rest(np.array([0, 255], np.uint8), classes=2)


@pytest.mark.parametrize("fold", [kernels.leave_folds_out, kernels.only_folds])
@pytest.mark.parametrize("labels", [LABELS, np.where(LABELS == 2, -1, LABELS)])
def test_folds_are_any_array_of_the_rows_or_one_for_each_tile(fold, labels):
    for problems in (kernels.one_vs_one(labels), kernels.one_vs_rest(labels)):
        expected = fold(problems, FOLDS)
        own = [FOLDS[tile.rows] for tile in problems.tiles]
        for given in (
            *(FOLDS.tolist(), tuple(FOLDS), jnp.asarray(FOLDS), list(FOLDS)),
            *(own, tuple(own), [part.tolist() for part in own]),
            [jnp.asarray(part) for part in own],
        ):
            assert same(fold(problems, given), expected)


def test_folds_that_do_not_fit_are_named():
    problems = kernels.one_vs_one(LABELS)
    for match, folds in (
        (r"`folds` must be \[n\].*7 rows.*\(6,\)", FOLDS[:6]),
        (r"`folds` must be \[n\].*\(6,\)", FOLDS[:6].tolist()),
        (r"`folds` must be \[n\].*\(\)", 3),
        (r"`folds` must be \[n\].*\(1, 1, 7\)", FOLDS[None, None]),
        ("each of the 3 tiles; got 1", FOLDS[None]),
        ("each of the 3 tiles; got 2", [FOLDS[:2], FOLDS[:2]]),
        ("tile 2 must be integers.*2 rows.*(3,)", [FOLDS[:2], FOLDS[:2], FOLDS[:3]]),
        ("tile 0 must be integers.*float64", FOLDS + 0.5),
        ("tile 0 must be integers.*bool", FOLDS > 0),
    ):
        for fold in (kernels.leave_folds_out, kernels.only_folds):
            with pytest.raises(ValueError, match=match):
                fold(problems, folds)


def test_weights_and_draws_that_do_not_fit_are_named():
    problems = kernels.one_vs_one(LABELS)
    for weight in (1.0, np.ones(6), np.ones((1, 7)), np.ones((7, 1))):
        with pytest.raises(ValueError, match="`sample_weight` must be .*7 rows"):
            kernels.weighted(problems, weight)
    for keep in (np.ones(7), np.ones((2, 6)), np.ones((1, 1, 7)), True):
        with pytest.raises(ValueError, match=r"`keep` must be \[s, n\] with n = 7"):
            kernels.one_vs_one(LABELS, keep=keep)


@pytest.mark.parametrize("labels", [[], [-1, -1], np.zeros(0, np.uint8)])
def test_problems_need_classes(labels):
    far = np.array([0, 10**9])
    for build in (kernels.one_vs_rest, kernels.one_vs_one, kernels.multinomial):
        with pytest.raises(ValueError, match="from 0 on; got 1000000000 among 2"):
            build(far)
    for folded in (kernels.leave_folds_out, kernels.only_folds):
        with pytest.raises(ValueError, match="`count` must be an integer > 0; got -2"):
            folded(kernels.one_vs_rest(np.arange(4) % 2), np.arange(4) % 2, -2)
    with pytest.raises(ValueError, match="at least one class; got 0"):
        kernels.one_vs_rest(labels)
    for build in (kernels.one_vs_one, kernels.multinomial):
        with pytest.raises(ValueError, match="at least two classes; got 0"):
            build(labels)
        with pytest.raises(ValueError, match="at least two classes; got 1"):
            build([0, 0, -1])
